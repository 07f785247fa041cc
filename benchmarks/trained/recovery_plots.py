"""Draws a result of `benchmarks.recovery`.

python -m benchmarks.recovery_plots benchmarks/results/recovery.json
"""

from __future__ import annotations

import json
import pathlib
import statistics
import sys

from matplotlib.figure import Figure


def plot(result: dict, path: pathlib.Path) -> None:
  """One panel a network: before and after, against parameters."""
  tests = result['tests']
  networks = list(dict.fromkeys(t['network'] for t in tests))
  size = (3.2 * len(networks) + 0.6, 3.4)
  figure = Figure(figsize=size, layout='constrained')
  panels = figure.subplots(1, len(networks), squeeze=False)[0]
  for axes, network in zip(panels, networks, strict=True):
    mine = [t for t in tests if t['network'] == network]
    fractions = sorted({t['fraction'] for t in mine})
    for key, label, style in (
      ('test_before', 'cut', 'o--'),
      ('test_after', 'fine-tuned', 'o-'),
    ):
      values = [
        [t[key] for t in mine if t['fraction'] == fraction]
        for fraction in fractions
      ]
      means = [statistics.mean(v) for v in values]
      spread = [
        [m - min(v) for m, v in zip(means, values, strict=True)],
        [max(v) - m for m, v in zip(means, values, strict=True)],
      ]
      shares = [100 * f for f in fractions]
      axes.errorbar(shares, means, spread, fmt=style, capsize=3, label=label)
    axes.set_title(network)
    axes.set_xlabel("kernels' parameters kept (%)")
    is_text = network.startswith('stories')
    axes.set_ylabel('nats per token' if is_text else 'mistakes (%)')
  panels[0].legend()
  figure.savefig(path, dpi=100)


def main() -> None:
  path = pathlib.Path(sys.argv[1])
  plot(json.loads(path.read_text(encoding='utf-8')), path.with_suffix('.png'))


if __name__ == '__main__':
  main()

"""How few rows calibrate: the default of `compress` against plain SVD.

  python -m benchmarks.calibration_size --data_root=DIR

From 128 rows to 16 rows for every input feature of the widest kernel, at a
quarter of the kernels' parameters, without the gauge, so that all have the same
pairs. Bar: the default is never below plain SVD, which needs no data at all.
Writes `calibration_size.json` and `.png`.
"""

from __future__ import annotations

import pathlib
from typing import Any

from matplotlib.figure import Figure
import numpy as np

from benchmarks import networks
from benchmarks.shared import judging
from benchmarks.shared import record
import utilized_rank as ur

FRACTION = 0.25
LABELS = {
  'weight': 'plain SVD',
  'output': 'least output error, uniform ranks',
  'loss': 'least loss, uniform ranks',
  'compress': 'compress without the gauge',
}
COLORS = dict(zip(LABELS, ('#999999', '#0072B2', '#009E73', 'black')))


def measure(network) -> list[dict]:
  calibration, judged = network.folds[0]
  fold = judging.Fold(network, calibration, judged)
  loss = ur.sampled_cross_entropy()
  rows = int(min(np.min(np.asarray(m.count)) for m in fold.moments.values()))
  per_example = rows / len(calibration['x'])
  widest = max(m.layout.matrix_shape[0] for m in fold.moments.values())
  counts = np.geomspace(128, min(16 * widest, rows), 6)
  found = []
  for count in counts:
    examples = max(1, round(count / per_example))
    size = min(network.batch_size, examples)
    x = calibration['x'][: examples // size * size]
    batches = [{'x': b} for b in np.split(x, len(x) // size)]
    few = ur.collect(
      network.fn,
      network.params,
      batches,
      loss=loss,
      select=network.select,
      progress=False,
    )
    ranks = ur.uniform_ranks(network.params, few, params_fraction=FRACTION)
    trees = {
      method: ur.factorize(
        network.params,
        few,
        ranks,
        method=method,
        compensate_mean=method != 'weight',
        progress=False,
      )
      for method in ('weight', 'output', 'loss')
    }
    trees['compress'], _ = ur.compress(
      network.fn,
      network.params,
      batches,
      moments=few,
      params_fraction=FRACTION,
      loss=loss,
      gauge=None,
      progress=False,
    )
    row: dict[str, Any] = {
      'rows': round(len(x) * per_example),
      'widest': widest,
    }
    row |= {k: judging.means(fold.judge(tree)) for k, tree in trees.items()}
    found.append(row)
    print(
      f'{row["rows"]:7,} rows  '
      + '  '.join(f'{n} {row[n]["kl"]:.4f}' for n in LABELS),
      flush=True,
    )
  return found


def plot(results: dict[str, list[dict]], path: pathlib.Path) -> None:
  figure = Figure(figsize=(5.5 * len(results), 4), layout='constrained')
  axes = np.atleast_1d(figure.subplots(1, len(results)))
  for axis, (name, rows) in zip(axes, results.items()):
    for method, label in LABELS.items():
      axis.loglog(
        [r['rows'] for r in rows],
        [r[method]['kl'] for r in rows],
        marker='o',
        ms=4,
        color=COLORS[method],
        label=label,
      )
    axis.set_title(f'{name}, {FRACTION:.0%} of the parameters', fontsize=10)
    axis.set_xlabel('rows to calibrate on')
    axis.grid(alpha=0.25)
  axes[0].set_ylabel('KL from dense, nats')
  axes[0].legend(fontsize=8, frameon=False)
  figure.savefig(path, dpi=80)


def main():
  parser = networks.parser(
    __doc__, default=['mlp_fmnist_relu', 'kwt1'], out=record.RESULTS
  )
  args = parser.parse_args()
  results = {
    network.name: measure(network)
    for network, _ in networks.each(args.networks, args.data_root)
  }
  record.write(
    args.out / 'calibration_size.json',
    'calibration_size',
    {'params_fraction': FRACTION, 'networks': results},
  )
  plot(results, args.out / 'calibration_size.png')


if __name__ == '__main__':
  main()

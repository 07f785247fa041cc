"""Draws a result of `benchmarks.quality`.

python -m benchmarks.quality_plots benchmarks/results/quality_kwt1.json
"""

from __future__ import annotations

import json
import pathlib
import sys

from matplotlib import ticker
from matplotlib.figure import Figure

COLORS = {
  'weight': '#999999',
  'scaled': '#E69F00',
  'fisher_rows': '#D55E00',
  'utilized': '#CC79A7',
  'output': '#0072B2',
  'loss': '#009E73',
}
NAMES = {
  'weight': 'plain SVD',
  'scaled': 'scaled SVD (ASVD)',
  'fisher_rows': 'Fisher-weighted SVD (FWSVD)',
  'utilized': "the paper's projection",
  'output': 'least output error',
  'loss': 'least loss',
}
# Differences of float32 losses are noise below this.
FLOOR = 1e-7
PANELS = (
  ('uniform ranks', 'uniform'),
  ('budget in nats of loss', 'loss'),
  ('budget by nats and share', 'geometric'),
  ('budget by relative energy', 'relative'),
)
# What `ur.compress` does, for comparison in every panel.
COMPRESS = (
  ('all steps', 'compress', '-'),
  ('no layers', 'compress without narrower layers', '-.'),
  ('no heads', 'compress without narrower heads, layers', ':'),
  ('no gauge', 'compress, pairs alone', '--'),
)


def plot(result: dict, path: pathlib.Path) -> None:
  """One column per allocation, then what was predicted for single kernels."""
  rows = result['rows']
  dense = rows[0]
  figure = Figure(figsize=(15, 6.4), layout='constrained')
  axes = figure.subplots(
    2, len(PANELS) + 1, width_ratios=[1] * len(PANELS) + [1.15]
  )
  for row, key in enumerate(('accuracy', 'cross_entropy')):
    shown = axes[row, :-1]
    for axis in shown[1:]:
      axis.sharex(shown[0])
      axis.sharey(shown[0])
      axis.tick_params(labelleft=False)
    for axis, (title, allocation) in zip(shown, PANELS):
      axis.axhline(_value(dense, key), color='black', lw=0.8, ls=':')
      for method, color in COLORS.items():
        _line(
          axis,
          rows,
          key,
          (method, allocation),
          color=color,
          lw=1.6,
          marker='o',
          ms=3.5,
          label=NAMES[method],
        )
      for method, label, style in COMPRESS:
        _line(
          axis,
          rows,
          key,
          (method, 'compress'),
          color='black',
          lw=1.4,
          ls=style,
          marker='s',
          ms=3,
          label=label,
        )
      if not row:
        axis.set_title(title, fontsize=10)
      else:
        axis.set_xlabel('kept parameters, %')
      axis.grid(alpha=0.25)
  axes[0, 0].set_ylabel('accuracy, %')
  axes[1, 0].set_ylabel('cross-entropy, nats')
  # Past a uniform guess all are useless; the interest is near the dense one.
  low = _value(dense, 'cross_entropy')
  worst = max(r['cross_entropy'] for r in rows)
  axes[1, 0].set_yscale('log')
  axes[1, 0].set_ylim(0.93 * low, min(worst * 1.1, max(4.0, 8 * low)))
  axes[1, 0].yaxis.set_major_formatter(ticker.FormatStrFormatter('%.3g'))
  axes[1, 0].yaxis.set_minor_formatter(ticker.NullFormatter())
  axes[1, 0].yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 3, 5)))
  axes[1, 0].yaxis.set_minor_locator(ticker.NullLocator())
  _singles(axes[0, -1], result, 'kl', 'KL from dense')
  _singles(axes[1, -1], result, 'increase', 'increase in cross-entropy')
  handles, labels = axes[0, 0].get_legend_handles_labels()
  figure.legend(
    handles, labels, loc='outside lower center', ncols=4, frameon=False
  )
  figure.suptitle(
    f'{result["network"]}: without fine-tuning, {result["kernels"]} kernels, '
    f'{result["labels_judged"]:,} labels judged (dotted: dense)',
    fontsize=12,
  )
  figure.savefig(path, dpi=80)


def _value(row: dict, key: str) -> float:
  return row[key] * (100 if key == 'accuracy' else 1)


def _line(axis, rows, key, recipe, **style) -> None:
  keys = ('method', 'allocation')
  found = [r for r in rows if tuple(r[k] for k in keys) == recipe]
  if not found:  # of a run before there was this recipe
    return
  axis.plot(
    [100 * r['kept'] for r in found], [_value(r, key) for r in found], **style
  )


def _singles(axis, result, key, name) -> None:
  points = [(s['predicted'], s[key]) for s in result['singles']]
  seen = [(p, q) for p, q in points if min(p, q) > FLOOR]
  axis.loglog(*zip(*seen), '.', ms=4, color=COLORS['loss'], alpha=0.7)
  ends = [min(map(min, seen)), max(map(max, seen))]
  axis.loglog(ends, ends, color='black', lw=0.8)
  hidden = len(points) - len(seen)
  note = f'rank correlation {result["rank_correlation"][key]:.2f}'
  if hidden:
    note += f'\n{hidden} of {len(points)} below {FLOOR:g}'
  axis.text(0.04, 0.96, note, transform=axis.transAxes, va='top', fontsize=9)
  if key == 'kl':
    axis.set_title('one kernel truncated', fontsize=10)
  else:
    axis.set_xlabel('predicted, nats')
  axis.set_ylabel(f'{name}, nats', fontsize=9)
  axis.grid(alpha=0.25)


def main():
  for path in map(pathlib.Path, sys.argv[1:]):
    plot(json.loads(path.read_text()), path.with_suffix('.png'))


if __name__ == '__main__':
  main()

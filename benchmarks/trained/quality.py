"""Quality without fine-tuning: every method and allocation, on real networks.

  python -m benchmarks.quality --data_root=DIR [--networks kwt1 ...]

DIR holds `networks/` and `data/` (see `benchmarks/networks`). Each network is
first checked against its published numbers. Then its kernels are cut to shares
of their parameters by every recipe, and accuracy, cross-entropy and the KL
divergence from the dense network are measured on data that calibrated nothing.
Last, kernels are truncated one at a time, and what `ur.predict_loss` says of
each is compared with what happens. Writes `quality_NAME.json` and `.png`.
Takes from three minutes (mlp_fmnist_relu) to two hours (kwt1) for a network, on
two CPU cores.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from benchmarks import networks
from benchmarks.networks import common
from benchmarks.shared import judging
from benchmarks.shared import record
from benchmarks.shared.judging import Fold
from benchmarks.trained import quality_plots
import utilized_rank as ur
from utilized_rank.factorization.methods import FAMILIES

FRACTIONS = (0.75, 0.5, 0.35, 0.25, 0.15)
# Ranks of the single truncations, as shares of the full rank.
SINGLE = (1 / 8, 1 / 4, 1 / 2)


class Recipe(NamedTuple):
  """How a network is cut.

  `allocation` is 'uniform', the metric of a budget, or 'compress': then
  `method` says which of its steps are taken.
  """

  method: str
  allocation: str
  mean: bool = True


# What `ur.compress(..., loss=)` does, and without some of its steps.
DEFAULT = Recipe('all steps', 'compress')
COMPRESS: dict[Recipe, dict[str, Any]] = {
  DEFAULT: {},
  Recipe('no layers', 'compress'): {'layers': False},
  Recipe('no heads', 'compress'): {'heads': False, 'layers': False},
  Recipe('no gauge', 'compress'): {
    'heads': False,
    'layers': False,
    'gauge': None,
  },
}
RECIPES = (
  *COMPRESS,
  *(Recipe(m, 'uniform', False) for m in ('weight', 'scaled', 'fisher_rows')),
  Recipe('utilized', 'uniform', False),
  *(
    Recipe(m, a)
    for a in ('uniform', 'loss', 'geometric', 'relative')
    for m in ('output', 'loss')
  ),
)


def cut(fold: Fold, recipe: Recipe, fraction: float):
  """The network's tree after a recipe."""
  network, moments = fold.network, fold.moments
  if recipe in COMPRESS:
    return fold.compress(fraction, **COMPRESS[recipe])[0]
  options: dict[str, Any] = dict(
    method=recipe.method, compensate_mean=recipe.mean, progress=False
  )
  if recipe.method in FAMILIES:
    options['families'] = fold.families(recipe.method, recipe.mean)
  if recipe.allocation == 'uniform':
    ranks = ur.uniform_ranks(network.params, moments, params_fraction=fraction)
  else:
    ranks = ur.budget_ranks(
      network.params,
      moments,
      params_fraction=fraction,
      metric=recipe.allocation,
      **options,
    )
  return ur.factorize(network.params, moments, ranks, **options)


def recipes_for(fold: Fold) -> list[Recipe]:
  """All of them; without attention narrower heads are none."""
  network = fold.network
  pairs = ur.find_attention(network.fn, network.params, fold.batches[0])
  return [r for r in RECIPES if pairs or r.method != 'no heads']


def measure_recipes(folds: list[Fold], fractions) -> list[dict]:
  """One row per recipe and fraction, the folds pooled."""
  recipes = recipes_for(folds[0])
  dense = judging.pool([fold.judge(fold.network.params) for fold in folds])
  rows = [_row(Recipe('dense', 'none', False), 1, 1.0, dense, dense)]
  for fraction in fractions:
    default = None
    for recipe in recipes:
      trees = [cut(fold, recipe, fraction) for fold in folds]
      if recipe == DEFAULT and fraction == fractions[-1]:
        folds[0].judge.check_padding(trees[0])
      found = judging.pool(
        [f.judge(t) for f, t in zip(folds, trees, strict=True)]
      )
      kept = [
        judging.share_kept(t, f.moments)
        for f, t in zip(folds, trees, strict=True)
      ]
      default = found if default is None else default
      rows.append(_row(recipe, fraction, float(np.mean(kept)), found, default))
    _print_rows(rows[-len(recipes) :])
  return rows


def _row(recipe, fraction, kept, found, default) -> dict:
  worse, error = judging.excess(found, default)
  return {
    'method': recipe.method,
    'allocation': recipe.allocation,
    'compensate_mean': recipe.mean,
    'asked': fraction,
    'kept': round(kept, 4),
    **judging.means(found),
    'over_default': worse,
    'over_default_error': error,
  }


def _print_rows(rows: list[dict]) -> None:
  print(
    f'\nasked to keep {rows[0]["asked"]:.0%}; last column: cross-entropy '
    'over the default, paired'
  )
  print(
    f'{"method":12}{"allocation":11}{"mean":6}{"kept":>6}{"acc %":>8}'
    f'{"CE":>8}{"KL":>8}  over'
  )
  for r in rows:
    print(
      f'{r["method"]:12}{r["allocation"]:11}'
      f'{"yes" if r["compensate_mean"] else "-":6}{r["kept"]:6.3f}'
      f'{100 * r["accuracy"]:8.2f}{r["cross_entropy"]:8.3f}{r["kl"]:8.3f}'
      f'  {r["over_default"]:+.3f} +- {r["over_default_error"]:.3f}',
      flush=True,
    )


def measure_singles(network, moments, judge) -> list[dict]:
  """Predicted and measured increase in loss, one truncated kernel at a time."""
  calibration = network.folds[0][0]['y']
  labels = calibration[0].size
  base = judge(network.params)['cross_entropy'].mean()
  rows = []
  for i, path in enumerate(moments):
    full = moments[path].layout.full_rank
    # Of many kernels each is truncated once.
    shares = SINGLE if len(moments) <= 40 else [SINGLE[i % len(SINGLE)]]
    for rank in sorted({max(1, round(full * s)) for s in shares}):
      ranks = {path: rank}
      small = ur.factorize(
        network.params, moments, ranks, method='loss', progress=False
      )
      found = judge(small)
      predicted = ur.predict_loss(network.params, moments, ranks) / labels
      rows.append(
        {
          'path': path,
          'rank': rank,
          'predicted': float(predicted),
          'kl': float(found['kl'].mean()),
          'increase': float(found['cross_entropy'].mean() - base),
        }
      )
  return rows


def rank_correlation(a, b) -> float:
  """Spearman's.

  >>> rank_correlation([1, 2, 3], [2, 4, 9])
  1.0
  """
  first, second = (np.argsort(np.argsort(v)) for v in (a, b))
  return round(float(np.corrcoef(first, second)[0, 1]), 4)


def run(network: common.Network, seconds, fractions) -> dict:
  folds = judging.folds(network)
  rows = measure_recipes(folds, fractions)
  singles = measure_singles(network, folds[0].moments, folds[0].judge)
  columns = {k: [s[k] for s in singles] for k in singles[0]}
  correlation = {
    k: rank_correlation(columns['predicted'], columns[k])
    for k in ('kl', 'increase')
  }
  print(f'rank correlation of the predicted with the measured: {correlation}')
  return {
    'network': network.name,
    'protocol': network.protocol,
    'seeds': {'sampled_cross_entropy': 0, 'calibration_rows': 0},
    'seconds': seconds(),
    'kernels': len(folds[0].moments),
    'labels_judged': sum(
      int((b['y'].astype(int) >= 0).sum()) for _, b in network.folds
    ),
    'rows': rows,
    'rank_correlation': correlation,
    'singles': singles,
  }


def main():
  parser = networks.parser(
    __doc__,
    default=list(networks.LOADERS),
    fractions=FRACTIONS,
    out=record.RESULTS,
  )
  args = parser.parse_args()
  fractions = tuple(args.fractions)
  for network, seconds in networks.each(args.networks, args.data_root):
    result = run(network, seconds, fractions)
    argv = ['--data_root=DIR', '--networks', network.name]
    if fractions != FRACTIONS:
      argv += ['--fractions', *map(str, fractions)]
    stem = f'quality_{network.name}'
    record.write(args.out / f'{stem}.json', 'quality', result, argv)
    quality_plots.plot(result, args.out / f'{stem}.png')


if __name__ == '__main__':
  main()

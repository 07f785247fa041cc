"""Quality without fine-tuning: every method and allocation, on real networks.

  python -m benchmarks.quality --data_root=DIR [--networks kwt1 ...]

DIR holds `networks/` and `data/` (see `benchmarks/networks`). Each network is
first checked against its published numbers. Then its kernels are cut to shares
of their parameters by every recipe, and accuracy, cross-entropy and the KL
divergence from the dense network are measured on data that calibrated nothing.
Last, kernels are truncated one at a time, and what `ur.predict_loss` says of
each is compared with what happens. Writes `quality_NAME.json` and `.png`.
"""

from __future__ import annotations

import argparse
import os
import time
from typing import NamedTuple

import jax
import numpy as np

from benchmarks import cache
from benchmarks import networks
from benchmarks import quality_plots
from benchmarks import record
from benchmarks.networks import common
import utilized_rank as ur
from utilized_rank.factorization.methods import FAMILIES
from utilized_rank.lowrank.store import stored_pairs

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
COMPRESS = {
  DEFAULT: {},
  Recipe('no heads', 'compress'): {'heads': False},
  Recipe('no gauge', 'compress'): {'heads': False, 'gauge': None},
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


class Judge:
  """Measures trees of any ranks on one fold, with one compilation."""

  def __init__(self, network: common.Network, moments: ur.Moments, batch):
    self._network, self._moments, self._batch = network, moments, batch
    self._run = jax.jit(ur.low_rank(network.fn))
    self._dense = self._scores(network.params)

  def _scores(self, tree):
    tree = _padded(tree, self._moments)
    return common.scores(self._run, tree, self._batch, self._network.batch_size)

  def __call__(self, tree) -> dict[str, np.ndarray]:
    """Per label: whether it is right, its nats, and KL(dense || tree)."""
    log_p, y = self._scores(tree), self._batch['y'].astype(np.int64)
    real = y >= 0
    picked = np.take_along_axis(log_p, np.maximum(y, 0)[..., None], -1)[..., 0]
    kl = np.sum(np.exp(self._dense) * (self._dense - log_p), -1)
    return {
      'accuracy': (log_p.argmax(-1) == y)[real].astype(float),
      'cross_entropy': -picked[real],
      'kl': kl[real],
    }

  def check_padding(self, tree) -> None:
    """Raises unless padding leaves the function as it is."""
    few = {k: v[:4] for k, v in self._batch.items()}
    plain = jax.jit(ur.low_rank(self._network.fn))(tree, few)
    ours = self._run(_padded(tree, self._moments), few)
    np.testing.assert_allclose(plain, ours, rtol=1e-3, atol=1e-3)


def _padded(tree, moments):
  """The same function with every kernel a pair of full rank, of zeros mostly.

  All trees then have the same shapes.
  """
  named, treedef = ur.paths.flatten(tree, lambda v: isinstance(v, ur.LowRank))
  for path in moments:
    leaf, layout = named[path], moments[path].layout
    if isinstance(leaf, ur.NarrowHeads):
      leaf = leaf.dense()
    d, m = layout.matrix_shape
    c = None
    if isinstance(leaf, ur.LowRank):
      ((a, b),) = stored_pairs(leaf)
      more = layout.full_rank - leaf.rank
      a, b = np.pad(a, [(0, 0), (0, more)]), np.pad(b, [(0, more), (0, 0)])
      c = leaf.c
    else:
      w = np.asarray(layout.to_matrices(np.asarray(leaf)))
      one = np.eye(min(d, m))
      a, b = (w, one) if d >= m else (one, w)
    if c is None and moments[path].entry.bias is None:
      c = np.zeros(layout.output_shape, leaf.dtype)
    named[path] = ur.LowRank(
      a.reshape(*layout.input_shape, -1).astype(leaf.dtype),
      b.reshape(-1, *layout.output_shape).astype(leaf.dtype),
      c,
      layout,
    )
  return ur.paths.unflatten(treedef, named)


def _batches(network: common.Network, batch: common.Batch) -> list:
  size = network.batch_size
  return [
    {'x': batch['x'][i : i + size]} for i in range(0, len(batch['x']), size)
  ]


def calibrate(network: common.Network, batch: common.Batch) -> ur.Moments:
  """Moments of the network's kernels, with what every method needs."""
  return ur.collect(
    network.fn,
    network.params,
    _batches(network, batch),
    loss=ur.sampled_cross_entropy(),
    fisher_rows=True,
    select=network.select,
    progress=False,
  )


class Fold:
  """What calibrates and what judges, and the families made of the former."""

  def __init__(self, network: common.Network, calibration, judged):
    self.network = network
    self.batches = _batches(network, calibration)
    self.moments = calibrate(network, calibration)
    self.judge = Judge(network, self.moments, judged)
    self._families: dict[tuple[str, bool], ur.Families] = {}

  def cut(self, recipe: Recipe, fraction: float):
    """The network's tree after a recipe."""
    network, moments = self.network, self.moments
    if recipe in COMPRESS:
      return ur.compress(
        network.fn,
        network.params,
        self.batches,
        moments=moments,
        params_fraction=fraction,
        loss=ur.sampled_cross_entropy(),
        progress=False,
        **COMPRESS[recipe],
      )[0]
    options = dict(
      method=recipe.method, compensate_mean=recipe.mean, progress=False
    )
    if recipe.method in FAMILIES:
      key = recipe.method, recipe.mean
      if key not in self._families:
        self._families[key] = ur.decompose(network.params, moments, **options)
      options['families'] = self._families[key]
    if recipe.allocation == 'uniform':
      ranks = ur.uniform_ranks(
        network.params, moments, params_fraction=fraction
      )
    else:
      ranks = ur.budget_ranks(
        network.params,
        moments,
        params_fraction=fraction,
        metric=recipe.allocation,
        **options,
      )
    return ur.factorize(network.params, moments, ranks, **options)


def share_kept(tree, kernels) -> float:
  """Numbers in the kernels' place, as a share of the kernels'."""
  named, _ = ur.paths.flatten(tree, lambda v: isinstance(v, ur.LowRank))
  left = sum(ur.count_params(named[p]) for p in kernels)
  return left / sum(int(np.prod(named[p].shape)) for p in kernels)


def recipes_for(fold: Fold) -> list[Recipe]:
  """All of them; without attention narrower heads are none."""
  network = fold.network
  pairs = ur.find_attention(network.fn, network.params, fold.batches[0])
  return [r for r in RECIPES if pairs or r.method != 'no heads']


def measure_recipes(folds: list[Fold], fractions) -> list[dict]:
  """One row per recipe and fraction, the folds pooled."""
  recipes = recipes_for(folds[0])
  dense = pool([fold.judge(fold.network.params) for fold in folds])
  rows = [_row(Recipe('dense', 'none', False), 1, 1.0, dense, dense)]
  for fraction in fractions:
    default = None
    for recipe in recipes:
      trees = [fold.cut(recipe, fraction) for fold in folds]
      if recipe == DEFAULT and fraction == fractions[-1]:
        folds[0].judge.check_padding(trees[0])
      found = pool([f.judge(t) for f, t in zip(folds, trees, strict=True)])
      kept = [
        share_kept(t, f.moments) for f, t in zip(folds, trees, strict=True)
      ]
      default = found if default is None else default
      rows.append(_row(recipe, fraction, float(np.mean(kept)), found, default))
    _print_rows(rows[-len(recipes) :])
  return rows


def pool(parts: list[dict]) -> dict[str, np.ndarray]:
  """Judgements of several folds as those of one."""
  return {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}


def _row(recipe, fraction, kept, found, default) -> dict:
  worse = found['cross_entropy'] - default['cross_entropy']
  return {
    'method': recipe.method,
    'allocation': recipe.allocation,
    'compensate_mean': recipe.mean,
    'asked': fraction,
    'kept': round(kept, 4),
    **{k: round(float(v.mean()), 5) for k, v in found.items()},
    'over_default': round(float(worse.mean()), 5),
    'over_default_error': round(
      float(worse.std(ddof=1) / len(worse) ** 0.5), 5
    ),
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
  places = [np.argsort(np.argsort(v)) for v in (a, b)]
  return round(float(np.corrcoef(*places)[0, 1]), 4)


def run(name: str, data_root: str, fractions) -> dict:
  print(f'\n== {name}')
  start = time.perf_counter()
  network = networks.LOADERS[name](data_root)
  folds = [Fold(network, *fold) for fold in network.folds]
  rows = measure_recipes(folds, fractions)
  singles = measure_singles(network, folds[0].moments, folds[0].judge)
  columns = {k: [s[k] for s in singles] for k in singles[0]}
  correlation = {
    k: rank_correlation(columns['predicted'], columns[k])
    for k in ('kl', 'increase')
  }
  print(f'rank correlation of the predicted with the measured: {correlation}')
  return {
    'network': name,
    'protocol': network.protocol,
    'seeds': {'sampled_cross_entropy': 0, 'calibration_rows': 0},
    'seconds': round(time.perf_counter() - start, 1),
    'kernels': len(folds[0].moments),
    'labels_judged': sum(
      int((b['y'].astype(int) >= 0).sum()) for _, b in network.folds
    ),
    'rows': rows,
    'rank_correlation': correlation,
    'singles': singles,
  }


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--data_root', required=True)
  parser.add_argument(
    '--networks',
    nargs='+',
    default=list(networks.LOADERS),
    choices=list(networks.LOADERS),
  )
  parser.add_argument('--fractions', nargs='+', type=float, default=FRACTIONS)
  parser.add_argument('--out', default='benchmarks/results')
  args = parser.parse_args()
  with cache.compilations():
    for name in args.networks:
      command = (
        f'python -m benchmarks.quality --data_root=DIR --networks {name}'
      )
      if tuple(args.fractions) != FRACTIONS:
        command += ' --fractions ' + ' '.join(map(str, args.fractions))
      result = run(name, args.data_root, tuple(args.fractions))
      stem = os.path.join(args.out, f'quality_{name}')
      record.write(f'{stem}.json', command, result)
      quality_plots.plot(result, f'{stem}.png')


if __name__ == '__main__':
  main()

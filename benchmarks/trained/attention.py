"""Attention's kernels at equal parameters: jointly per head, or one by one.

  python -m benchmarks.attention --data_root=DIR [--networks kwt1 ...]

The query, key, value and output kernels alone are cut to shares of their
parameters; everything else stays dense. 'joint' narrows the heads
(`ur.factorize_heads`), 'separate' gives every kernel a pair of its own
(`ur.factorize`). Accuracy, cross-entropy and the KL divergence from the dense
network are measured on data that calibrated nothing. DIR holds `networks/` and
`data/` (see `benchmarks/networks`). Writes attention.json.
Takes four minutes on two CPU cores.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from benchmarks import networks
from benchmarks.networks import common
from benchmarks.shared import judging
from benchmarks.shared import record
import utilized_rank as ur

FRACTIONS = (0.5, 0.35, 0.25, 0.15)
# (how, method, allocation)
RECIPES = (
  ('joint', 'output', 'uniform'),
  ('joint', 'loss', 'uniform'),
  ('joint', 'loss', 'budget'),
  ('separate', 'weight', 'uniform'),
  ('separate', 'output', 'uniform'),
  ('separate', 'loss', 'uniform'),
  ('separate', 'loss', 'budget'),
)


def run(network: common.Network, seconds, fractions) -> dict:
  few = {'x': network.folds[0][0]['x'][:2]}
  pairs = ur.find_attention(network.fn, network.params, few)
  print(str(pairs).splitlines()[-1])
  paths = [s.path for p in pairs.values() for s in (p.left, p.right)]
  network = dataclasses.replace(network, select=[(p, True) for p in paths])
  folds = judging.folds(network)
  dense = [fold.judge(network.params) for fold in folds]
  rows = [_row(('dense', '', ''), 1, 1.0, dense)]
  _show(rows[0])
  for fraction in fractions:
    for recipe in RECIPES:
      found, kept = [], []
      for fold in folds:
        small = _compressed(
          network.params, fold.moments, pairs, recipe, fraction
        )
        kept.append(judging.share_kept(small, fold.moments))
        # The judge compiles once, for pairs; narrow heads it gets padded.
        found.append(
          fold.judge(ur.merge(small) if recipe[0] == 'joint' else small)
        )
      rows.append(_row(recipe, fraction, float(np.mean(kept)), found))
      _show(rows[-1])
  return {
    'network': network.name,
    'protocol': network.protocol,
    'labels_judged': sum(len(b['y']) for _, b in network.folds),
    'pairs': len(pairs),
    'seconds': seconds(),
    'rows': rows,
  }


def _compressed(params, moments, pairs, recipe, fraction):
  how, method, allocation = recipe
  if how == 'joint':
    ranks = ur.uniform_head_ranks(pairs, params_fraction=fraction)
    if allocation == 'budget':
      ranks = ur.budget_head_ranks(
        params, moments, pairs, params_fraction=fraction
      )
    return ur.factorize_heads(params, moments, pairs, ranks, method=method)
  choose = ur.budget_ranks if allocation == 'budget' else ur.uniform_ranks
  ranks = choose(params, moments, params_fraction=fraction)
  return ur.factorize(params, moments, ranks, method=method)


def _row(recipe, fraction, kept, found) -> dict:
  return {
    **dict(zip(('how', 'method', 'allocation'), recipe, strict=True)),
    'asked': fraction,
    'kept': round(kept, 4),
    **judging.means(judging.pool(found)),
  }


def _show(row: dict) -> None:
  print(
    f'{row["how"]:9}{row["method"]:8}{row["allocation"]:9}{row["asked"]:6}'
    f'{row["kept"]:8.3f}{100 * row["accuracy"]:8.2f}'
    f'{row["cross_entropy"]:8.4f}{row["kl"]:8.4f}',
    flush=True,
  )


def main():
  parser = networks.parser(
    __doc__,
    default=['digits_vit', 'kwt1'],
    fractions=FRACTIONS,
    out=record.RESULTS / 'attention.json',
  )
  args = parser.parse_args()
  results = [
    run(network, seconds, args.fractions)
    for network, seconds in networks.each(args.networks, args.data_root)
  ]
  seeds = {'sampled_cross_entropy': 0, 'digits_vit': 0}
  record.write(args.out, 'attention', {'seeds': seeds, 'results': results})


if __name__ == '__main__':
  main()

"""`ur.compress` with and without narrower attention heads, no fine-tuning.

  python -m benchmarks.heads --data_root=DIR [--networks kwt1 ...]

All kernels of the blocks at one budget; the same folds and judgement as
`benchmarks.quality`. DIR holds `networks/` and `data/` (see
`benchmarks/networks`). Writes heads.json.
Takes ten minutes for kwt1 on two CPU cores.
"""

from __future__ import annotations

import numpy as np

from benchmarks import networks
from benchmarks.shared import judging
from benchmarks.shared import record

FRACTIONS = (0.25, 0.15)


def measure(network, fractions) -> list[dict]:
  folds = judging.folds(network)
  rows = []
  for fraction in fractions:
    for heads in (False, True):
      found, kept, narrow = [], [], []
      for fold in folds:
        # Nothing else that makes trees nearer, in either.
        tree, report = fold.compress(
          fraction, heads=heads, layers=False, refine=0
        )
        assert report.recipe is not None
        leaves = report.recipe.leaves.values()
        narrow.append(sum(leaf.head is not None for leaf in leaves))
        kept.append(judging.share_kept(tree, fold.moments))
        found.append(fold.judge(tree))
      rows.append(
        {
          'heads': heads,
          'asked': fraction,
          'kept': round(float(np.mean(kept)), 4),
          'narrow_kernels': narrow,
          **judging.means(judging.pool(found)),
        }
      )
      print(rows[-1], flush=True)
  return rows


def main():
  parser = networks.parser(
    __doc__,
    default=['kwt1', 'digits_vit'],
    fractions=FRACTIONS,
    out=record.RESULTS / 'heads.json',
  )
  args = parser.parse_args()
  results = {}
  for network, seconds in networks.each(args.networks, args.data_root):
    rows = measure(network, args.fractions)
    results[network.name] = {
      'protocol': network.protocol,
      'seconds': seconds(),
      'rows': rows,
    }
  seeds = {'sampled_cross_entropy': 0, 'digits_vit': 0}
  record.write(args.out, 'heads', {'seeds': seeds, 'networks': results})


if __name__ == '__main__':
  main()

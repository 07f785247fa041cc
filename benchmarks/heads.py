"""`ur.compress` with and without narrower attention heads, no fine-tuning.

  python -m benchmarks.heads --data_root=DIR [--networks kwt1 ...]

All kernels of the blocks at one budget; the same folds and judgement as
`benchmarks.quality`. DIR holds `networks/` and `data/` (see
`benchmarks/networks`). Writes heads.json.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from benchmarks import cache
from benchmarks import networks
from benchmarks import quality
from benchmarks import record
import utilized_rank as ur

FRACTIONS = (0.25, 0.15)


def measure(network, fractions) -> list[dict]:
  folds = [quality.Fold(network, *fold) for fold in network.folds]
  rows = []
  for fraction in fractions:
    for heads in (False, True):
      found, kept, narrow = [], [], []
      for fold in folds:
        tree, report = ur.compress(
          network.fn,
          network.params,
          fold.batches,
          moments=fold.moments,
          params_fraction=fraction,
          loss=ur.sampled_cross_entropy(),
          heads=heads,
          progress=False,
        )
        leaves = report.recipe.leaves.values()
        narrow.append(sum(leaf.head is not None for leaf in leaves))
        kept.append(quality.share_kept(tree, fold.moments))
        found.append(fold.judge(tree))
      rows.append(
        {
          'heads': heads,
          'asked': fraction,
          'kept': round(float(np.mean(kept)), 4),
          'narrow_kernels': narrow,
          **{
            k: round(float(v.mean()), 5) for k, v in quality.pool(found).items()
          },
        }
      )
      print(rows[-1], flush=True)
  return rows


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--data_root', required=True)
  parser.add_argument('--networks', nargs='+', default=['kwt1', 'digits_vit'])
  parser.add_argument('--fractions', nargs='+', type=float, default=FRACTIONS)
  parser.add_argument('--out', default=record.RESULTS / 'heads.json')
  args = parser.parse_args()
  results = {}
  with cache.compilations():
    for name in args.networks:
      start = time.perf_counter()
      network = networks.LOADERS[name](args.data_root)
      rows = measure(network, args.fractions)
      results[name] = {
        'protocol': network.protocol,
        'seconds': round(time.perf_counter() - start, 1),
        'rows': rows,
      }
  seeds = {'sampled_cross_entropy': 0, 'digits_vit': 0}
  record.write(
    args.out, record.command('heads'), {'seeds': seeds, 'networks': results}
  )


if __name__ == '__main__':
  main()

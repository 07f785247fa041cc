"""What `compress` does by default, beside what it must beat, on real networks.

  python -m benchmarks.default --data_root=DIR [--networks kwt1 ...]

DIR holds `networks/` and `data/` (see `benchmarks/networks`). Each network is
cut to shares of its kernels' parameters: by truncated SVD at uniform ranks, by
one prediction (`budget_ranks` and `factorize`, method 'loss') and by `compress`
as it is, nothing fine-tuned on labels. Accuracy and the KL divergence from the
dense network are those of data that calibrated nothing; CPU seconds are those
of the call, without collecting, and of the training on dense outputs in it.
Networks that are not asked for keep what the result file says of them.
Takes from one minute (mlp_fmnist_relu) to half an hour (resnet56_cifar10) for a
network, on two CPU cores.
"""

from __future__ import annotations

from collections.abc import Callable
import time
from typing import Any

import numpy as np

from benchmarks import networks
from benchmarks.shared import judging
from benchmarks.shared import record
from benchmarks.shared.judging import Fold
import utilized_rank as ur

SHARES = {
  'kwt1': (0.25, 0.15),
  'digits_vit': (0.15,),
  'stories260k': (0.75, 0.5),
  'resnet20_cifar10': (0.5,),
  'resnet56_cifar10': (0.5, 0.25),
  'char_mlp': (0.15,),
  'mlp_fmnist_relu': (0.15,),
}


def svd(fold: Fold, share: float) -> tuple[Any, float]:
  params, moments = fold.network.params, fold.moments
  ranks = ur.uniform_ranks(params, moments, params_fraction=share)
  small = ur.factorize(params, moments, ranks, method='weight', progress=False)
  return small, 0.0


def predicted(fold: Fold, share: float) -> tuple[Any, float]:
  params, moments = fold.network.params, fold.moments
  options: Any = {'method': 'loss', 'progress': False}
  ranks = ur.budget_ranks(params, moments, params_fraction=share, **options)
  return ur.factorize(params, moments, ranks, **options), 0.0


def compressed(fold: Fold, share: float) -> tuple[Any, float]:
  small, report = fold.compress(share)
  assert report.choice is not None
  print(f'  {report.choice.line}', flush=True)
  trained = (s.cpu_seconds for s in report.choice.stages if s.name == 'refine')
  return small, sum(trained)


# Each makes a tree, and says how much of its time is training.
RECIPES: dict[str, Callable[[Fold, float], tuple[Any, float]]] = {
  'svd': svd,
  'budget and factors': predicted,
  'compress': compressed,
}


def run(name: str, root: str) -> dict[str, Any]:
  network = networks.LOADERS[name](root)
  folds = judging.folds(network)
  rows = []
  for share in SHARES[name]:
    for recipe, cut in RECIPES.items():
      start = time.process_time()
      trees, trained = zip(*(cut(fold, share) for fold in folds), strict=True)
      seconds = (time.process_time() - start) / len(folds)
      pairs = list(zip(folds, trees, strict=True))
      found = judging.means(judging.pool([f.judge(t) for f, t in pairs]))
      kept = [judging.share_kept(tree, fold.moments) for fold, tree in pairs]
      rows.append(
        {
          'recipe': recipe,
          'asked': share,
          'kept': round(float(np.mean(kept)), 4),
          'cpu_seconds': round(seconds, 1),
          'trained_cpu_seconds': round(float(np.mean(trained)), 1),
          **found,
        }
      )
      print(
        f'{name:18}{share:6.0%} {recipe:22}{100 * found["accuracy"]:7.2f} %'
        f'  KL {found["kl"]:.4f}{seconds:8.1f} CPU s',
        flush=True,
      )
  dense = judging.pool([fold.judge(network.params) for fold in folds])
  return {
    'protocol': network.protocol,
    'dense_accuracy': judging.means(dense)['accuracy'],
    'rows': rows,
  }


def main():
  parser = networks.parser(
    __doc__,
    default=list(SHARES),
    choices=list(SHARES),
    out=record.RESULTS / 'default.json',
  )
  seeds = {'sampled_cross_entropy': 0}
  networks.write_each(parser.parse_args(), 'default', seeds, run)


if __name__ == '__main__':
  main()

"""What factorizing all of ViT-B/16 takes once its moments are collected.

  python -m benchmarks.factorize --out benchmarks/results/factorize.json

Random weights, moments of random images. For each method: seconds of
`decompose`, of `budget_ranks` and `factorize` with the families in hand and
without, and of `measure`; then for each shape the seconds of one kernel beside
the floor, the bare LAPACK and BLAS calls that its mathematics needs, both on
one thread. Bar: `budget_ranks` and `factorize` together under 60 s on two
cores. Collecting 256 images takes minutes; with fewer (`--images`, a number
that is printed) the work after it is the same.
Takes three minutes on two CPU cores.
"""

from __future__ import annotations

import functools
import time
from typing import Any
import warnings

import numpy as np
from threadpoolctl import threadpool_limits

from benchmarks.shared import arguments
from benchmarks.shared import memory
from benchmarks.shared import record
from benchmarks.shared import timing
from benchmarks.shared import vits
import utilized_rank as ur
from utilized_rank.factorization import kernels
from utilized_rank.factorization import methods
from utilized_rank.linalg import best_pairs
from utilized_rank.models import vit

FRACTION = 0.5


def problem(variant: str, depth: int, images: int, size: int, batch_size: int):
  """Random parameters, and moments of random images with a loss."""
  model, params = vits.random_vit(variant, size, depth=depth)
  rng = np.random.default_rng(0)
  data = rng.normal(size=(images, size, size, 3)).astype(np.float32)
  moments = ur.collect(
    model.apply,
    params,
    [data[i : i + batch_size] for i in range(0, images, batch_size)],
    loss=ur.sampled_cross_entropy(),
  )
  return params, moments


def of_method(params, moments, method: str) -> dict[str, float]:
  """Seconds of every step, the families made once or anew each time."""
  row: dict[str, Any] = {'method': method}
  start = time.process_time()
  budget = lambda **kwargs: ur.budget_ranks(
    params, moments, params_fraction=FRACTION, method=method, **kwargs
  )
  small = lambda ranks, **kwargs: ur.factorize(
    params, moments, ranks, method=method, **kwargs
  )
  row['decompose'], families = timing.once(
    lambda: ur.decompose(params, moments, method=method)
  )
  shared = {'families': families}
  row['budget'], ranks = timing.once(lambda: budget(**shared))
  row['factorize'], _ = timing.once(lambda: small(ranks, **shared))
  row['total'] = round(row['decompose'] + row['budget'] + row['factorize'], 3)
  # All threads together: what a busy machine does not change.
  row['total_cpu'] = round(time.process_time() - start, 3)
  row['peak_gib'] = memory.peak_gib()
  del families
  shared.clear()
  row['budget_alone'], again = timing.once(budget)
  row['factorize_alone'], _ = timing.once(lambda: small(ranks))
  row['total_alone'] = round(row['budget_alone'] + row['factorize_alone'], 3)
  assert ranks == again
  return row


def floor(kernel: kernels.Kernel, method: str) -> float:
  """Seconds of the products and decompositions without which it cannot be.

  The least side's eigenproblem and what leads to it, the factors, and the error
  that they leave, predicted (of all ranks) and measured (of one).
  """
  w, s = kernel.w, kernel.second
  g = kernel.gradient if method == 'loss' else None
  d, m = w.shape
  n = min(d, m)
  small = np.ascontiguousarray(s[:n, :n])
  rng = np.random.default_rng(0)
  a, b = rng.normal(size=(d, n)), rng.normal(size=(n, m))

  def eigh(count):
    for _ in range(count):
      np.linalg.eigh(small)

  def calls():
    if d < m:
      eigh(2)  # of S, and of the problem itself
      v = small @ w
      v @ v.T if g is None else (v @ g) @ v.T
    else:
      eigh(1 if g is None else 2)  # of G, or of S where it is as small
      w.T @ (s @ w)
    # The basis applied: a pair of factors.
    small @ a if d == n else a @ small
    small @ b if m != n else b @ small
    for left in (a, w):  # predicted, measured
      right = b if left is a else w
      product = s @ left
      left.T @ product if left is a else np.sum(left * product)
      if g is not None:
        right @ g

  calls()
  return timing.once(calls)[0]


def balanced(family: methods.Family, rank: int):
  return best_pairs.balanced(methods.truncate(family, rank))


def of_shape(params, moments) -> list[dict[str, Any]]:
  """One kernel of each shape, alone, on one BLAS thread."""
  first: dict[tuple[int, int], str] = {}
  for path in moments:
    first.setdefault(moments[path].layout.matrix_shape, path)
  shapes = [moments[path].layout.matrix_shape for path in moments]
  fresh = lambda path: next(
    next(kernels.kernels(params, moments, centered=True, only=[path]))[1]
  )
  rows = []
  for shape, path in first.items():
    row: dict[str, Any] = {
      'shape': list(shape),
      'kernels': shapes.count(shape),
      'path': path,
    }
    for method in ('output', 'loss'):
      kernel = fresh(path)
      with threadpool_limits(limits=1, user_api='blas'):
        row[f'{method}_family'], family = timing.once(
          functools.partial(methods.family, kernel, method)
        )
        rank = max(1, int(FRACTION * shape[0] * shape[1] / sum(shape)))
        row[f'{method}_balance'], _ = timing.once(
          functools.partial(balanced, family, rank)
        )
        row[f'{method}_floor'] = floor(fresh(path), method)
    print(row, flush=True)
    rows.append(row)
  return rows


def main():
  parser = arguments.parser(__doc__)
  parser.add_argument('--variant', default='B/16', choices=sorted(vit.VARIANTS))
  parser.add_argument('--depth', type=int, help='blocks, if not all')
  parser.add_argument('--images', type=int, default=32)
  parser.add_argument('--image_size', type=int, default=224)
  parser.add_argument('--batch_size', type=int, default=8)
  parser.add_argument(
    '--methods', nargs='+', default=['output', 'loss'], choices=methods.FAMILIES
  )
  args = parser.parse_args()
  depth = args.depth or vit.VARIANTS[args.variant]['depth']
  collecting, (params, moments) = timing.once(
    lambda: problem(
      args.variant, depth, args.images, args.image_size, args.batch_size
    )
  )
  collected = memory.peak_gib()
  # Few images are known to be few; the work is the same.
  warnings.filterwarnings('ignore', '.*was measured on')
  print(
    f'{len(moments)} kernels, moments of {args.images} images in {collecting} s'
  )
  rows = []
  for method in args.methods:
    rows.append(of_method(params, moments, method))
    print(rows[-1], flush=True)
  measuring, _ = timing.once(lambda: ur.measure(params, moments))
  print(f'measure: {measuring} s', flush=True)
  result = {
    'variant': args.variant,
    'depth': depth,
    'images': args.images,
    'rows_per_kernel': int(np.max([np.max(moments[p].count) for p in moments])),
    'fraction': FRACTION,
    'seconds_collect': collecting,
    'seconds_measure': measuring,
    'peak_gib_collected': collected,
    'peak_gib': memory.peak_gib(),
    'methods': rows,
    'shapes': of_shape(params, moments),
  }
  record.write(args.out, 'factorize', result)


if __name__ == '__main__':
  main()

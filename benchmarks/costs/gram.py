"""What the symmetry of a Gram matrix saves, by shape and number of panels.

  python -m benchmarks.gram --out benchmarks/results/gram.json

Times, sum included, over that of the full product and sum in the same run.
Half of the products are needed: no ratio can be below 0.5, but for what a sum
of half the size saves.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from benchmarks.shared import arguments
from benchmarks.shared import record
from benchmarks.shared import timing
from utilized_rank.linalg import gram


def in_panels(number, x):
  """`gram.panels` with a number of them that is not its own choice."""
  kept = gram._PANELS, gram._LEAST_WIDTH
  gram._PANELS, gram._LEAST_WIDTH = number, 0
  try:
    return gram.panels(x)[1]
  finally:
    gram._PANELS, gram._LEAST_WIDTH = kept


def full(x):
  return jnp.einsum('nd,ne->de', x, x, precision=jax.lax.Precision.HIGHEST)


def symmetric_product(x):
  zeros = jnp.zeros((x.shape[1],) * 2, x.dtype)
  return jax.lax.linalg.symmetric_product(
    x.T, zeros, alpha=1.0, beta=0.0, symmetrize_output=True
  )


def measure(n, d):
  fns = {
    'full': full,
    'chosen': lambda x: gram.panels(x)[1],
    'symmetric_product': symmetric_product,
    **{f'{k}_panels': functools.partial(in_panels, k) for k in (2, 3, 4, 6, 8)},
  }
  x = jax.random.normal(jax.random.key(0), (n, d))
  repeats = max(5, min(30, int(2e10 / (n * d * d))))
  times = timing.interleaved(
    {k: timing.Adding(fn, x) for k, fn in fns.items()}, repeats
  )
  ratios = {
    kind: {k: round(t[kind] / times['full'][kind], 3) for k, t in times.items()}
    for kind in ('wall', 'cpu')
  }
  rate = 2 * n * d * d / times['full']['wall'] / 1e9
  row = dict(n=n, d=d, full_gflops_per_second=round(rate, 1), **ratios)
  print(row, flush=True)
  return row


def main():
  parser = arguments.parser(__doc__)
  parser.add_argument('--quick', action='store_true')
  args = parser.parse_args()
  widths = (256, 768) if args.quick else (64, 256, 512, 768, 1536, 3072, 4096)
  shapes = [
    (n, d)
    for d in widths
    for n in ((1576,) if args.quick else (200, 800, 1576, 6304, 12800))
    if n * d * d < 7e10
  ]
  rows = [measure(*shape) for shape in shapes]
  record.write(args.out, 'gram', {'rows': rows})


if __name__ == '__main__':
  main()

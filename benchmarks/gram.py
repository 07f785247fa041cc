"""What the symmetry of a Gram matrix saves, by shape and number of blocks.

  python -m benchmarks.gram --out benchmarks/results/gram.json

Times over that of the full product in the same run; `chosen` is what
`utilized_rank.gram` does at that shape. Half of the products are needed: no
ratio can be below 0.5.
"""

from __future__ import annotations

import argparse
import functools

import jax
import jax.numpy as jnp

from benchmarks import record
from benchmarks import timing
from utilized_rank import gram


def blocked(blocks, x):
  """`gram.gram` with a number of blocks that is not its own choice."""
  kept = gram._BLOCKS, gram._LEAST_WIDTH
  gram._BLOCKS, gram._LEAST_WIDTH = blocks, 0
  try:
    return gram.gram(x)[1]
  finally:
    gram._BLOCKS, gram._LEAST_WIDTH = kept


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
    'chosen': lambda x: gram.gram(x)[1],
    'symmetric_product': symmetric_product,
    **{f'{b}_blocks': functools.partial(blocked, b) for b in (2, 3, 4, 6, 8)},
  }
  x = jax.random.normal(jax.random.key(0), (n, d))
  run = lambda fn: functools.partial(jax.jit(fn), x)
  repeats = max(5, min(30, int(2e10 / (n * d * d))))
  times = timing.interleaved({k: run(fn) for k, fn in fns.items()}, repeats)
  ratios = {
    kind: {k: round(t[kind] / times['full'][kind], 3) for k, t in times.items()}
    for kind in ('wall', 'cpu')
  }
  rate = 2 * n * d * d / times['full']['wall'] / 1e9
  row = dict(n=n, d=d, full_gflops_per_second=round(rate, 1), **ratios)
  print(row, flush=True)
  return row


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument('--out')
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
  record.write(args.out, record.command('gram'), {'rows': rows})


if __name__ == '__main__':
  main()

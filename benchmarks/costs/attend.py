"""Attention on its own: ours, JAX's, and what its products alone would take.

  python -m benchmarks.attend --out benchmarks/results/attend.json

Milliseconds per image for one layer of ViT-B/16 (197 positions, 12 heads of 64
features), chained so that results stay in place. The floor is the time of its
two products at the rate of one large one in the same run.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from benchmarks.shared import arguments
from benchmarks.shared import record
from benchmarks.shared import timing
from utilized_rank.models import transformer_parts

_CHAINED = 6
_TOKENS, _HEADS, _WIDTH = 197, 12, 64


def chained(attend, x):
  return jax.lax.fori_loop(0, _CHAINED, lambda _, x: attend(x, x, x), x)


def measure(batch, repeats):
  x = jax.random.normal(jax.random.key(0), (batch, _TOKENS, _HEADS, _WIDTH))
  fns = {
    'attend': transformer_parts.attend,
    'jax.nn.dot_product_attention': jax.nn.dot_product_attention,
  }
  runs = {
    name: functools.partial(jax.jit(functools.partial(chained, fn)), x)
    for name, fn in fns.items()
  }
  n, d = batch * _TOKENS, _HEADS * _WIDTH
  rows = x.reshape(n, d)
  w = jnp.eye(d)
  product = lambda x: jax.lax.fori_loop(0, _CHAINED, lambda _, x: x @ w, x)
  runs['product'] = functools.partial(jax.jit(product), rows)
  took = timing.interleaved(runs, repeats)
  rate = _CHAINED * 2 * n * d * d / took.pop('product')['wall']
  each = {name: 1e3 * t['wall'] / _CHAINED / batch for name, t in took.items()}
  floor = 1e3 * 4 * _HEADS * _TOKENS**2 * _WIDTH / rate
  row = {'batch': batch, 'milliseconds_per_image': each, 'floor': floor}
  print(row, flush=True)
  return row


def main():
  parser = arguments.parser(__doc__, repeats=10)
  args = parser.parse_args()
  rows = [measure(batch, args.repeats) for batch in (1, 8, 64)]
  record.write(args.out, 'attend', {'rows': rows})


if __name__ == '__main__':
  main()

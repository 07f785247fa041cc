"""What capturing costs before it runs: trace and compile time.

  python -m benchmarks.tracing --out benchmarks/results/tracing.json

Bars: tracing a 48-layer unrolled ViT under 2 x `jax.make_jaxpr` alone; compile
time of the captured function under 2.5 x the plain one's; a scanned model's
compile time does not grow with depth.
"""

from __future__ import annotations

import statistics
import time

from flax import linen as nn
import jax
import jax.numpy as jnp

from benchmarks.shared import arguments
from benchmarks.shared import record
import utilized_rank as ur


class Block(nn.Module):
  """A pre-norm transformer block."""

  @nn.compact
  def __call__(self, x):
    y = nn.LayerNorm()(x)
    x = x + nn.MultiHeadDotProductAttention(4)(y, y)
    y = nn.LayerNorm()(x)
    y = nn.gelu(nn.Dense(4 * x.shape[-1])(y))
    return x + nn.Dense(x.shape[-1])(y), None


class ViT(nn.Module):
  """Patches, blocks (unrolled or scanned), and a head."""

  depth: int
  scanned: bool = False
  width: int = 64

  @nn.compact
  def __call__(self, images):
    x = nn.Conv(self.width, (4, 4), strides=4, name='patches')(images)
    x = x.reshape(len(x), -1, self.width)
    if self.scanned:
      blocks = nn.scan(
        Block,
        variable_axes={'params': 0},
        split_rngs={'params': True},
        length=self.depth,
      )
      x, _ = blocks(name='blocks')(x)
    else:
      for i in range(self.depth):
        x, _ = Block(name=f'block_{i}')(x)
    return nn.Dense(10, name='head')(nn.LayerNorm()(x).mean(1))


def seconds(fn, repeats):
  """Median time of a call, JAX's caches emptied before each."""
  times = []
  for _ in range(repeats):
    jax.clear_caches()
    start = time.perf_counter()
    fn()
    times.append(time.perf_counter() - start)
  return statistics.median(times)


def measure(depth, scanned, repeats):
  model = ViT(depth, scanned)
  images = jnp.zeros((2, 16, 16, 3))
  params = jax.eval_shape(model.init, jax.random.key(0), images)
  captured = ur.capture(model.apply)
  compiling = lambda fn: lambda: jax.jit(fn).lower(params, images).compile()
  timed = {
    'trace_plain': lambda: jax.make_jaxpr(model.apply)(params, images),
    'trace_captured': lambda: jax.make_jaxpr(captured)(params, images),
    'find_sites': lambda: ur.find_sites(model.apply, params, images),
  }
  row = {k: seconds(fn, repeats) for k, fn in timed.items()}
  row |= {
    f'compile_{name}': seconds(compiling(fn), 1 if depth > 12 else repeats)
    for name, fn in (('plain', model.apply), ('captured', captured))
  }
  # `lower` traces too; what XLA does is the rest.
  for kind in ('trace', 'find_sites', 'compile'):
    over = 'find_sites' if kind == 'find_sites' else f'{kind}_captured'
    plain = 'compile_plain' if kind == 'compile' else 'trace_plain'
    row[f'{kind}_ratio'] = row[over] / row[plain]
  row = {k: round(v, 4) for k, v in row.items()}
  print(depth, 'scanned' if scanned else 'unrolled', row, flush=True)
  return dict(depth=depth, scanned=scanned, **row)


def main():
  parser = arguments.parser(__doc__, repeats=3)
  parser.add_argument('--quick', action='store_true', help='12 layers, once')
  args = parser.parse_args()
  cases = (
    [(12, False)]
    if args.quick
    else [(12, False), (48, False), (6, True), (48, True)]
  )
  rows = [measure(*case, args.repeats) for case in cases]
  record.write(args.out, 'tracing', {'rows': rows})


if __name__ == '__main__':
  main()

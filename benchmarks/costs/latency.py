"""Latency and throughput of factorized against dense ViT-B/16.

  python -m benchmarks.latency --out benchmarks/results/latency_default.json
  MALLOC_ARENA_MAX=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 \\
    python -m benchmarks.latency --out benchmarks/results/latency.json

One rank for all kernels, 256 for 50 % of their parameters and 128 for 25 %:
multiples of 64 waste no part of a tile. The same pairs are also stored with an
identity block, as `compress` does. Factors are random, their shapes are what
counts. Bar: at batch 64 at least 85 % of the ideal speed-up, the ratio of
the FLOPs of all products. Larger batches are also run 8 images at a time
(`jax.lax.map`), as they are fastest where activations should stay in a cache,
dense or not. The C library's settings let the process keep the memory that a
run has freed, as servers do; by default the next run gets it cleared anew, page
by page, which costs both networks the same time, and the fast one more of it.
"""

from __future__ import annotations

import functools

import jax

from benchmarks.shared import record
from benchmarks.shared import timing
from benchmarks.shared import vits
import utilized_rank as ur
from utilized_rank.products import gauge
from utilized_rank.walk.cost import forward_flops

_CHUNK = 8


def in_chunks(fn, size, tree, images):
  """`fn(tree, images)`, so many images at a time."""
  if size == len(images):
    return fn(tree, images)
  chunks = images.reshape(-1, size, *images.shape[1:])
  outputs = jax.lax.map(functools.partial(fn, tree), chunks)
  return outputs.reshape(len(images), -1)


def compared(took, cost, name, batch):
  """A network's times beside the dense one's, and the ideal."""
  ideal = cost['dense'] / cost[name]
  row = {
    'milliseconds': 1e3 * took[name]['wall'],
    'milliseconds_dense': 1e3 * took['dense']['wall'],
    'images_per_second': batch / took[name]['wall'],
    'ideal_speed_up': ideal,
  }
  for kind in ('wall', 'cpu'):
    speed_up = took['dense'][kind] / took[name][kind]
    row[f'speed_up_{kind}'] = speed_up
    row[f'share_of_ideal_{kind}'] = speed_up / ideal
  return row


def main():
  parser = vits.parser(__doc__, repeats=5)
  parser.add_argument('--batches', type=int, nargs='*', default=[1, 8, 64])
  args = parser.parse_args()
  fractions = 0.5, 0.25
  model, trees = vits.trees(args.variant, args.pixels, fractions, gauge.GAUGES)
  fn = ur.low_rank(model.apply)
  rows = []
  for batch in args.batches:
    images = vits.random_images(batch, args.pixels)
    cost = {k: forward_flops(fn, v, images) for k, v in trees.items()}
    repeats = max(2, args.repeats if batch > 8 else 4 * args.repeats)
    for chunk in (batch, _CHUNK) if batch > _CHUNK else (batch,):
      run = jax.jit(functools.partial(in_chunks, fn, chunk))
      took = timing.interleaved(
        {k: functools.partial(run, v, images) for k, v in trees.items()},
        repeats,
      )
      for name in list(trees)[1:]:
        row = {'batch': batch, 'at_a_time': chunk, 'kept': name}
        row['parameters'] = ur.count_params(trees[name])
        row |= compared(took, cost, name, batch)
        print(row, flush=True)
        rows.append(row)
  result = {'variant': args.variant, 'rows': rows}
  record.write(args.out, 'latency', result)


if __name__ == '__main__':
  main()

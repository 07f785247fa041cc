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

import argparse
import functools

import jax
import jax.numpy as jnp

from benchmarks import record
from benchmarks import timing
import utilized_rank as ur
from utilized_rank.lowrank.leaf import LowRank
from utilized_rank.models.vit import VARIANTS
from utilized_rank.models.vit import ViT
from utilized_rank.products import gauge
from utilized_rank.tree.paths import flatten
from utilized_rank.tree.paths import unflatten
from utilized_rank.walk import cost

_TILE = 64
_CHUNK = 8


def factorized(params, sites, fraction, form=None):
  """Random pairs of the one rank that keeps a fraction of all kernels.

  With the form 'identity' they are stored with an identity block: of the same
  rank, fewer numbers.
  """
  named, treedef = flatten(params)
  key = jax.random.key(1)
  shapes = [site.matrix_shape for site in sites.values()]
  rank = fraction * sum(d * m for d, m in shapes) / sum(map(sum, shapes))
  rank = max(1, round(rank / _TILE)) * _TILE
  for path, site in sites.items():
    d, m = site.matrix_shape
    layout = site.layout
    keys = jax.random.split(key, 3)
    order, outputs = None, layout.output_shape
    if gauge.has_identity(layout, rank, form):
      order = gauge.Order(jax.random.permutation(keys[2], m))
      outputs = (m - rank,)
    named[path] = LowRank(
      jax.random.normal(keys[0], (*layout.input_shape, rank)) / d**0.5,
      jax.random.normal(keys[1], (rank, *outputs)) / rank**0.5,
      None,
      layout,
      order,
    )
  return unflatten(treedef, named)


def networks(variant, pixels, fractions, forms=(None,)):
  """A ViT, and its trees: 'dense', '50%', '50% identity' and so on."""
  model = ViT(num_classes=1000, **VARIANTS[variant])
  image = jnp.zeros((1, pixels, pixels, 3))
  dense = jax.jit(model.init)(jax.random.key(0), image)
  sites = ur.find_sites(model.apply, dense, image)
  return model, {
    'dense': dense,
    **{
      f'{f:.0%} {form or ""}'.rstrip(): factorized(dense, sites, f, form)
      for f in fractions
      for form in forms
    },
  }


def random_images(batch, pixels):
  return jax.random.normal(jax.random.key(2), (batch, pixels, pixels, 3))


def parse(batches, repeats):
  """The options of both benchmarks that run these networks."""
  parser = argparse.ArgumentParser()
  parser.add_argument('--out')
  parser.add_argument('--repeats', type=int, default=repeats)
  parser.add_argument('--batches', type=int, nargs='*', default=batches)
  parser.add_argument('--variant', default='B/16')
  parser.add_argument('--pixels', type=int, default=224)
  return parser.parse_args()


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
  args = parse(batches=[1, 8, 64], repeats=5)
  model, trees = networks(args.variant, args.pixels, (0.5, 0.25), gauge.GAUGES)
  fn = ur.low_rank(model.apply)
  rows = []
  for batch in args.batches:
    images = random_images(batch, args.pixels)
    cost = {k: cost.forward_flops(fn, v, images) for k, v in trees.items()}
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
  record.write(args.out, record.command('latency'), result)


if __name__ == '__main__':
  main()

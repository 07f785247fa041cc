"""Published sizes of ViT with random weights, dense and factorized."""

from __future__ import annotations

import argparse
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.shared import arguments
import utilized_rank as ur
from utilized_rank.lowrank.leaf import LowRank
from utilized_rank.models.vit import VARIANTS
from utilized_rank.models.vit import ViT
from utilized_rank.products import gauge
from utilized_rank.tree.paths import flatten
from utilized_rank.tree.paths import unflatten

# Ranks that are multiples of it waste no part of a tile.
_TILE = 64


def parser(doc: str | None, repeats: int) -> argparse.ArgumentParser:
  """`arguments.parser` with a size of network and of images."""
  made = arguments.parser(doc, repeats=repeats)
  made.add_argument('--variant', default='B/16', choices=sorted(VARIANTS))
  made.add_argument('--pixels', type=int, default=224)
  return made


def random_vit(variant: str, pixels: int, **sizes: Any) -> tuple[ViT, Any]:
  """A ViT of 1,000 classes and its parameters; `sizes` replace published."""
  model = ViT(num_classes=1000, **{**VARIANTS[variant], **sizes})
  image = jnp.zeros((1, pixels, pixels, 3))
  return model, jax.jit(model.init)(jax.random.key(0), image)


def random_images(batch: int, pixels: int) -> jax.Array:
  return jax.random.normal(jax.random.key(2), (batch, pixels, pixels, 3))


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


def trees(variant, pixels, fractions, forms=(None,)):
  """A ViT, and its parameters: 'dense', '50%', '50% identity' and so on."""
  model, dense = random_vit(variant, pixels)
  image = jax.ShapeDtypeStruct((1, pixels, pixels, 3), jnp.float32)
  sites = ur.find_sites(model.apply, dense, image)
  return model, {
    'dense': dense,
    **{
      f'{f:.0%} {form or ""}'.rstrip(): factorized(dense, sites, f, form)
      for f in fractions
      for form in forms
    },
  }

"""Equinox: an MLP as the module itself, a CNN as its array part."""

from __future__ import annotations

import equinox as eqx
from frameworks.case import Case, filled, normal, patches, rows
import jax
import jax.numpy as jnp


def mlp() -> Case:
  """The tree's leaves include functions, numbers and flags."""
  model = filled(
    eqx.filter_eval_shape(
      eqx.nn.MLP, 6, 5, 10, 2, jax.nn.gelu, key=jax.random.key(0)
    )
  )
  x = normal(24, 6)
  kernels = {
    'layers/0/weight': (6, 10),
    'layers/1/weight': (10, 10),
    'layers/2/weight': (10, 5),
  }

  def inputs():
    seen, y = {}, x
    for i, layer in enumerate(model.layers):
      seen[f'layers/{i}/weight'] = rows(y, y.shape[-1])
      y = jax.nn.gelu(jax.vmap(layer)(y))
    return seen

  return Case(
    lambda model, x: jax.vmap(model)(x), model, x, kernels, inputs
  )


class CNN(eqx.Module):
  """Images (C, H, W), one at a time, as Equinox has them."""

  layers: list

  def __init__(self, key):
    keys = jax.random.split(key, 3)
    self.layers = [
      eqx.nn.Conv2d(2, 4, 3, padding=1, key=keys[0]),
      jax.nn.relu,
      eqx.nn.MaxPool2d(2, 2),
      eqx.nn.Conv2d(4, 6, (2, 3), stride=2, key=keys[1]),
      jnp.ravel,
      eqx.nn.Dropout(0.1, inference=True),
      eqx.nn.Linear(24, 5, key=keys[2]),
    ]

  def __call__(self, x):
    for layer in self.layers:
      x = layer(x)
    return x


def cnn() -> Case:
  model = filled(eqx.filter_eval_shape(CNN, jax.random.key(0)))
  params, static = eqx.partition(model, eqx.is_inexact_array)
  images = normal(32, 2, 10, 10)
  kernels = {
    'layers/0/weight': (18, 4),
    'layers/3/weight': (24, 6),
    'layers/6/weight': (24, 5),
  }

  def fn(params, images):
    return jax.vmap(eqx.combine(params, static))(images)

  def inputs():
    seen, y = {}, images
    for i, layer in enumerate(model.layers):
      if isinstance(layer, eqx.nn.Conv2d):
        seen[f'layers/{i}/weight'] = patches(
          jnp.moveaxis(y, 1, -1), layer.kernel_size, layer.stride,
          layer.padding, channels_first=True,
        )  # fmt: skip
      elif isinstance(layer, eqx.nn.Linear):
        seen[f'layers/{i}/weight'] = rows(y, y.shape[-1])
      y = jax.vmap(layer)(y)
    return seen

  return Case(fn, params, images, kernels, inputs)

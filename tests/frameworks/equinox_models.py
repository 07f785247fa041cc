"""Equinox: modules as they are, and a CNN as its array part."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp

from frameworks.case import Case
from frameworks.case import filled
from frameworks.case import normal
from frameworks.case import patches
from frameworks.case import rows


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

  return Case(lambda model, x: jax.vmap(model)(x), model, x, kernels, inputs)


class Attention(eqx.Module):
  """Attention pooled by a GRU, over one sequence (S, D)."""

  norm: eqx.nn.LayerNorm
  attention: eqx.nn.MultiheadAttention
  cell: eqx.nn.GRUCell

  def __init__(self, key):
    keys = jax.random.split(key)
    self.norm = eqx.nn.LayerNorm(6)
    self.attention = eqx.nn.MultiheadAttention(
      2, 6, dropout_p=0.1, inference=True, key=keys[0]
    )
    self.cell = eqx.nn.GRUCell(6, 4, key=keys[1])

  def __call__(self, x):
    y = jax.vmap(self.norm)(x)
    y = self.attention(y, y, y)

    def step(state, features):
      return self.cell(features, state), state

    return jax.lax.scan(step, jnp.zeros(4), y)


def attention() -> Case:
  """Dropout's rate and flag are numbers among the module's leaves."""
  model = filled(eqx.filter_eval_shape(Attention, jax.random.key(0)))
  x = normal(8, 5, 6)
  kernels = {
    f'attention/{name}_proj/weight': (6, 6)
    for name in ('query', 'key', 'value', 'output')
  }
  kernels |= {'cell/weight_ih': (6, 12), 'cell/weight_hh': (4, 12)}

  def inputs():
    y = jax.vmap(jax.vmap(model.norm))(x)
    seen = {path: rows(y, 6) for path in list(kernels)[:3]}
    attended = jax.vmap(lambda y: model.attention(y, y, y))(y)
    _, states = jax.vmap(model)(x)
    # The attended values, before the layer that this kernel is of.
    identity = eqx.tree_at(
      lambda a: a.output_proj.weight, model.attention, jnp.eye(6)
    )
    mixed = jax.vmap(lambda y: identity(y, y, y))(y)
    seen['attention/output_proj/weight'] = rows(mixed, 6)
    seen['cell/weight_ih'] = rows(attended, 6)
    seen['cell/weight_hh'] = rows(states, 4)
    return seen

  return Case(lambda model, x: jax.vmap(model)(x), model, x, kernels, inputs)


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

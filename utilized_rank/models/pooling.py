"""From the tokens of a vision transformer to one vector."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from utilized_rank.host.extras import extra
from utilized_rank.models import transformer_parts

with extra('models'):
  import flax.linen as nn

Array = jax.Array

POOLS = ('token', 'gap', 'all', 'token_and_gap', 'map', 'map_all', 'none')


def pooled(x: Array, pool: str, patches: int) -> Array:
  """`(B, N, D)` to `(B, D)`; `MapHead` does it for `'map'`.

  Args:
    x: tokens, the patches last.
    pool: `'token'` reads the first token, `'gap'` averages the patches,
      `'all'` all tokens, `'token_and_gap'` puts the first two side by side,
      `'none'` leaves `(B, N, D)`.
    patches: how many there are.

  >>> x = jnp.arange(6.0).reshape(1, 3, 2)
  >>> pooled(x, 'gap', 2).tolist(), pooled(x, 'token', 2).tolist()
  ([[3.0, 4.0]], [[0.0, 1.0]])
  """
  mean = x[:, -patches:].mean(axis=1)
  if pool == 'gap':
    return mean
  if pool == 'all':
    return x.mean(axis=1)
  if pool == 'token_and_gap':
    return jnp.concatenate([x[:, 0], mean], axis=-1)
  return x if pool == 'none' else x[:, 0]


class MapHead(nn.Module):
  """Attention of a learned token to all, and an MLP: `(B, N, D)` to `(B, D)`.

  In the tree of big_vision, which has it of https://arxiv.org/abs/1810.00825.
  """

  options: transformer_parts.BlockOptions

  @nn.compact
  def __call__(self, x: Array) -> Array:
    o = dataclasses.replace(self.options, layer_scale=None, rotation=None)
    width = x.shape[-1]
    probe = self.param('probe', nn.initializers.xavier_uniform(), (1, 1, width))
    probe = jnp.broadcast_to(probe.astype(x.dtype), (x.shape[0], 1, width))
    y = CrossAttention(o, name='MultiHeadDotProductAttention_0')(probe, x)
    norm = transformer_parts.make_norm(o, 'LayerNorm_0')
    mlp = transformer_parts.MlpBlock(o, True, name='MlpBlock_0')
    return (y + mlp(norm(y)))[:, 0]


class CrossAttention(nn.Module):
  """Attention of `(B, T, D)` to `(B, N, D)`, with the tree of Flax's own."""

  options: transformer_parts.BlockOptions

  @nn.compact
  def __call__(self, x: Array, seen: Array) -> Array:
    o = self.options
    width = x.shape[-1]
    sizes = (o.heads, width // o.heads)
    dense = lambda name: nn.DenseGeneral(sizes, dtype=o.dtype, name=name)
    q, k, v = dense('query')(x), dense('key')(seen), dense('value')(seen)
    y = transformer_parts.attend(q, k, v)
    return nn.DenseGeneral(width, axis=(-2, -1), dtype=o.dtype, name='out')(y)

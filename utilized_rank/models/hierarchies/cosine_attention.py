"""Attention of the second Swin Transformer, as a Flax Linen module.

Liu et al., "Swin Transformer V2: Scaling Up Capacity and Resolution",
https://arxiv.org/abs/2111.09883, section 3: scores are cosines, and a small
network says from the logarithm of how far two patches are apart what is added.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from utilized_rank.host.extras import extra
from utilized_rank.models.transformer_parts import BlockOptions
from utilized_rank.models.transformer_parts import attend
from utilized_rank.models.transformer_parts import into_heads
from utilized_rank.models.transformer_parts import out_of_heads

with extra('models'):
  import flax.linen as nn

Array = jax.Array

# What learnt scales are clamped at, and the most that positions add.
_MOST_SCALE = math.log(100.0)
_MOST_BIAS = 16.0


@dataclasses.dataclass(frozen=True)
class CosineOptions:
  """What is said of cosine attention beside `BlockOptions`.

  Attributes:
    trained_window: side of the windows in pretraining, by which offsets are
      divided; 0 for that of the windows themselves.
    position_dim: hidden width of the network on offsets.
    masked: what is added to scores of patches from opposite sides. Scores reach
      116, so that a number which is not low enough shows.
  """

  trained_window: int = 0
  position_dim: int = 512
  masked: float = -100.0


class CosineAttention(nn.Module):
  """Self-attention on windows `(B, N, D)`, their sides `options.grid`.

  `seen` are booleans that grow to `(B, heads, N, N)`, or None.
  """

  options: BlockOptions
  cosine: CosineOptions

  @nn.compact
  def __call__(self, x: Array, seen: Array | None = None) -> Array:
    o = self.options
    width = x.shape[-1]
    project = functools.partial(into_heads, o, width)
    q = _unit(project(use_bias=o.qkv_bias, name='query')(x))
    k = _unit(project(use_bias=bool(o.key_bias), name='key')(x))
    v = project(use_bias=o.qkv_bias, name='value')(x)
    scale = self.param(
      'logit_scale', nn.initializers.constant(math.log(10.0)), (o.heads,)
    )
    scale = jnp.exp(jnp.minimum(scale, _MOST_SCALE))[:, None]
    assert o.grid is not None
    bias = ContinuousPositions(
      o.grid[0], o.heads, self.cosine, o.dtype, name='positions'
    )()
    if seen is not None:
      bias = bias + jnp.where(seen, 0.0, self.cosine.masked)
    y = attend(q * scale.astype(q.dtype), k, v, scale=1.0, bias=bias)
    return out_of_heads(o, width)(y)


class ContinuousPositions(nn.Module):
  """What a small network says of every two places of a window.

  Attributes:
    window: side of the window.
    heads: attention heads.
    cosine: how offsets are scaled, and how wide the network is.
    dtype: type of the computation.
  """

  window: int
  heads: int
  cosine: CosineOptions
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self) -> Array:
    """`(heads, window², window²)` between 0 and 16."""
    trained = self.cosine.trained_window or self.window
    x = jnp.asarray(log_offsets(self.window, trained), self.dtype)
    x = nn.Dense(self.cosine.position_dim, dtype=self.dtype, name='hidden')(x)
    x = nn.Dense(self.heads, use_bias=False, dtype=self.dtype, name='out')(
      nn.relu(x)
    )
    at = np.indices((self.window, self.window)).reshape(2, -1)
    away = at[:, :, None] - at[:, None] + self.window - 1
    table = _MOST_BIAS * nn.sigmoid(x.astype(jnp.float32))
    return table[away[0] * (2 * self.window - 1) + away[1]].transpose(2, 0, 1)


def log_offsets(window: int, trained: int) -> np.ndarray:
  """Offsets of two patches, `((2 window - 1)², 2)`, rows before columns.

  The largest of `trained` is log(9) / log(8), as the published code has it.

  >>> [round(v, 3) for v in log_offsets(2, 2)[:3, 1].tolist()]
  [-1.057, 0.0, 1.057]
  """
  steps = np.arange(1.0 - window, window) * 8 / max(trained - 1, 1)
  steps = np.sign(steps) * np.log2(abs(steps) + 1) / np.log2(8)
  rows, columns = np.meshgrid(steps, steps, indexing='ij')
  return np.stack([rows, columns], -1).reshape(-1, 2).astype(np.float32)


def _unit(x: Array) -> Array:
  """Of length one; those of length zero stay."""
  length = jnp.sqrt((x.astype(jnp.float32) ** 2).sum(-1, keepdims=True))
  return (x / jnp.maximum(length, 1e-12)).astype(x.dtype)

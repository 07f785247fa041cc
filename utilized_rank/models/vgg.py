"""VGG networks (Simonyan, Zisserman, https://arxiv.org/abs/1409.1556)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from utilized_rank.host.extras import extra
from utilized_rank.models.batch_norm import conv_norm

with extra('models'):
  import flax.linen as nn

Array = jax.Array


def _stages(*depths: int) -> dict[str, tuple[tuple[int, ...], ...]]:
  widths = (64, 128, 256, 512, 512)
  return {
    'stages': tuple((w,) * n for w, n in zip(widths, depths, strict=True))
  }


# `VGG(num_classes=1000, **VARIANTS['16'])`.
VARIANTS = {
  '11': _stages(1, 1, 2, 2, 2),
  '16': _stages(2, 2, 3, 3, 3),
  '19': _stages(2, 2, 4, 4, 4),
}


class VGG(nn.Module):
  """Images `(B, H, W, C)` to float32 logits `(B, num_classes)`.

  >>> import jax, jax.numpy as jnp
  >>> model = VGG(10, stages=((4,), (8, 8)), hidden=(), pool_size=1)
  >>> x = jnp.zeros((2, 8, 8, 3))
  >>> init = model.init_with_output
  >>> jax.eval_shape(init, jax.random.key(0), x)[0].shape
  (2, 10)

  Attributes:
    num_classes: width of the head.
    stages: widths of the 3x3 convolutions of each stage, which ends with a
      2x2 max pooling.
    hidden: widths of the dense layers before the head.
    pool_size: side to which the last images are averaged.
    batch_norm: norms after the convolutions; False also for variables from
      `fold_batch_norm`.
    dropout: rate after the hidden dense layers.
    dtype: type of the computation.
  """

  num_classes: int
  stages: Sequence[Sequence[int]]
  hidden: Sequence[int] = (4096, 4096)
  pool_size: int = 7
  batch_norm: bool = False
  dropout: float = 0.0
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, *, train: bool = False) -> Array:
    number = 0
    for widths in self.stages:
      for width in widths:
        x = conv_norm(
          x,
          width,
          3,
          str(number),
          batch_norm=self.batch_norm,
          train=train,
          dtype=self.dtype,
          use_bias=True,
        )
        x, number = nn.relu(x), number + 1
      x = nn.max_pool(x, (2, 2), (2, 2))
    x = _adaptive_mean(x, self.pool_size).reshape(x.shape[0], -1)
    for i, width in enumerate(self.hidden):
      x = nn.relu(nn.Dense(width, dtype=self.dtype, name=f'fc{i}')(x))
      x = nn.Dropout(self.dropout, deterministic=not train)(x)
    return nn.Dense(self.num_classes, dtype=self.dtype, name='head')(x).astype(
      jnp.float32
    )


def _adaptive_mean(x: Array, size: int) -> Array:
  """Averages over a `size` x `size` grid of windows that may overlap."""
  if x.shape[1:3] == (size, size):
    return x
  rows, columns = (_windows(n, size).astype(x.dtype) for n in x.shape[1:3])
  return jnp.einsum('ri,cj,bijd->brcd', rows, columns, x)


def _windows(old: int, new: int) -> np.ndarray:
  # The windows of torch.nn.AdaptiveAvgPool2d.
  i = np.arange(new)[:, None]
  inside = np.arange(old)
  window = (inside >= i * old // new) & (inside < -(-(i + 1) * old // new))
  return window / window.sum(axis=1, keepdims=True)

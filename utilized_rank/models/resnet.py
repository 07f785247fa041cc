"""Residual networks (He et al., https://arxiv.org/abs/1512.03385).

In their common form: the stride of a bottleneck is in its 3x3 convolution
("v1.5"), as in torchvision and timm.
"""

from __future__ import annotations

from collections.abc import Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp

from utilized_rank.host.extras import extra
from utilized_rank.models.batch_norm import conv_norm
from utilized_rank.models.transformer_parts import ACTIVATIONS

with extra('models'):
  import flax.linen as nn

Array = jax.Array

_CIFAR = {'width': 16, 'small_images': True, 'shortcut': 'pad'}

# `ResNet(num_classes=1000, **VARIANTS['50'])`; 20 and 56 are those for CIFAR.
VARIANTS: dict[str, dict[str, Any]] = {
  '18': {'stages': (2, 2, 2, 2)},
  '34': {'stages': (3, 4, 6, 3)},
  '50': {'stages': (3, 4, 6, 3), 'bottleneck': True},
  '20': {'stages': (3, 3, 3), **_CIFAR},
  '56': {'stages': (9, 9, 9), **_CIFAR},
}
_SHORTCUTS = ('norm', 'conv', 'pad')
_BLURS = (None, 'average', 'binomial')


class ResNet(nn.Module):
  """Images `(B, H, W, C)` to float32 logits `(B, num_classes)`.

  >>> import jax, jax.numpy as jnp
  >>> model = ResNet(10, stages=(1, 1), width=4, small_images=True)
  >>> x = jnp.zeros((2, 8, 8, 3))
  >>> init = model.init_with_output
  >>> jax.eval_shape(init, jax.random.key(0), x)[0].shape
  (2, 10)

  Attributes:
    num_classes: width of the head.
    stages: blocks at each resolution; the width doubles from one to the next.
    width: of the first stage.
    bottleneck: blocks of 1x1, 3x3, 1x1 that are four times as wide outside.
    small_images: a 3x3 stem in place of 7x7, stride 2 and a pooling.
    shortcut: where the shape changes: `'norm'` (1x1 convolution and norm),
      `'conv'` (1x1 with a bias), or `'pad'` (every second pixel and channels of
      zeros, option A).
    padding: of convolutions: `'symmetric'` or `'SAME'`, see `conv_norm`.
    batch_norm: False for variables from `fold_batch_norm`.
    dtype: type of the computation.
    activation: a key of `transformer_parts.ACTIVATIONS`.
    blur: what 3x3 convolutions of stride 2 are followed by in place of the
      stride: None, `'average'` or `'binomial'`
      (https://arxiv.org/abs/1904.11486).

  Raises (when called):
    ValueError: `shortcut` or `blur` has no such value.
  """

  num_classes: int
  stages: Sequence[int]
  width: int = 64
  bottleneck: bool = False
  small_images: bool = False
  shortcut: str = 'norm'
  padding: str = 'symmetric'
  batch_norm: bool = True
  dtype: Any = jnp.float32
  activation: str = 'relu'
  blur: str | None = None

  @nn.compact
  def __call__(self, x: Array, *, train: bool = False) -> Array:
    if self.blur not in _BLURS:
      raise ValueError(f'blur={self.blur!r}; it is one of {_BLURS}.')
    if self.shortcut not in _SHORTCUTS:
      raise ValueError(
        f'shortcut={self.shortcut!r}; it is one of {_SHORTCUTS}.'
      )
    layer = functools.partial(
      conv_norm,
      batch_norm=self.batch_norm,
      train=train,
      dtype=self.dtype,
      padding=self.padding,
    )
    size, stride = (3, 1) if self.small_images else (7, 2)
    activation = ACTIVATIONS[self.activation]
    x = activation(layer(x, self.width, size, '1', stride=stride))
    if not self.small_images:
      x = _max_pool(x, self.blur)
    for i, blocks in enumerate(self.stages):
      for j in range(blocks):
        x = ResNetBlock(
          self.width * 2**i,
          2 if i and not j else 1,
          self.bottleneck,
          self.shortcut,
          layer,
          activation,
          self.blur,
          name=f'layer{i + 1}_{j}',
        )(x)
    x = x.mean(axis=(1, 2))
    return nn.Dense(self.num_classes, dtype=self.dtype, name='head')(x).astype(
      jnp.float32
    )


class ResNetBlock(nn.Module):
  """One block; `layer` is `conv_norm` with the network's options."""

  width: int
  stride: int
  bottleneck: bool
  shortcut: str
  layer: Any
  activation: Any
  blur: str | None

  @nn.compact
  def __call__(self, x: Array) -> Array:
    features = 4 * self.width if self.bottleneck else self.width
    if self.bottleneck:
      y = self.activation(self.layer(x, self.width, 1, '1'))
      y = self.layer(self._strided(y, '2'), features, 1, '3')
    else:
      y = self.layer(self._strided(x, '1'), features, 3, '2')
    if self.stride > 1 or x.shape[-1] != features:
      x = self._shortcut(x, features)
    return self.activation(x + y)

  def _strided(self, x: Array, name: str) -> Array:
    blurs = self.blur is not None and self.stride > 1
    stride = 1 if blurs else self.stride
    x = self.activation(self.layer(x, self.width, 3, name, stride=stride))
    return _halved(x, self.blur) if blurs else x

  def _shortcut(self, x: Array, features: int) -> Array:
    if self.shortcut == 'pad':
      more = features - x.shape[-1]
      x = x[:, :: self.stride, :: self.stride]
      return jnp.pad(x, ((0, 0),) * 3 + ((more // 2, more - more // 2),))
    options = {'batch_norm': False} if self.shortcut == 'conv' else {}
    return self.layer(
      x, features, 1, '_shortcut', stride=self.stride, **options
    )


def _halved(x: Array, blur: str | None) -> Array:
  """Every second pixel of what is averaged over its neighbours."""
  if blur == 'average':
    return nn.avg_pool(x, (2, 2), (2, 2))
  x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode='reflect')
  for _ in range(2):  # 1 2 1 is 1 1 twice
    x = nn.avg_pool(x, (2, 2))
  return x[:, ::2, ::2]


def _max_pool(x: Array, blur: str | None) -> Array:
  if blur == 'average':
    return _halved(x, blur)
  stride = (2, 2) if blur is None else (1, 1)
  x = nn.max_pool(x, (3, 3), stride, ((1, 1), (1, 1)))
  return x if blur is None else _halved(x, blur)

"""EfficientNet and its kin (Lite, V2, EdgeTPU, MobileNetV2 and V3), in Linen.

Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural
Networks", https://arxiv.org/abs/1905.11946; Sandler et al., "MobileNetV2",
https://arxiv.org/abs/1801.04381; Howard et al., "Searching for MobileNetV3",
https://arxiv.org/abs/1905.02244. They differ in what their blocks have of four
parts, and in options; those here are timm's.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from utilized_rank.host.extras import extra
from utilized_rank.models.batch_norm import conv_norm
from utilized_rank.models.hierarchies.resolutions import check_lengths
from utilized_rank.models.transformer_parts import ACTIVATIONS

with extra('models'):
  import flax.linen as nn

Array = jax.Array

GATES = {'sigmoid': nn.sigmoid, 'hard_sigmoid': nn.hard_sigmoid}
PADDINGS = ('symmetric', 'SAME')


@dataclasses.dataclass(frozen=True)
class Parts:
  """What a block has, in the order of computation; None for no such part.

  Attributes:
    expand: channels of the first convolution.
    expand_size: its side; 1 but in blocks without a depthwise convolution.
    depthwise_size: side of the depthwise convolution.
    squeeze: channels of the squeeze-and-excitation
      (https://arxiv.org/abs/1709.01507).
    project: channels of the last convolution, which no activation follows.
    project_size: its side.
  """

  expand: int | None = None
  expand_size: int = 1
  depthwise_size: int | None = None
  squeeze: int | None = None
  project: int | None = None
  project_size: int = 1


def scaled(width: float, depth: float, *, lite: bool = False) -> dict[str, Any]:
  """Options of an EfficientNet, scaled from B0.

  The Lite models have no squeeze-and-excitation, and neither stem nor head nor
  the first and the last stage grow.

  >>> scaled(1.1, 1.2, lite=True)['stem_width']
  32
  >>> [len(stage) for stage in scaled(1.1, 1.2)['stages']]
  [2, 3, 3, 4, 4, 5, 2]

  Args:
    width: factor of all channels.
    depth: factor of the blocks of each stage.
    lite: of the Lite models.

  Returns:
    `stem_width`, `stages`, `head_width`, and what is not the default.
  """
  widths = (16, 24, 40, 80, 112, 192, 320)
  depths = (1, 2, 2, 3, 3, 4, 1)
  sizes = (3, 3, 5, 3, 5, 5, 3)
  fixed = (0, len(widths) - 1) if lite else ()
  stem = 32 if lite else _rounded(32 * width)
  before, stages = stem, []
  for i, size in enumerate(sizes):
    after, blocks = _rounded(widths[i] * width), []
    for _ in range(depths[i] if i in fixed else math.ceil(depths[i] * depth)):
      parts = Parts(
        expand=6 * before if i else None,
        depthwise_size=size,
        squeeze=None if lite else max(1, before // 4),
        project=after,
      )
      blocks.append(parts)
      before = after
    stages.append(tuple(blocks))
  head = 1280 if lite else _rounded(1280 * width)
  options = {'activation': 'relu6' if lite else 'silu'}
  return {
    'stem_width': stem,
    'stages': tuple(stages),
    'head_width': head,
    **options,
  }


def _rounded(width: float) -> int:
  """To a multiple of 8 that is no more than a tenth less."""
  near = max(8, int(width + 4) // 8 * 8)
  return near + 8 if near < 0.9 * width else near


# `EfficientNet(num_classes=1000, **VARIANTS['B0'])`.
VARIANTS: dict[str, dict[str, Any]] = {
  'B0': scaled(1.0, 1.0),
  'B1': scaled(1.0, 1.1),
  'B4': scaled(1.4, 1.8),
  'Lite0': scaled(1.0, 1.0, lite=True),
  'Lite4': scaled(1.4, 1.8, lite=True),
}


class EfficientNet(nn.Module):
  """Images `(B, H, W, C)` to float32 logits `(B, num_classes)`.

  >>> import jax, jax.numpy as jnp
  >>> block = Parts(expand=8, depthwise_size=3, squeeze=2, project=6)
  >>> model = EfficientNet(10, 4, [[block], [block]], 12, strides=(1, 2))
  >>> x = jnp.zeros((2, 16, 16, 3))
  >>> init = model.init_with_output
  >>> jax.eval_shape(init, jax.random.key(0), x)[0].shape
  (2, 10)

  Attributes:
    num_classes: width of the head; 0 for none: features.
    stem_width: channels of the first convolution, whose stride is 2.
    stages: blocks at each resolution.
    head_width: channels of a last 1x1 convolution, or None for none.
    strides: of the first block of each stage.
    stem_size: side of the first convolution.
    pool_before_head: the last convolution is a dense layer behind the pooling,
      without a norm, as in MobileNetV3.
    head_bias: that layer has a bias.
    activation: a key of `transformer_parts.ACTIVATIONS`.
    stage_activations: one for each stage where they differ, or None.
    squeeze_activation: between the layers of a squeeze-and-excitation, or None
      for that of the block.
    gate: at its end, a key of `GATES`.
    without_shortcut: numbers of stages in which there is none.
    separable_activation: blocks without an expansion have an activation at
      their end and no shortcut, as in MobileNetV1.
    blur: a stride is a binomial blur behind the activation
      (https://arxiv.org/abs/1904.11486).
    padding: of convolutions, one of `PADDINGS`: that of PyTorch or that of
      TensorFlow, which differ where the stride is 2.
    epsilon: of the norms.
    batch_norm: False for variables from `fold_batch_norm`.
    dtype: type of the computation.

  Raises (when called):
    ValueError: an option has no such value, or `stages`, `strides` and
      `stage_activations` are not as long as each other.
  """

  num_classes: int
  stem_width: int
  stages: Sequence[Sequence[Parts]]
  head_width: int | None
  strides: Sequence[int] = (1, 2, 2, 2, 1, 2, 1)
  stem_size: int = 3
  pool_before_head: bool = False
  head_bias: bool = True
  activation: str = 'silu'
  stage_activations: Sequence[str] | None = None
  squeeze_activation: str | None = None
  gate: str = 'sigmoid'
  without_shortcut: Sequence[int] = ()
  separable_activation: bool = False
  blur: bool = False
  padding: str = 'symmetric'
  epsilon: float = 1e-3
  batch_norm: bool = True
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, *, train: bool = False) -> Array:
    activations = self.stage_activations or (self.activation,) * len(
      self.stages
    )
    self._check(activations)
    check_lengths(
      stages=self.stages, strides=self.strides, stage_activations=activations
    )
    layer = functools.partial(
      conv_norm,
      batch_norm=self.batch_norm,
      train=train,
      dtype=self.dtype,
      padding=self.padding,
      epsilon=self.epsilon,
    )
    activation = ACTIVATIONS[self.activation]
    x = activation(layer(x, self.stem_width, self.stem_size, '_stem', stride=2))
    for i, blocks in enumerate(self.stages):
      squeezed = self.squeeze_activation or activations[i]
      for j, parts in enumerate(blocks):
        x = MBConv(
          parts,
          1 if j else self.strides[i],
          layer,
          ACTIVATIONS[activations[i]],
          ACTIVATIONS[squeezed],
          GATES[self.gate],
          i not in self.without_shortcut,
          self.separable_activation,
          self.blur,
          self.dtype,
          name=f'stage{i}_{j}',
        )(x)
    if self.head_width and not self.pool_before_head:
      x = activation(layer(x, self.head_width, 1, '_head'))
    x = x.mean(axis=(1, 2))
    if self.head_width and self.pool_before_head:
      x = nn.Dense(
        self.head_width,
        use_bias=self.head_bias,
        dtype=self.dtype,
        name='pre_logits',
      )(x)
      x = activation(x)
    if self.num_classes:
      x = nn.Dense(self.num_classes, dtype=self.dtype, name='head')(x)
    return x.astype(jnp.float32)

  def _check(self, activations: Sequence[str]) -> None:
    for option, value, known in (
      ('activation', self.activation, ACTIVATIONS),
      *(('stage_activations', value, ACTIVATIONS) for value in activations),
      ('squeeze_activation', self.squeeze_activation, {None, *ACTIVATIONS}),
      ('gate', self.gate, GATES),
      ('padding', self.padding, PADDINGS),
    ):
      if value not in known:
        raise ValueError(
          f'{option}: {value!r} is none of {sorted(known, key=str)}.'
        )


class MBConv(nn.Module):
  """One block; `layer` is `conv_norm` with the network's options."""

  parts: Parts
  stride: int
  layer: Any
  activation: Any
  squeeze_activation: Any
  gate: Any
  shortcut: bool
  separable_activation: bool
  blur: bool
  dtype: Any

  @nn.compact
  def __call__(self, x: Array) -> Array:
    p, y = self.parts, x
    blurs = self.blur and self.stride > 1
    stride = 1 if blurs else self.stride
    if p.expand:
      first = 1 if p.depthwise_size else stride
      y = self.layer(y, p.expand, p.expand_size, '_expand', stride=first)
      y = self.activation(y)
    if p.depthwise_size:
      width = y.shape[-1]
      y = self.layer(
        y, width, p.depthwise_size, '_depthwise', stride=stride, groups=width
      )
      y = self.activation(y)
    if blurs:
      y = _blurred(y)
    if p.squeeze:
      z = nn.Dense(p.squeeze, dtype=self.dtype, name='squeeze')(y.mean((1, 2)))
      z = self.squeeze_activation(z)
      z = self.gate(nn.Dense(y.shape[-1], dtype=self.dtype, name='excite')(z))
      y = y * z[:, None, None]
    if p.project:
      y = self.layer(y, p.project, p.project_size, '_project')
    if self.separable_activation and not p.expand:
      return self.activation(y)
    adds = self.shortcut and self.stride == 1 and x.shape == y.shape
    return x + y if adds else y


def _blurred(x: Array) -> Array:
  """Every second pixel of a 1 2 1 average, zeros beyond the edge."""
  x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  for _ in range(2):  # 1 2 1 is 1 1 twice
    x = nn.avg_pool(x, (2, 2))
  return x[:, ::2, ::2]

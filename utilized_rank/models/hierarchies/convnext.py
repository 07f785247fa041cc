"""ConvNeXt and ConvNeXt V2, as Flax Linen modules.

Liu et al., "A ConvNet for the 2020s", https://arxiv.org/abs/2201.03545; Woo et
al., "ConvNeXt V2", https://arxiv.org/abs/2301.00808, which has a global
response norm in place of the layer scale. The options are timm's variants.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from utilized_rank.host.extras import extra
from utilized_rank.models.hierarchies.resolutions import check_lengths
from utilized_rank.models.transformer_parts import ACTIVATIONS
from utilized_rank.models.transformer_parts import LayerScale

with extra('models'):
  import flax.linen as nn

Array = jax.Array

_V2: dict[str, Any] = {'layer_scale': None, 'response_norm': True}

# `ConvNeXt(num_classes=1000, **VARIANTS['T'])`.
VARIANTS: dict[str, dict[str, Any]] = {
  'T': {'depths': (3, 3, 9, 3), 'widths': (96, 192, 384, 768)},
  'S': {'depths': (3, 3, 27, 3), 'widths': (96, 192, 384, 768)},
  'B': {'depths': (3, 3, 27, 3), 'widths': (128, 256, 512, 1024)},
  'L': {'depths': (3, 3, 27, 3), 'widths': (192, 384, 768, 1536)},
  'V2-A': {'depths': (2, 2, 6, 2), 'widths': (40, 80, 160, 320), **_V2},
  'V2-T': {'depths': (3, 3, 9, 3), 'widths': (96, 192, 384, 768), **_V2},
  'V2-B': {'depths': (3, 3, 27, 3), 'widths': (128, 256, 512, 1024), **_V2},
}
STEMS = ('patch', 'overlap', 'overlap_act')
_NORMS = {'layer': nn.LayerNorm, 'rms': nn.RMSNorm}


class ConvNeXt(nn.Module):
  """Images `(B, H, W, C)` to float32 logits `(B, num_classes)`.

  H and W may be anything; what does not fill a patch, or two pixels of a
  stage, is left out.

  >>> import jax, jax.numpy as jnp
  >>> model = ConvNeXt(10, depths=(1, 1), widths=(4, 8))
  >>> x = jnp.zeros((2, 16, 16, 3))
  >>> init = model.init_with_output
  >>> jax.eval_shape(init, jax.random.key(0), x)[0].shape
  (2, 10)

  Attributes:
    num_classes: width of the head; 0 for none: features `(B, widths[-1])`.
    depths: blocks at each resolution.
    widths: channels at each resolution.
    patch_size: side of the stem's patches; of no meaning for other stems.
    stem: one of `STEMS`: `'patch'`, or `'overlap'`: two 3x3 convolutions of
      stride 2, with `'overlap_act'` an activation between them.
    stem_width: channels between these two.
    kernel_sizes: sides of the depthwise convolutions at each resolution, or one
      for all.
    mlp_dims: hidden widths of the blocks' MLPs, one for each resolution, or
      None for four times `widths`.
    layer_scale: what the scales of the residual branches start from, or None
      for no scales.
    response_norm: the MLPs have the global response norm of V2.
    conv_bias: the convolutions have biases.
    norm: `'layer'`, or `'rms'` without mean and bias.
    norm_after_pool: the last norm comes after the pooling.
    representation_size: width of a layer with an activation before the head,
      or None.
    activation: a key of `transformer_parts.ACTIVATIONS`.
    epsilon: of the norms.
    last_epsilon: of the last norm, or None for as the others.
    dtype: type of the computation.

  Raises (when called):
    ValueError: `stem`, `norm` or `activation` has no such value, or `depths`,
      `widths`, `mlp_dims` and `kernel_sizes` are not as long as each other.
  """

  num_classes: int
  depths: Sequence[int]
  widths: Sequence[int]
  patch_size: int = 4
  stem: str = 'patch'
  stem_width: int | None = None
  kernel_sizes: int | Sequence[int] = 7
  mlp_dims: Sequence[int] | None = None
  layer_scale: float | None = 1e-6
  response_norm: bool = False
  conv_bias: bool = True
  norm: str = 'layer'
  norm_after_pool: bool = True
  representation_size: int | None = None
  activation: str = 'gelu'
  epsilon: float = 1e-6
  last_epsilon: float | None = None
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, *, train: bool = False) -> Array:
    del train  # nothing here is random, and no norm has statistics
    mlp_dims = self.mlp_dims or [4 * width for width in self.widths]
    sizes = self.kernel_sizes
    sizes = [sizes] * len(self.widths) if isinstance(sizes, int) else sizes
    self._check()
    check_lengths(
      depths=self.depths,
      widths=self.widths,
      mlp_dims=mlp_dims,
      kernel_sizes=sizes,
    )
    options = _BlockOptions(
      self.layer_scale,
      self.response_norm,
      self.conv_bias,
      ACTIVATIONS[self.activation],
      self._norm(self.epsilon),
      self.dtype,
    )
    norm = options.norm
    last = norm if self.last_epsilon is None else self._norm(self.last_epsilon)
    x = norm(name='stem_norm')(self._stem(x))
    for i, (depth, width) in enumerate(
      zip(self.depths, self.widths, strict=True)
    ):
      if i:
        x = norm(name=f'downsample{i}_norm')(x)
        x = self._conv(width, 2, 2, f'downsample{i}')(x)
      for j in range(depth):
        x = ConvNeXtBlock(options, mlp_dims[i], sizes[i], name=f'stage{i}_{j}')(
          x
        )
    if not self.norm_after_pool:
      x = last(name='norm')(x)
    x = x.mean(axis=(1, 2))
    if self.norm_after_pool:
      x = last(name='fc_norm')(x)
    if self.representation_size is not None:
      x = self._dense(self.representation_size, 'pre_logits')(x)
      x = ACTIVATIONS[self.activation](x)
    if self.num_classes:
      x = self._dense(self.num_classes, 'head')(x)
    return x.astype(jnp.float32)

  def _stem(self, x: Array) -> Array:
    width = self.widths[0]
    if self.stem == 'patch':
      size = self.patch_size
      return self._conv(width, size, size, 'stem')(x)
    x = self._conv(self.stem_width or width, 3, 2, 'stem')(x)
    if self.stem == 'overlap_act':
      x = ACTIVATIONS[self.activation](x)
    return self._conv(width, 3, 2, 'stem2')(x)

  def _conv(self, width: int, size: int, stride: int, name: str) -> nn.Module:
    return nn.Conv(
      width,
      (size, size),
      strides=(stride, stride),
      # Patches that touch each other have nothing around them.
      padding='VALID' if size == stride else size // 2,
      use_bias=self.conv_bias,
      dtype=self.dtype,
      name=name,
    )

  def _dense(self, width: int, name: str) -> nn.Module:
    return nn.Dense(width, dtype=self.dtype, name=name)

  def _norm(self, epsilon: float) -> Callable[..., nn.Module]:
    return functools.partial(
      _NORMS[self.norm], epsilon=epsilon, dtype=self.dtype
    )

  def _check(self) -> None:
    for option, known in (
      ('stem', STEMS),
      ('norm', sorted(_NORMS)),
      ('activation', sorted(ACTIVATIONS)),
    ):
      if (value := getattr(self, option)) not in known:
        raise ValueError(f'{option}={value!r}; it is one of {known}.')


@dataclasses.dataclass(frozen=True)
class _BlockOptions:
  """What the blocks of one network have in common; see `ConvNeXt`."""

  layer_scale: float | None
  response_norm: bool
  conv_bias: bool
  activation: Callable[[Array], Array]
  norm: Callable[..., nn.Module]
  dtype: Any


class ConvNeXtBlock(nn.Module):
  """Depthwise convolution, norm and MLP, added to `(B, H, W, D)`."""

  options: Any
  mlp_dim: int
  kernel_size: int

  @nn.compact
  def __call__(self, x: Array) -> Array:
    o, width = self.options, x.shape[-1]
    y = nn.Conv(
      width,
      (self.kernel_size, self.kernel_size),
      padding=self.kernel_size // 2,
      feature_group_count=width,
      use_bias=o.conv_bias,
      dtype=o.dtype,
      name='depthwise',
    )(x)
    y = o.norm(name='norm')(y)
    y = o.activation(nn.Dense(self.mlp_dim, dtype=o.dtype, name='Dense_0')(y))
    if o.response_norm:
      y = ResponseNorm(name='response_norm')(y)
    y = nn.Dense(width, dtype=o.dtype, name='Dense_1')(y)
    if o.layer_scale is not None:
      y = LayerScale(o.layer_scale, name='layer_scale')(y)
    return x + y


class ResponseNorm(nn.Module):
  """Global response norm of `(B, H, W, D)`: channels compete in an image.

  With g the norm of each channel over an image's pixels it adds
  `scale * x * g / (mean(g) + epsilon) + bias`
  (https://arxiv.org/abs/2301.00808, algorithm 1).
  """

  epsilon: float = 1e-6

  @nn.compact
  def __call__(self, x: Array) -> Array:
    width = x.shape[-1]
    scale = self.param('scale', nn.initializers.zeros, (width,))
    bias = self.param('bias', nn.initializers.zeros, (width,))
    # The sum over all pixels has no room in half precision.
    wide = x.astype(jnp.float32)
    size = (wide**2).sum(axis=(1, 2), keepdims=True)
    # The square root has no derivative at zero.
    size = jnp.sqrt(jnp.maximum(size, jnp.finfo(jnp.float32).tiny))
    size = size / (size.mean(axis=-1, keepdims=True) + self.epsilon)
    return x + (scale * wide * size + bias).astype(x.dtype)

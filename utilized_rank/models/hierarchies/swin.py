"""Swin Transformers, as Flax Linen modules.

Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted
Windows", https://arxiv.org/abs/2103.14030. Attention is within windows; in
every second block the windows are shifted by half of their side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from utilized_rank.host.extras import extra
from utilized_rank.models.hierarchies.resolutions import check_lengths
from utilized_rank.models.transformer_parts import Attention
from utilized_rank.models.transformer_parts import BlockOptions
from utilized_rank.models.transformer_parts import MlpBlock
from utilized_rank.models.transformer_parts import make_norm

with extra('models'):
  import flax.linen as nn

Array = jax.Array

_SEVEN = {'windows': (7, 7, 7, 7)}

# `Swin(num_classes=1000, **VARIANTS['T'])`, for images of 224 pixels.
VARIANTS: dict[str, dict[str, Any]] = {
  'T': {'width': 96, 'depths': (2, 2, 6, 2), 'heads': (3, 6, 12, 24), **_SEVEN},
  'S': {
    'width': 96,
    'depths': (2, 2, 18, 2),
    'heads': (3, 6, 12, 24),
    **_SEVEN,
  },
  'B': {
    'width': 128,
    'depths': (2, 2, 18, 2),
    'heads': (4, 8, 16, 32),
    **_SEVEN,
  },
}


class Swin(nn.Module):
  """Images `(B, H, W, C)` to float32 logits `(B, num_classes)`.

  At each next resolution there are half as many rows and columns of patches,
  and twice as many channels. Windows that cover the image are not shifted.

  >>> import jax, jax.numpy as jnp
  >>> model = Swin(10, width=8, depths=(2, 1), heads=(2, 4), windows=(2, 2))
  >>> x = jnp.zeros((2, 16, 16, 3))
  >>> init = model.init_with_output
  >>> jax.eval_shape(init, jax.random.key(0), x)[0].shape
  (2, 10)

  Attributes:
    num_classes: width of the head; 0 for none: features `(B, last width)`.
    width: channels at the first resolution.
    depths: blocks at each resolution.
    heads: attention heads at each resolution.
    windows: side of the windows at each resolution, in patches.
    patch_size: side of a patch in pixels; it must divide H and W.
    mlp_dims: hidden widths of the MLPs at each resolution, or None for four
      times the channels.
    qkv_bias: queries, keys and values have biases.
    activation: a key of `transformer_parts.ACTIVATIONS`.
    epsilon: of the norms.
    dtype: type of the computation.

  Raises (when called):
    ValueError: H or W is no multiple of `patch_size`; at a resolution windows
      do not divide the image, or cover one of its sides alone, where code bases
      do different things; `depths`, `heads`, `windows` and `mlp_dims` are not
      as long as each other; `activation` is unknown.
  """

  num_classes: int
  width: int
  depths: Sequence[int]
  heads: Sequence[int]
  windows: Sequence[int]
  patch_size: int = 4
  mlp_dims: Sequence[int] | None = None
  qkv_bias: bool = True
  activation: str = 'gelu'
  epsilon: float = 1e-5
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, *, train: bool = False) -> Array:
    del train  # nothing here is random
    widths = [self.width * 2**i for i in range(len(self.depths))]
    mlp_dims = self.mlp_dims or [4 * width for width in widths]
    check_lengths(
      depths=self.depths,
      heads=self.heads,
      windows=self.windows,
      mlp_dims=mlp_dims,
    )
    if x.shape[1] % self.patch_size or x.shape[2] % self.patch_size:
      raise ValueError(
        f'images of {x.shape[1]} x {x.shape[2]} pixels do not divide into '
        f'patches of {self.patch_size}; resize the images.'
      )
    x = nn.Conv(
      self.width,
      (self.patch_size, self.patch_size),
      strides=(self.patch_size, self.patch_size),
      padding='VALID',
      dtype=self.dtype,
      name='embedding',
    )(x)
    x = self._norm('embedding_norm')(x)
    for i, depth in enumerate(self.depths):
      if i:
        x = self._norm(f'merge{i}_norm')(_fours(x))
        x = nn.Dense(
          widths[i], use_bias=False, dtype=self.dtype, name=f'merge{i}'
        )(x)
      window = self.windows[i]
      options = BlockOptions(
        heads=self.heads[i],
        mlp_dim=mlp_dims[i],
        activation=self.activation,
        qkv_bias=self.qkv_bias,
        relative_positions=True,
        relative_tokens=False,
        grid=(window, window),
        epsilon=self.epsilon,
        dtype=self.dtype,
      )
      for j in range(depth):
        x = SwinBlock(options, j % 2 == 1, name=f'stage{i}_{j}')(x)
    x = self._norm('norm')(x).mean(axis=(1, 2))
    if self.num_classes:
      x = nn.Dense(self.num_classes, dtype=self.dtype, name='head')(x)
    return x.astype(jnp.float32)

  def _norm(self, name: str) -> nn.Module:
    return nn.LayerNorm(epsilon=self.epsilon, dtype=self.dtype, name=name)


class SwinBlock(nn.Module):
  """Attention in windows, and MLP, added to `(B, H, W, D)`.

  Attributes:
    options: `grid` is the window.
    shifted: the windows are, unless one of them covers the image.
  """

  options: BlockOptions
  shifted: bool

  @nn.compact
  def __call__(self, x: Array) -> Array:
    o = self.options
    assert o.grid is not None
    window, (rows, columns) = o.grid[0], x.shape[1:3]
    shift = self._shift(rows, columns, window)
    y = jnp.roll(make_norm(o, 'norm1')(x), (-shift, -shift), (1, 2))
    seen = None
    if shift:
      seen = jnp.asarray(_seen(rows, columns, window, shift))
      # The windows of an image are next to each other.
      seen = jnp.tile(seen, (x.shape[0], 1, 1, 1))
    y = Attention(o, deterministic=True, name='attention')(
      _to_windows(y, window), seen
    )
    y = _from_windows(y, window, rows, columns)
    x = x + jnp.roll(y, (shift, shift), (1, 2))
    y = make_norm(o, 'norm2')(x)
    return x + MlpBlock(o, deterministic=True, name='mlp')(y)

  def _shift(self, rows: int, columns: int, window: int) -> int:
    # timm pads behind the shift, and shifts along the longer side alone;
    # Hugging Face pads before the shift, and then shifts along none.
    covered = [n == window for n in (rows, columns)]
    if rows % window or columns % window or len(set(covered)) > 1:
      raise ValueError(
        f'windows of {window} x {window} patches in an image of {rows} x '
        f'{columns}: they must divide it, and cover both sides or none. Code '
        'bases differ elsewhere; give images of another size.'
      )
    return window // 2 if self.shifted and not any(covered) else 0


def _to_windows(x: Array, window: int) -> Array:
  """(B, H, W, D) to (B H W / window², window², D)."""
  b, h, w, d = x.shape
  x = x.reshape(b, h // window, window, w // window, window, d)
  return x.swapaxes(2, 3).reshape(-1, window * window, d)


def _from_windows(x: Array, window: int, h: int, w: int) -> Array:
  """The inverse of `_to_windows`."""
  x = x.reshape(-1, h // window, w // window, window, window, x.shape[-1])
  return x.swapaxes(2, 3).reshape(-1, h, w, x.shape[-1])


def _seen(rows: int, columns: int, window: int, shift: int) -> np.ndarray:
  """Booleans (windows, 1, window², window²): both are from the same side.

  Behind a cyclic shift the last windows have patches of opposite sides.

  >>> _seen(4, 2, 2, 1)[0, 0].astype(int).tolist()
  [[1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1]]
  """
  sides = []
  for n in (rows, columns):
    at = np.arange(n)
    sides.append((at >= n - window).astype(int) + (at >= n - shift))
  region = 3 * sides[0][:, None] + sides[1]
  region = region.reshape(rows // window, window, columns // window, window)
  region = region.swapaxes(1, 2).reshape(-1, 1, window * window)
  return region[..., :, None] == region[..., None, :]


def _fours(x: Array) -> Array:
  """(B, H, W, D) to (B, H/2, W/2, 4 D): columns before rows, odd ones filled.

  >>> _fours(jnp.arange(4).reshape(1, 2, 2, 1)).ravel().tolist()
  [0, 2, 1, 3]
  """
  x = jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)))
  b, h, w, d = x.shape
  x = x.reshape(b, h // 2, 2, w // 2, 2, d).transpose(0, 1, 3, 4, 2, 5)
  return x.reshape(b, h // 2, w // 2, 4 * d)

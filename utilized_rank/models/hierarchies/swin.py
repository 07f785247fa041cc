"""Swin Transformers, as Flax Linen modules.

Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted
Windows", https://arxiv.org/abs/2103.14030. Attention is within windows; in
every second block the windows are shifted by half of their side. And the second
version of the same authors, https://arxiv.org/abs/2111.09883: cosine attention,
positions by a small network, norms behind what they were before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from utilized_rank.host.extras import extra
from utilized_rank.models.hierarchies.cosine_attention import CosineAttention
from utilized_rank.models.hierarchies.cosine_attention import CosineOptions
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
    version: 2 for cosine attention with positions of a small network, keys
      without biases, and norms on what the branches add and behind the mergings
      of patches.
    trained_windows: of version 2, side of the windows at each resolution in
      pretraining, by which offsets are divided; 0 for that of the windows
      themselves, None for all 0.
    position_dim: of version 2, hidden width of the networks on offsets.
    masked: of version 2, what is added to scores of patches from opposite sides
      of a shifted image: -100 in Microsoft's code, -200 in Hugging Face's,
      which adds it twice.
    shifted: whether there are shifted windows at each resolution, whatever the
      size of the image, or None for where they do not cover it.
    dtype: type of the computation.

  Raises (when called):
    ValueError: H or W is no multiple of `patch_size`; at a resolution windows
      do not divide the image, or cover one of its sides alone, where code bases
      do different things; `depths`, `heads`, `windows`, `mlp_dims`,
      `trained_windows` and `shifted` are not as long as each other;
      `activation` or `version` is unknown.
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
  version: int = 1
  trained_windows: Sequence[int] | None = None
  position_dim: int = 512
  masked: float = -100.0
  shifted: Sequence[bool] | None = None
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, *, train: bool = False) -> Array:
    del train  # nothing here is random
    if self.version not in (1, 2):
      raise ValueError(f'version={self.version!r}; it is 1 or 2.')
    widths = [self.width * 2**i for i in range(len(self.depths))]
    mlp_dims = self.mlp_dims or [4 * width for width in widths]
    trained = self.trained_windows or [0 for _ in self.depths]
    check_lengths(
      depths=self.depths,
      heads=self.heads,
      windows=self.windows,
      mlp_dims=mlp_dims,
      trained_windows=trained,
      shifted=self.shifted or self.depths,
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
        x = self._merge(_fours(x), widths[i], f'merge{i}')
      window = self.windows[i]
      options = BlockOptions(
        heads=self.heads[i],
        mlp_dim=mlp_dims[i],
        activation=self.activation,
        qkv_bias=self.qkv_bias,
        key_bias=None if self.version == 1 else False,
        norm_order='before' if self.version == 1 else 'branch',
        relative_positions=self.version == 1,
        relative_tokens=False,
        grid=(window, window),
        epsilon=self.epsilon,
        dtype=self.dtype,
      )
      cosine = None
      if self.version == 2:
        cosine = CosineOptions(trained[i], self.position_dim, self.masked)
      shifted = self.shifted is None or self.shifted[i]
      for j in range(depth):
        x = SwinBlock(
          options,
          shifted and j % 2 == 1,
          cosine,
          covering=self.shifted is not None,
          name=f'stage{i}_{j}',
        )(x)
    x = self._norm('norm')(x).mean(axis=(1, 2))
    if self.num_classes:
      x = nn.Dense(self.num_classes, dtype=self.dtype, name='head')(x)
    return x.astype(jnp.float32)

  def _merge(self, x: Array, width: int, name: str) -> Array:
    norm = self._norm(f'{name}_norm')
    dense = nn.Dense(width, use_bias=False, dtype=self.dtype, name=name)
    return dense(norm(x)) if self.version == 1 else norm(dense(x))

  def _norm(self, name: str) -> nn.Module:
    return nn.LayerNorm(epsilon=self.epsilon, dtype=self.dtype, name=name)


class SwinBlock(nn.Module):
  """Attention in windows, and MLP, added to `(B, H, W, D)`.

  Attributes:
    options: `grid` is the window.
    shifted: the windows are, unless one of them covers the image.
    cosine: what the second version's attention has, or None.
    covering: one that covers the image is shifted, too.
  """

  options: BlockOptions
  shifted: bool
  cosine: CosineOptions | None = None
  covering: bool = False

  @nn.compact
  def __call__(self, x: Array) -> Array:
    o = self.options
    assert o.grid is not None
    window, (rows, columns) = o.grid[0], x.shape[1:3]
    shift = self._shift(rows, columns, window)
    norm1, norm2 = make_norm(o, 'norm1'), make_norm(o, 'norm2')
    before = o.norm_order == 'before'
    y = jnp.roll(norm1(x) if before else x, (-shift, -shift), (1, 2))
    seen = None
    if shift:
      seen = jnp.asarray(_seen(rows, columns, window, shift))
      # The windows of an image are next to each other.
      seen = jnp.tile(seen, (x.shape[0], 1, 1, 1))
    attention: nn.Module
    if self.cosine is None:
      attention = Attention(o, deterministic=True, name='attention')
    else:
      attention = CosineAttention(o, self.cosine, name='attention')
    y = attention(_to_windows(y, window), seen)
    y = jnp.roll(
      _from_windows(y, window, rows, columns), (shift, shift), (1, 2)
    )
    x = x + (y if before else norm1(y))
    y = MlpBlock(o, deterministic=True, name='mlp')(norm2(x) if before else x)
    return x + (y if before else norm2(y))

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
    shifted = self.shifted and (self.covering or not any(covered))
    return window // 2 if shifted else 0


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

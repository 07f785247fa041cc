"""A Flax Linen Vision Transformer with the AugReg checkpoints' tree.

Dosovitskiy et al., "An Image is Worth 16x16 Words",
https://arxiv.org/abs/2010.11929; the checkpoints are those of Steiner et al.,
"How to train your ViT?", https://arxiv.org/abs/2106.10270. Every name and
shape of the tree equals theirs, so a checkpoint loads without renaming.
"""

from __future__ import annotations

from collections.abc import Mapping
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
Params = Mapping[str, Any]


def _variant(
  patch_size: int, width: int, depth: int, heads: int, mlp_dim: int
) -> dict[str, int]:
  return {
    'patch_size': patch_size,
    'width': width,
    'depth': depth,
    'heads': heads,
    'mlp_dim': mlp_dim,
  }


# The published sizes: `ViT(num_classes=1000, **VARIANTS['B/16'])`.
VARIANTS: dict[str, dict[str, int]] = {
  'Ti/16': _variant(16, 192, 12, 3, 768),
  'S/32': _variant(32, 384, 12, 6, 1536),
  'S/16': _variant(16, 384, 12, 6, 1536),
  'B/32': _variant(32, 768, 12, 12, 3072),
  'B/16': _variant(16, 768, 12, 12, 3072),
  'B/8': _variant(8, 768, 12, 12, 3072),
  'L/32': _variant(32, 1024, 24, 16, 4096),
  'L/16': _variant(16, 1024, 24, 16, 4096),
  'H/14': _variant(14, 1280, 32, 16, 5120),
}


class PositionEmbedding(nn.Module):
  """Adds a learned embedding to every position of `(B, N, D)`.

  Attributes:
    grid: rows and columns of patches; what comes before them is a token.
  """

  grid: tuple[int, int]

  @nn.compact
  def __call__(self, x: Array) -> Array:
    def init(key: Array, shape: tuple[int, ...]) -> Array:
      table = _sincos(self.grid, shape[-1])
      return jnp.pad(table, ((shape[1] - len(table), 0), (0, 0)))[None]

    table = self.param('pos_embedding', init, (1, *x.shape[1:]))
    return x + table.astype(x.dtype)


def _sincos(grid: tuple[int, int], width: int) -> Array:
  """Sines and cosines of row and column, `(rows * columns, width)`.

  The published recipe starts from noise of size 0.02. On little data that
  leaves the first layers blind to position for long, which on the digits
  cost about a point of accuracy.
  """
  # Wavelengths from 6 to 600 patches.
  frequency = 100.0 ** -jnp.linspace(0, 1, width // 4, endpoint=False)
  row, column = jnp.indices(grid).reshape(2, -1, 1) * frequency
  waves = [jnp.sin(row), jnp.cos(row), jnp.sin(column), jnp.cos(column)]
  return jnp.pad(jnp.concatenate(waves, axis=-1), ((0, 0), (0, width % 4)))


class MlpBlock(nn.Module):
  """Dense, gelu, dense back to the input width; `(B, N, D)` to the same."""

  mlp_dim: int
  dropout: float
  deterministic: bool
  dtype: Any

  @nn.compact
  def __call__(self, x: Array) -> Array:
    init = {
      'kernel_init': nn.initializers.xavier_uniform(),
      'bias_init': nn.initializers.normal(1e-6),
      'dtype': self.dtype,
    }
    width = x.shape[-1]
    x = nn.gelu(nn.Dense(self.mlp_dim, **init)(x))
    x = nn.Dropout(self.dropout, deterministic=self.deterministic)(x)
    x = nn.Dense(width, **init)(x)
    return nn.Dropout(self.dropout, deterministic=self.deterministic)(x)


class EncoderBlock(nn.Module):
  """One pre-norm block. Returns `(x, None)`, the form that `nn.scan` needs."""

  heads: int
  mlp_dim: int
  dropout: float
  attention_dropout: float
  # An attribute, not an argument: remat and scan then see only arrays.
  deterministic: bool
  dtype: Any

  @nn.compact
  def __call__(self, x: Array, _: None = None) -> tuple[Array, None]:
    # The explicit names are those that the checkpoints' automatic numbering
    # gave to the second to fourth submodule of a block.
    y = nn.LayerNorm(dtype=self.dtype, name='LayerNorm_0')(x)
    y = nn.MultiHeadDotProductAttention(
      num_heads=self.heads,
      kernel_init=nn.initializers.xavier_uniform(),
      dropout_rate=self.attention_dropout,
      broadcast_dropout=False,
      deterministic=self.deterministic,
      dtype=self.dtype,
      name='MultiHeadDotProductAttention_1',
    )(y, y)
    y = nn.Dropout(self.dropout, deterministic=self.deterministic)(y)
    x = x + y
    y = nn.LayerNorm(dtype=self.dtype, name='LayerNorm_2')(x)
    y = MlpBlock(
      mlp_dim=self.mlp_dim,
      dropout=self.dropout,
      deterministic=self.deterministic,
      dtype=self.dtype,
      name='MlpBlock_3',
    )(y)
    return x + y, None


class Encoder(nn.Module):
  """Position embedding, `depth` blocks and a last norm on `(B, N, D)`."""

  grid: tuple[int, int]
  depth: int
  heads: int
  mlp_dim: int
  dropout: float
  attention_dropout: float
  dtype: Any
  scan: bool
  remat: bool

  @nn.compact
  def __call__(self, x: Array, *, train: bool) -> Array:
    x = PositionEmbedding(self.grid, name='posembed_input')(x)
    x = nn.Dropout(self.dropout, deterministic=not train)(x)
    block: Any = EncoderBlock
    if self.remat:
      # A scan already keeps the recomputation apart from the forward pass.
      block = nn.remat(block, prevent_cse=not self.scan)
    kwargs = {
      'heads': self.heads,
      'mlp_dim': self.mlp_dim,
      'dropout': self.dropout,
      'attention_dropout': self.attention_dropout,
      'deterministic': not train,
      'dtype': self.dtype,
    }
    if self.scan:
      stack = nn.scan(
        block,
        variable_axes={'params': 0},
        split_rngs={'params': True, 'dropout': True},
        length=self.depth,
      )
      x, _ = stack(**kwargs, name='encoderblock')(x, None)
    else:
      for i in range(self.depth):
        x, _ = block(**kwargs, name=f'encoderblock_{i}')(x, None)
    return nn.LayerNorm(dtype=self.dtype, name='encoder_norm')(x)


class ViT(nn.Module):
  """Vision Transformer: images `(B, H, W, C)` to logits `(B, num_classes)`.

  Parameters are float32; `dtype` is the type of the computation. Logits are
  always float32.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> model = ViT(num_classes=10, patch_size=2, width=16, depth=1, heads=2,
    ...             mlp_dim=32, pool='gap')
    >>> images = jnp.zeros((3, 8, 8, 1))
    >>> variables = model.init(jax.random.key(0), images)
    >>> model.apply(variables, images).shape
    (3, 10)

  Attributes:
    num_classes: width of the head.
    patch_size: side of a square patch in pixels; it must divide H and W.
    width: width D of the residual stream; a multiple of `heads`.
    depth: number of blocks.
    heads: number of attention heads.
    mlp_dim: hidden width of the MLPs.
    pool: `'token'` reads a class token, `'gap'` averages the patches.
    representation_size: width of a tanh layer before the head, or None.
    dropout: rate after the embedding, the attention and the dense layers.
    attention_dropout: rate on the attention weights.
    dtype: type of the computation.
    scan: one scanned block with parameters stacked on axis 0 under
      `Transformer/encoderblock` in place of one subtree per block; see
      `stack_blocks`.
    remat: recompute each block in the backward pass.

  Raises (when called):
    ValueError: H or W is no multiple of `patch_size`, `width` is no multiple
      of `heads`, or `pool` is neither of the two.
  """

  num_classes: int
  patch_size: int = 16
  width: int = 768
  depth: int = 12
  heads: int = 12
  mlp_dim: int = 3072
  pool: str = 'token'
  representation_size: int | None = None
  dropout: float = 0.0
  attention_dropout: float = 0.0
  dtype: Any = jnp.float32
  scan: bool = False
  remat: bool = False

  @nn.compact
  def __call__(self, images: Array, *, train: bool = False) -> Array:
    self._check(images.shape)
    patch = (self.patch_size, self.patch_size)
    x = nn.Conv(
      self.width,
      patch,
      strides=patch,
      padding='VALID',
      dtype=self.dtype,
      name='embedding',
    )(images)
    grid = (x.shape[1], x.shape[2])
    x = x.reshape(x.shape[0], -1, self.width)
    if self.pool == 'token':
      cls = self.param('cls', nn.initializers.zeros, (1, 1, self.width))
      cls = jnp.broadcast_to(cls.astype(x.dtype), (x.shape[0], 1, self.width))
      x = jnp.concatenate([cls, x], axis=1)
    x = Encoder(
      grid=grid,
      depth=self.depth,
      heads=self.heads,
      mlp_dim=self.mlp_dim,
      dropout=self.dropout,
      attention_dropout=self.attention_dropout,
      dtype=self.dtype,
      scan=self.scan,
      remat=self.remat,
      name='Transformer',
    )(x, train=train)
    x = x[:, 0] if self.pool == 'token' else x.mean(axis=1)
    if self.representation_size is not None:
      size = self.representation_size
      x = jnp.tanh(nn.Dense(size, dtype=self.dtype, name='pre_logits')(x))
    # A zero head makes the first logits equal, as in the published recipe.
    return nn.Dense(
      self.num_classes,
      kernel_init=nn.initializers.zeros,
      dtype=jnp.float32,
      name='head',
    )(x)

  def _check(self, shape: tuple[int, ...]) -> None:
    if len(shape) != 4:
      raise ValueError(f'images have shape {shape}; ViT takes (B, H, W, C).')
    if shape[1] % self.patch_size or shape[2] % self.patch_size:
      raise ValueError(
        f'images of {shape[1]} x {shape[2]} pixels do not divide into '
        f'patches of {self.patch_size}; resize the images or choose another '
        'patch_size.'
      )
    if self.width % self.heads:
      raise ValueError(
        f'width={self.width} is no multiple of heads={self.heads}.'
      )
    if self.pool not in ('token', 'gap'):
      raise ValueError(f"pool={self.pool!r}; it is 'token' or 'gap'.")


def stack_blocks(params: Params) -> dict[str, Any]:
  """Turns a looped ViT's tree into that of the same ViT with `scan=True`.

  Args:
    params: the tree with `Transformer/encoderblock_{i}`, or the variables
      dict `{'params': tree}`. Arrays of numpy stay in numpy, and so exact.

  Returns:
    A new tree of the same form with `Transformer/encoderblock`, whose leaves
    have one more axis of length depth in front. `unstack_blocks` undoes it.

  Raises:
    ValueError: there are no blocks, a number is missing, or the blocks'
      trees or shapes differ.
  """
  if 'params' in params:
    return {**params, 'params': stack_blocks(params['params'])}
  encoder = dict(_encoder(params))
  numbers = sorted(
    int(match[1])
    for key in encoder
    if (match := re.fullmatch(r'encoderblock_(\d+)', key))
  )
  if not numbers or numbers != list(range(len(numbers))):
    raise ValueError(
      'Transformer has the blocks '
      f'{[f"encoderblock_{i}" for i in numbers]}; stacking takes '
      'encoderblock_0 to encoderblock_{depth-1} without a gap.'
    )
  blocks = [encoder.pop(f'encoderblock_{i}') for i in numbers]
  for i, block in enumerate(blocks):
    if _signature(block) != _signature(blocks[0]):
      raise ValueError(
        f'encoderblock_{i} differs from encoderblock_0 in its tree or its '
        'shapes, so they do not stack; blocks of different ranks stay looped.'
      )
  encoder['encoderblock'] = jax.tree.map(_stack, *blocks)
  return {**params, 'Transformer': encoder}


def unstack_blocks(params: Params) -> dict[str, Any]:
  """Turns the tree of a ViT with `scan=True` into that of the looped ViT.

  Args:
    params: the tree with `Transformer/encoderblock`, or `{'params': tree}`.

  Returns:
    A new tree of the same form with `Transformer/encoderblock_{i}`.

  Raises:
    ValueError: there is no stacked block, or its leaves differ in length.
  """
  if 'params' in params:
    return {**params, 'params': unstack_blocks(params['params'])}
  encoder = dict(_encoder(params))
  if 'encoderblock' not in encoder:
    raise ValueError(
      f'Transformer has the keys {sorted(encoder)}; unstacking takes the '
      'stacked block encoderblock.'
    )
  stacked = encoder.pop('encoderblock')
  lengths = {leaf.shape[0] for leaf in jax.tree.leaves(stacked)}
  if len(lengths) != 1:
    raise ValueError(
      'the leaves of Transformer/encoderblock have leading axes of lengths '
      f'{sorted(lengths)}; all must have one length, the depth.'
    )
  for i in range(lengths.pop()):
    encoder[f'encoderblock_{i}'] = jax.tree.map(lambda x, i=i: x[i], stacked)
  return {**params, 'Transformer': encoder}


def _encoder(params: Params) -> Params:
  if 'Transformer' not in params:
    raise ValueError(
      f'the tree has the keys {sorted(params)}; a ViT has Transformer.'
    )
  return params['Transformer']


def _signature(tree: Any) -> tuple[Any, ...]:
  leaves, structure = jax.tree.flatten(tree)
  return structure, [(x.shape, x.dtype) for x in leaves]


def _stack(*leaves: Any) -> Any:
  # jnp.stack would cut numpy's float64 to float32.
  if all(isinstance(leaf, np.ndarray) for leaf in leaves):
    return np.stack(leaves)
  return jnp.stack(leaves)

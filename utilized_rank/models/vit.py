"""A Flax Linen Vision Transformer with the AugReg checkpoints' tree.

Dosovitskiy et al., "An Image is Worth 16x16 Words",
https://arxiv.org/abs/2010.11929; the checkpoints are those of Steiner et al.,
"How to train your ViT?", https://arxiv.org/abs/2106.10270. With the defaults
every name and shape of the tree equals theirs. The options are what other
families added: MAE, DINO, DINOv2, CLIP, timm.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from utilized_rank.host.extras import extra
from utilized_rank.models import pooling
from utilized_rank.models import transformer_parts
from utilized_rank.models.positions import PositionEmbedding
from utilized_rank.models.rotary import GridRotation

with extra('models'):
  import flax.linen as nn

Array = jax.Array

# name: width, depth, heads, hidden width of the MLPs.
_SIZES = {
  'Ti': (192, 12, 3, 768),
  'S': (384, 12, 6, 1536),
  'B': (768, 12, 12, 3072),
  'L': (1024, 24, 16, 4096),
  'H': (1280, 32, 16, 5120),
}

# The published sizes: `ViT(num_classes=1000, **VARIANTS['B/16'])`.
VARIANTS: dict[str, dict[str, int]] = {
  f'{name}/{patch_size}': {
    'patch_size': patch_size,
    'width': width,
    'depth': depth,
    'heads': heads,
    'mlp_dim': mlp_dim,
  }
  for name, (width, depth, heads, mlp_dim) in _SIZES.items()
  for patch_size in (8, 14, 16, 32)
}


class Encoder(nn.Module):
  """Position embedding, tokens, `depth` blocks and norms on `(B, N, D)`.

  Attributes:
    options: of the blocks.
    depth: number of blocks.
    grid: rows and columns of patches.
    class_position: the class token has a position of its own.
    positions: there are learned positions.
    pre_norm: a norm before the first block.
    last_norm: a norm after the last block.
    scan: see `ViT`.
    remat: see `ViT`.
  """

  options: transformer_parts.BlockOptions
  depth: int
  grid: tuple[int, int]
  class_position: bool = True
  positions: bool = True
  pre_norm: bool = False
  last_norm: bool = True
  scan: bool = False
  remat: bool = False

  @nn.compact
  def __call__(
    self,
    x: Array,
    class_token: Array | None = None,
    registers: Array | None = None,
    *,
    train: bool,
  ) -> Array:
    """Patches (B, N, D) with tokens (1, K, D) to (B, [class, registers] N, D).

    Registers have no position (https://arxiv.org/abs/2309.16588).
    """
    position: Any = lambda x: x
    if self.positions:
      position = PositionEmbedding(self.grid, name='posembed_input')
    if class_token is not None and self.class_position:
      x = position(_prepend(class_token, x))
    else:
      x = position(x)
      if class_token is not None:
        x = _prepend(class_token, x)
    if registers is not None:
      tokens = x.shape[1] - self.grid[0] * self.grid[1]
      x = jnp.concatenate(
        [x[:, :tokens], _prepend(registers, x[:, tokens:])], axis=1
      )
    x = nn.Dropout(self.options.dropout, deterministic=not train)(x)
    if self.pre_norm:
      x = self._norm('pre_norm')(x)
    block: Any = transformer_parts.EncoderBlock
    if self.remat:
      # A scan already keeps the recomputation apart from the forward pass.
      block = nn.remat(block, prevent_cse=not self.scan)
    if self.scan:
      stack = nn.scan(
        block,
        variable_axes={'params': 0},
        split_rngs={'params': True, 'dropout': True},
        length=self.depth,
      )
      x, _ = stack(self.options, not train, name='encoderblock')(x, None)
    else:
      for i in range(self.depth):
        x, _ = block(self.options, not train, name=f'encoderblock_{i}')(x, None)
    return self._norm('encoder_norm')(x) if self.last_norm else x

  def _norm(self, name: str) -> nn.Module:
    return transformer_parts.make_norm(self.options, name)


def _prepend(tokens: Array, x: Array) -> Array:
  shape = (x.shape[0], *tokens.shape[1:])
  return jnp.concatenate(
    [jnp.broadcast_to(tokens.astype(x.dtype), shape), x], axis=1
  )


class ViT(nn.Module):
  """Vision Transformer: images `(B, H, W, C)` to logits `(B, num_classes)`.

  Parameters are float32; `dtype` is the type of the computation. Logits are
  always float32.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> model = ViT(num_classes=10, patch_size=2, width=16, depth=1, heads=2,
    ...             mlp_dim=32, pool='gap')
    >>> images = jnp.zeros((3, 8, 8, 1))
    >>> init = model.init_with_output
    >>> jax.eval_shape(init, jax.random.key(0), images)[0].shape
    (3, 10)

  Attributes:
    num_classes: width of the head; 0 for none: features `(B, width)`.
    patch_size: side of a square patch in pixels; it must divide H and W.
    width: width D of the residual stream; a multiple of `heads`.
    depth: number of blocks.
    heads: number of attention heads.
    mlp_dim: hidden width of the MLPs.
    pool: one of `pooling.POOLS`: `'token'` reads a class token, `'gap'`
      averages the patches, `'map'` is attention to them (`'map_all'`: to all).
    class_token: whether there is one; None: only where `pool` reads it.
    distilled: a second token behind the class token
      (https://arxiv.org/abs/2012.12877): `'token'`: it is not read;
      `'average'`: it has a head of its own and the logits are averaged.
    positions: there are learned positions.
    class_position: the class token has a position of its own.
    registers: number of register tokens.
    register_position: they have positions of their own.
    representation_size: width of a tanh layer before the head, or None.
    patch_bias: the patch embedding has a bias.
    head_bias: the head has a bias.
    patch_norm: a norm behind the patch embedding.
    pre_norm: a norm before the first block, as in CLIP.
    last_norm: a norm behind the last block, or behind the pooling.
    norm_after_pool: the last norm comes after the pooling, as in MAE's
      fine-tuning.
    activation: see `transformer_parts.BlockOptions`, with the next sixteen.
    swiglu: see there.
    qkv_bias: see there.
    qk_norm: see there.
    layer_scale: see there.
    epsilon: see there.
    norm: see there.
    norm_order: see there.
    gate_activation: see there.
    mlp_bias: see there.
    mlp_norm: see there.
    attention_norm: see there.
    key_bias: see there.
    out_bias: see there.
    rotation: see there.
    relative_positions: see there.
    attention_dropout: see there.
    dropout: rate after the embedding, the attention and the dense layers.
    dtype: type of the computation.
    scan: one scanned block with parameters stacked on axis 0 under
      `Transformer/encoderblock` in place of one subtree per block; see
      `stacking.stack_blocks`.
    remat: recompute each block in the backward pass.

  Raises (when called):
    ValueError: H or W is no multiple of `patch_size`, `width` is no multiple
      of `heads`, `pool` or `activation` is unknown, or `pool='token'` without
      a class token.
  """

  num_classes: int
  patch_size: int = 16
  width: int = 768
  depth: int = 12
  heads: int = 12
  mlp_dim: int = 3072
  pool: str = 'token'
  class_token: bool | None = None
  distilled: str | None = None
  positions: bool = True
  class_position: bool = True
  registers: int = 0
  register_position: bool = False
  representation_size: int | None = None
  patch_bias: bool = True
  head_bias: bool = True
  patch_norm: bool = False
  pre_norm: bool = False
  last_norm: bool = True
  norm_after_pool: bool = False
  activation: str = 'gelu_tanh'
  swiglu: bool = False
  qkv_bias: bool = True
  qk_norm: bool = False
  layer_scale: float | None = None
  epsilon: float = 1e-6
  norm: str = 'layer'
  norm_order: str = 'before'
  gate_activation: str = 'silu'
  mlp_bias: bool = True
  mlp_norm: bool = False
  attention_norm: bool = False
  key_bias: bool | None = None
  out_bias: bool = True
  rotation: GridRotation | None = None
  relative_positions: bool = False
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
      use_bias=self.patch_bias,
      dtype=self.dtype,
      name='embedding',
    )(images)
    grid = (x.shape[1], x.shape[2])
    x = x.reshape(x.shape[0], -1, self.width)
    options = self._block_options(grid)
    if self.patch_norm:
      x = transformer_parts.make_norm(options, 'embedding_norm')(x)
    cls = registers = None
    if self._has_class_token():
      cls = self.param('cls', nn.initializers.zeros, (1, 1, self.width))
    if cls is not None and self.distilled:
      more = self.param('distilled', nn.initializers.zeros, (1, 1, self.width))
      cls = jnp.concatenate([cls, more], axis=1)
    if self.registers:
      registers = self.param(
        'registers',
        nn.initializers.normal(0.02),
        (1, self.registers, self.width),
      )
    if self.register_position and registers is not None:
      before = (registers,) if cls is None else (cls, registers)
      cls, registers = jnp.concatenate(before, axis=1), None
    patches = x.shape[1]
    x = Encoder(
      options,
      self.depth,
      grid,
      class_position=self.class_position,
      positions=self.positions,
      pre_norm=self.pre_norm,
      last_norm=self.last_norm and not self.norm_after_pool,
      scan=self.scan,
      remat=self.remat,
      name='Transformer',
    )(x, cls, registers, train=train)
    if self.distilled == 'average':
      return self._distilled(x)
    if self.pool in ('map', 'map_all'):
      seen = x if self.pool == 'map_all' else x[:, -patches:]
      x = pooling.MapHead(options, name='MAPHead_0')(seen)
    else:
      x = pooling.pooled(x, self.pool, patches)
    if self.norm_after_pool:
      x = transformer_parts.make_norm(options, 'fc_norm')(x)
    if self.representation_size is not None:
      size = self.representation_size
      x = jnp.tanh(nn.Dense(size, dtype=self.dtype, name='pre_logits')(x))
    if not self.num_classes:
      return x.astype(jnp.float32)
    return self._classes(x, 'head')

  def _classes(self, x: Array, name: str) -> Array:
    # A zero head makes the first logits equal, as in the published recipe.
    return nn.Dense(
      self.num_classes,
      use_bias=self.head_bias,
      kernel_init=nn.initializers.zeros,
      dtype=jnp.float32,
      name=name,
    )(x)

  def _distilled(self, x: Array) -> Array:
    a, b = x[:, 0], x[:, 1]
    if self.num_classes:
      a, b = self._classes(a, 'head'), self._classes(b, 'head_distilled')
    return ((a + b) / 2).astype(jnp.float32)

  def _has_class_token(self) -> bool:
    reads = self.distilled is not None or self.pool in (
      'token',
      'token_and_gap',
    )
    return bool(reads) if self.class_token is None else self.class_token

  def _block_options(
    self, grid: tuple[int, int]
  ) -> transformer_parts.BlockOptions:
    names = {f.name for f in dataclasses.fields(transformer_parts.BlockOptions)}
    same = names & {f.name for f in dataclasses.fields(self)}
    placed = self.rotation is not None or self.relative_positions
    return transformer_parts.BlockOptions(
      **{name: getattr(self, name) for name in same},
      grid=grid if placed else None,
    )

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
    if self.distilled not in (None, 'token', 'average'):
      raise ValueError(
        f"distilled={self.distilled!r}; it is None, 'token' or 'average'."
      )
    if self.pool not in pooling.POOLS:
      raise ValueError(f'pool={self.pool!r}; it is one of {pooling.POOLS}.')
    if self.pool == 'token' and not self._has_class_token():
      raise ValueError("pool='token' reads the class token: class_token=False.")

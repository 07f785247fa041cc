"""Masked-autoencoder pre-training of a ViT, without labels.

He, Chen, Xie, Li, Dollar, Girshick, "Masked Autoencoders Are Scalable Vision
Learners", https://arxiv.org/abs/2111.06377: most patches are hidden at random,
the encoder sees the others alone, and a light decoder predicts the hidden
ones' pixels. The encoder is the classifier's own `ViT`, tree and all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import functools
from typing import Any

import jax
import jax.numpy as jnp

from utilized_rank.host.extras import extra
from utilized_rank.models import transformer_parts
from utilized_rank.models.positions import PositionEmbedding
from utilized_rank.models.vit import Encoder
from utilized_rank.models.vit import ViT
from utilized_rank.training.objectives import Objective

with extra('models'):
  import flax.linen as nn

Array = jax.Array


class Decoder(nn.Module):
  """Visible tokens `(B, K, D)` to the pixels of all patches `(B, N, pixels)`.

  Attributes:
    grid: rows and columns of patches, N in all.
    pixels: numbers in a patch, p * p * C.
    width: width of its residual stream; a multiple of `heads`.
    depth: number of blocks.
    heads: number of attention heads.
  """

  grid: tuple[int, int]
  pixels: int
  width: int
  depth: int
  heads: int

  @nn.compact
  def __call__(self, tokens: Array, kept: Array) -> Array:
    """`kept` `(B, K)` says which patches the tokens belong to."""
    tokens = nn.Dense(self.width, name='embed')(tokens)
    mask = self.param('mask', nn.initializers.normal(0.02), (self.width,))
    shape = (len(tokens), self.grid[0] * self.grid[1], self.width)
    x = jnp.broadcast_to(mask, shape)
    x = x.at[jnp.arange(len(tokens))[:, None], kept].set(tokens)
    x = PositionEmbedding(self.grid, name='posembed_input')(x)
    options = transformer_parts.BlockOptions(self.heads, 4 * self.width)
    for i in range(self.depth):
      x, _ = transformer_parts.EncoderBlock(options, True, name=f'block_{i}')(x)
    x = nn.LayerNorm(name='norm')(x)
    return nn.Dense(self.pixels, name='pixels')(x)


def decoder_of(
  model: ViT,
  image_shape: tuple[int, int, int],
  *,
  width: int,
  depth: int,
  heads: int,
) -> Decoder:
  """The decoder for a model's patches of images `(H, W, C)`."""
  side = model.patch_size
  height, columns, channels = image_shape
  return Decoder(
    grid=(height // side, columns // side),
    pixels=side * side * channels,
    width=width,
    depth=depth,
    heads=heads,
  )


def init(
  model: ViT, decoder: Decoder, key: Array, images: Array
) -> dict[str, Any]:
  """Parameters to pre-train.

  Returns:
    `{'encoder': variables of the model, 'decoder': those of the decoder}`.
  """
  one, two = jax.random.split(key)
  tokens = jnp.zeros((1, 1, model.width))
  return {
    'encoder': model.init(one, images),
    'decoder': decoder.init(two, tokens, jnp.zeros((1, 1), int)),
  }


@functools.cache
def objective(
  model: ViT, decoder: Decoder, *, masked: float = 0.75
) -> Objective:
  """Mean squared error on the pixels of the hidden patches.

  Each patch's pixels are brought to mean 0 and variance 1 first (the paper's
  normalised target). Equal arguments give the same function.

  Args:
    model: the encoder; its pooling and head are not used.
    decoder: see `decoder_of`.
    masked: share of the patches to hide, in (0, 1).

  Raises:
    ValueError: `masked` would hide no patch, or all of them.
  """
  count = decoder.grid[0] * decoder.grid[1]
  visible = round(count * (1 - masked))
  if not 0 < visible < count:
    raise ValueError(
      f'masked={masked} leaves {visible} of {count} patches; some must be '
      'visible and some hidden.'
    )

  def loss(
    params: Any, frozen: Any, batch: Mapping[str, Array], rng: Array
  ) -> tuple[Array, dict[str, Array]]:
    del frozen
    images = batch['image']
    order = random_order(rng, len(images), count)
    kept, hidden = order[:, :visible], order[:, visible:]
    tokens = encode(model, params['encoder'], images, kept, rng=rng)
    predicted: Any = decoder.apply(params['decoder'], tokens, kept)
    target = normalized_patches(images, model.patch_size)
    error = jnp.square(predicted - target).mean(axis=-1)
    error = jnp.take_along_axis(error, hidden, axis=1)
    return error.mean(), {}

  return loss


def random_order(rng: Array, rows: int, count: int) -> Array:
  """A permutation of `range(count)` per row, `(rows, count)`."""
  return jax.random.uniform(rng, (rows, count)).argsort(axis=1)


def normalized_patches(images: Array, side: int) -> Array:
  """Patches `(B, N, side * side * C)`, each of mean 0 and variance 1.

  >>> normalized_patches(jnp.arange(16.0).reshape(1, 4, 4, 1), 2).shape
  (1, 4, 4)
  """
  batch, height, width, channels = images.shape
  x = images.reshape(batch, height // side, side, width // side, side, channels)
  x = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, side * side * channels)
  # The paper's: some patches are all of one colour.
  return jax.nn.standardize(x, axis=-1, epsilon=1e-6)


def encode(
  model: ViT,
  variables: Any,
  images: Array,
  kept: Array | None = None,
  *,
  rng: Array | None = None,
) -> Array:
  """The encoder's tokens before pooling, of chosen patches alone.

  Patches are dropped once they have their positions; a class token is always
  in, and not returned.

  Args:
    model: the encoder.
    variables: its variables.
    images: `(B, H, W, C)`.
    kept: `(B, K)` patches, or None for all.
    rng: a key for dropout; None for none.

  Returns:
    `(B, K, D)`.
  """
  tokens: list[Array] = []
  patches = (images.shape[1] // model.patch_size) * (
    images.shape[2] // model.patch_size
  )

  # The classifier itself runs, so that whatever it becomes is pre-trained.
  def watch(
    call: Callable[..., Any], args: Any, kwargs: Any, context: Any
  ) -> Any:
    out = call(*args, **kwargs)
    if context.method_name != '__call__':
      return out
    if isinstance(context.module, PositionEmbedding) and kept is not None:
      first = out.shape[1] - patches
      chosen = jnp.take_along_axis(out[:, first:], kept[..., None], axis=1)
      return jnp.concatenate([out[:, :first], chosen], axis=1)
    if isinstance(context.module, Encoder):
      tokens.append(out)
    return out

  rngs = None if rng is None else {'dropout': rng}
  with nn.intercept_methods(watch):
    model.apply(variables, images, train=rng is not None, rngs=rngs)
  (found,) = tokens
  wanted = patches if kept is None else kept.shape[1]
  return found[:, found.shape[1] - wanted :]

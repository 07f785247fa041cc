"""Losses that need no labels, since each example draws its own.

Labels are drawn from the model's own distribution where outputs are logits,
and directions of the outputs where they are numbers of any other kind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from utilized_rank.losses.divergence import Divergence
from utilized_rank.losses.divergence import floating
from utilized_rank.losses.divergence import identity
from utilized_rank.losses.divergence import kl_divergence
from utilized_rank.losses.divergence import squared_error


@dataclasses.dataclass(frozen=True)
class SampledCrossEntropy:
  """See `sampled_cross_entropy`."""

  logits: Callable[[Any], jax.Array]
  seed: int

  def __call__(self, outputs: Any, batch: Any) -> jax.Array:
    scores = self.logits(outputs).astype(jnp.float32)
    keys = _keys(self.seed, batch, len(scores))
    drawn = jax.vmap(jax.random.categorical)(
      keys, jax.lax.stop_gradient(scores)
    )
    nats = -jnp.take_along_axis(
      jax.nn.log_softmax(scores), drawn[..., None], axis=-1
    )[..., 0]
    return nats.reshape(len(nats), -1).sum(1)

  @property
  def divergence(self) -> Divergence:
    """What its expectation rises by: the KL divergence of the logits."""
    return kl_divergence(self.logits)


@dataclasses.dataclass(frozen=True)
class SampledSquaredError:
  """See `sampled_squared_error`."""

  energies: tuple[float, ...] | None
  seed: int
  divergence: ClassVar[Divergence] = staticmethod(squared_error)

  def __call__(self, outputs: Any, batch: Any) -> jax.Array:
    arrays = floating(outputs)
    if not arrays:
      raise ValueError('the function has no floating output to draw for')
    sizes = self.energies or (2.0,) * len(arrays)
    if len(sizes) != len(arrays):
      raise ValueError(
        f'energies= has {len(sizes)} numbers, and there are {len(arrays)} '
        'floating arrays among the outputs: give one for each'
      )
    keys = _keys(self.seed, batch, len(arrays[0]))
    inner = jnp.zeros(len(arrays[0]))
    for i, (y, energy) in enumerate(zip(arrays, sizes, strict=True)):
      drawn = jax.vmap(
        lambda key, y, i=i: jax.random.normal(
          jax.random.fold_in(key, i), y.shape
        )
      )(keys, y)
      products = (drawn * y).reshape(len(y), -1)
      inner += (2 / energy) ** 0.5 * products.sum(1)
    return inner


def _keys(seed: int, batch: Any, examples: int) -> jax.Array:
  """A key for each example, of its arrays and the seed; (B,)."""
  key = jax.random.key(seed)
  marks = _marks(batch, examples)
  return jax.vmap(lambda mark: jax.random.fold_in(key, mark))(marks)


def _marks(batch: Any, examples: int) -> jax.Array:
  """A number for each example, of the bits of its arrays: it is the same in
  whatever batch and on whatever device the example comes; (B,) uint32."""
  arrays = jax.tree.leaves(batch)
  if not arrays:
    return jnp.arange(examples, dtype=jnp.uint32)
  marks = jnp.zeros(examples, jnp.uint32)
  for array in map(jnp.asarray, arrays):
    bits = _bits(jax.lax.stop_gradient(array)).reshape(examples, -1)
    # Odd factors, different at every place: order counts, and no bit is lost.
    place = jnp.arange(bits.shape[1], dtype=jnp.uint32)
    factors = (place * jnp.uint32(0x9E3779B9)) | jnp.uint32(1)
    total = jnp.sum(bits * factors[None], axis=1, dtype=jnp.uint32)
    marks = marks * jnp.uint32(31) + total
  return marks


def _bits(array: jax.Array) -> jax.Array:
  """Numbers as unsigned integers of 32 bits, without rounding them first."""
  if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
    return jax.random.key_data(array)
  if jnp.issubdtype(array.dtype, jnp.complexfloating):
    array = jnp.stack([array.real, array.imag], axis=-1)
  size = array.dtype.itemsize
  if size > 4:  # two halves, along one more axis
    return jax.lax.bitcast_convert_type(array, jnp.uint32)
  if jnp.issubdtype(array.dtype, jnp.floating):
    unsigned = jnp.dtype(f'uint{8 * size}')
    array = jax.lax.bitcast_convert_type(array, unsigned)
  return array.astype(jnp.uint32)


def sampled_cross_entropy(
  logits: Callable[[Any], jax.Array] = identity,
  *,
  seed: int = 0,
) -> SampledCrossEntropy:
  """The loss whose gradient moments are the true Fisher's: labels are drawn
  from the model's own distribution, so none are needed.

  Args:
    logits: the logits (B, ..., K) among the outputs; the losses of an
      example's positions are added up.
    seed: decides the draws, together with each example's own arrays: an example
      draws the same in whatever batch and on whatever device it comes.

  Returns:
    `loss(outputs, batch) -> (B,)`.

  >>> loss = sampled_cross_entropy()
  >>> loss(jnp.zeros((3, 5)), None).shape
  (3,)
  """
  if logits is identity:  # one object: what is compiled for it is kept
    return _of_logits(seed)
  return SampledCrossEntropy(logits, seed)


@functools.cache
def _of_logits(seed: int) -> SampledCrossEntropy:
  return SampledCrossEntropy(identity, seed)


def sampled_squared_error(
  *,
  energies: Sequence[float] | None = None,
  seed: int = 0,
) -> SampledSquaredError:
  """The loss without labels for outputs that are no logits: embeddings,
  features, regression.

  An example's loss is the inner product of its outputs with a standard normal
  vector drawn for it. Its own value means nothing; the second moment of its
  gradient is E[J^T J], J the Jacobian of the outputs: the Gauss-Newton matrix
  of half their squared error. Damages ('loss', `predict_loss`) are then that
  half, E|dy|^2 / 2, added up over the floating arrays among the outputs;
  others are not looked at.

  Args:
    energies: for each floating array, in order, the mean of an example's sum of
      squares, which `squared_error` divides by: damages are then in its unit,
      shares of each array's energy. Default 2 for each.
    seed: decides the draws, together with each example's own arrays: an example
      draws the same in whatever batch and on whatever device it comes.

  Returns:
    `loss(outputs, batch) -> (B,)`.

  Raises (when called):
    ValueError: no floating outputs, or another number of energies.

  >>> loss = sampled_squared_error()
  >>> loss({'features': jnp.zeros((3, 4, 5))}, None).shape
  (3,)
  """
  return SampledSquaredError(
    None if energies is None else tuple(map(float, energies)), seed
  )

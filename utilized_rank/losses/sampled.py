"""The loss of labels drawn from the model's own distribution."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from utilized_rank.losses.divergence import Divergence
from utilized_rank.losses.divergence import identity
from utilized_rank.losses.divergence import kl_divergence


@dataclasses.dataclass(frozen=True)
class SampledCrossEntropy:
  """See `sampled_cross_entropy`."""

  logits: Callable[[Any], jax.Array]
  seed: int

  def __call__(self, outputs: Any, batch: Any) -> jax.Array:
    scores = self.logits(outputs).astype(jnp.float32)
    key = jax.random.key(self.seed)

    def draw(mark, logits):
      return jax.random.categorical(jax.random.fold_in(key, mark), logits)

    drawn = jax.vmap(draw)(
      _marks(batch, len(scores)), jax.lax.stop_gradient(scores)
    )
    nats = -jnp.take_along_axis(
      jax.nn.log_softmax(scores), drawn[..., None], axis=-1
    )[..., 0]
    return nats.reshape(len(nats), -1).sum(1)

  @property
  def divergence(self) -> Divergence:
    """What its expectation rises by: the KL divergence of the logits."""
    return kl_divergence(self.logits)


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

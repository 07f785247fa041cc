"""How far a compressed function's outputs are from the dense one's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from utilized_rank.losses.logits import relative_entropy

# divergence(dense outputs, outputs, batch) -> (B,), not negative, 0 where the
# two agree.
Divergence = Callable[[Any, Any, Any], jax.Array]


def identity(outputs: Any) -> Any:
  """The outputs themselves, where they are the logits."""
  return outputs


def kl_divergence(
  logits: Callable[[Any], jax.Array] = identity,
) -> Divergence:
  """KL(dense || compressed) of the distributions that logits stand for.

  Args:
    logits: the logits (B, ..., K) among the outputs; the divergences of an
      example's positions are added up.

  Returns:
    `divergence(dense, outputs, batch) -> (B,)`, nats per example.

  >>> one, two = jnp.array([[0.0, 0.0]]), jnp.array([[jnp.log(3.0), 0.0]])
  >>> round(float(kl_divergence()(one, two, None)[0]), 4)
  0.1438
  """

  if logits is identity:  # one function: what is compiled for it is kept
    return _of_logits

  def divergence(dense, outputs, batch):
    return _of_logits(logits(dense), logits(outputs), batch)

  return divergence


def _of_logits(dense: Any, outputs: Any, batch: Any) -> jax.Array:
  del batch
  nats = relative_entropy(dense, outputs)
  return nats.reshape(len(nats), -1).sum(1)


def squared_error(dense: Any, outputs: Any, batch: Any) -> jax.Array:
  """Squared difference of every output, as a share of the dense ones' energy.

  Args:
    dense: pytree of the dense outputs, arrays that lead with the batch axis.
    outputs: the same of the compressed function.
    batch: not looked at.

  Returns:
    (B,): for each example its share, added up over the floating arrays.

  >>> squared_error(jnp.ones((2, 4)), jnp.zeros((2, 4)), None).tolist()
  [1.0, 1.0]
  """
  del batch
  dense, outputs = floating(dense), floating(outputs)
  if not dense:
    raise ValueError(
      'the function has no floating output to compare; pass divergence='
    )
  errors = [_squares(z - y) for y, z in zip(dense, outputs)]
  parts = [e / s for e, s in zip(errors, energies(dense), strict=True)]
  return sum(parts[1:], parts[0])


def energies(dense: Any) -> list[jax.Array]:
  """What `squared_error` divides by: for each floating array of dense outputs
  the mean of an example's sum of squares; 1 in place of 0."""
  means = [jnp.mean(_squares(y)) for y in floating(dense)]
  return [jnp.where(mean > 0, mean, 1.0) for mean in means]


def floating(outputs: Any) -> list[jax.Array]:
  """The floating arrays among outputs, float32, in order."""
  return [
    jnp.asarray(y, jnp.float32)
    for y in jax.tree.leaves(outputs)
    if jnp.issubdtype(y.dtype, jnp.floating)
  ]


def _squares(y: jax.Array) -> jax.Array:
  """(B,): an example's sum of squares."""
  return jnp.sum(jnp.square(y.reshape(len(y), -1)), axis=1)


def comes_closer(before: np.ndarray, after: np.ndarray) -> bool:
  """Whether divergences fall by more than the standard error of the fall.

  Args:
    before: of every example, (B,).
    after: of the same examples.

  >>> comes_closer(np.array([2.0, 3.0]), np.array([1.0, 1.5]))
  True
  """
  gain = before - after
  return bool(gain.mean() > gain.std() / len(gain) ** 0.5)

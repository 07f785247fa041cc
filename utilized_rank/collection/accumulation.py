"""Adding many float32 sums without drift.

A float32 sum loses an addend's low bits: after a million batches of equal
size, those of the last weigh less than the sum's rounding. Errors then grow
with the number of additions. Compensated sums (Knuth's two-sum; Kahan,
Neumaier) keep what each addition rounded off in a second array; the sum of the
two is as good as one in float64.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

ACCUMULATE = ('float32', 'compensated', 'float64')


def check(accumulate: str) -> None:
  """Raises ValueError for a way to add that there is not."""
  if accumulate not in ACCUMULATE:
    raise ValueError(
      f'accumulate must be one of {ACCUMULATE}, got {accumulate!r}'
    )


def add(high: Any, low: Any, new: Any) -> tuple[Any, Any]:
  """(high, low) + new; `low` is what `high` has rounded off, or None.

  Args:
    high: pytree of running sums.
    low: pytree like `high`, or None for plain sums.
    new: what to add.

  >>> high, low = jnp.float32(2**24), jnp.float32(0)
  >>> for _ in range(3):
  ...   high, low = add(high, low, jnp.float32(1))
  >>> float(high) + float(low) - 2**24
  3.0
  """
  if low is None:
    return jax.tree.map(jnp.add, high, new), None
  highs, treedef = jax.tree.flatten(high)
  pairs = [
    _two_sum(*three)
    for three in zip(
      highs, jax.tree.leaves(low), jax.tree.leaves(new), strict=True
    )
  ]
  unflatten = lambda values: jax.tree.unflatten(treedef, list(values))
  return unflatten(p[0] for p in pairs), unflatten(p[1] for p in pairs)


def _two_sum(high: jax.Array, low: jax.Array, new: jax.Array):
  total = high + new
  if not jnp.issubdtype(total.dtype, jnp.floating):
    return total, low
  # Exact: total + rounded == high + new. XLA does not reassociate floats; a
  # test holds it to that under jit.
  kept = total - high
  rounded = (high - (total - kept)) + (new - kept)
  return total, low + rounded

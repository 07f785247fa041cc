"""Adam whose steps are shares of each array's own size.

A few lines in place of a dependency: there is one rate, and no decay.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# Of the gradient's means. With these no update exceeds 2.4 rates, whatever the
# gradients were (Cauchy-Schwarz), so that none has to be clipped.
MEAN, SQUARE = 0.9, 0.99
# Share of the updates over which the rate rises to its peak.
WARMUP = 0.1
# Above the root of the least float32 number: what is below it has no square,
# and would be divided by nothing.
_LEAST = 1e-12


class State(NamedTuple):
  """Arrays under descent, all trees of one structure.

  Attributes:
    values: the arrays.
    mean: running mean of their gradients.
    square: that of the gradients' squares.
    sizes: what a rate of one moves each array by; scalars.
  """

  values: Any
  mean: Any
  square: Any
  sizes: Any


def start(values: Any, sizes: Any) -> State:
  """Before the first update."""
  zeros = jax.tree.map(jnp.zeros_like, values)
  return State(values, zeros, zeros, sizes)


def update(state: State, gradient: Any, count: Any, rate: Any) -> State:
  """One update (Kingma and Ba, arXiv 1412.6980).

  Args:
    state: before.
    gradient: at its values. One that is not finite moves nothing.
    count: 1 for the first update.
    rate: share of `sizes` to move by.

  >>> now = start(jnp.ones(2), jnp.asarray(2.0))
  >>> update(now, jnp.array([5.0, -0.1]), 1, 0.1).values
  Array([0.8, 1.2], dtype=float32)
  """
  leaves = jax.tree.leaves(gradient)
  fine = jnp.stack([jnp.all(jnp.isfinite(g)) for g in leaves]).all()
  gradient = jax.tree.map(lambda g: jnp.where(fine, g, 0), gradient)
  mean = jax.tree.map(
    lambda m, g: MEAN * m + (1 - MEAN) * g, state.mean, gradient
  )
  square = jax.tree.map(
    lambda v, g: SQUARE * v + (1 - SQUARE) * g * g, state.square, gradient
  )

  def move(value, m, v, size):
    m, v = m / (1 - MEAN**count), v / (1 - SQUARE**count)
    return value - rate * size * m / (jnp.sqrt(v) + _LEAST)

  values = jax.tree.map(move, state.values, mean, square, state.sizes)
  return State(values, mean, square, state.sizes)


def rate_at(count: int, steps: int, peak: float) -> float:
  """The rate of an update: up along a line, then to 0 along a cosine.

  >>> [round(rate_at(i, 20, 1.0), 2) for i in (1, 2, 11, 20)]
  [0.5, 1.0, 0.5, 0.0]
  """
  rising = max(1, round(WARMUP * steps))
  if count <= rising:
    return peak * count / rising
  done = (count - rising) / (steps - rising)
  return peak * (1 + math.cos(math.pi * done)) / 2

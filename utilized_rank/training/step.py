"""One compiled update of a training loop."""

from __future__ import annotations

from collections.abc import Callable
import functools
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from utilized_rank.host.extras import extra
from utilized_rank.training.parts import Arrays

with extra('train'):
  import optax

Array = jax.Array
Metrics = dict[str, Array]


class Objective(Protocol):
  """A scalar loss of one batch, what to log, and running statistics."""

  def __call__(
    self, params: Arrays, moving: Arrays, fixed: Any, batch: Any, rng: Array
  ) -> tuple[Array, tuple[Metrics, Arrays]]:
    """Returns the loss, metrics, and `moving` as it is afterwards.

    Args:
      params: what is trained.
      moving: running statistics.
      fixed: any pytree that stays as it is.
      batch: a batch of the data.
      rng: a key for this step alone.
    """
    ...


class State(NamedTuple):
  """What a step makes of itself.

  Attributes:
    params: what is trained, by name.
    moving: running statistics, by name.
    optimizer: the optimizer's state.
    average: exponential moving average of `params`, or None.
    step: updates so far, shape=(), dtype=int32.
  """

  params: Arrays
  moving: Arrays
  optimizer: Any
  average: Arrays | None
  step: Array

  @property
  def judged(self) -> Arrays:
    """The parameters that a run is for."""
    return self.params if self.average is None else self.average


def make(
  objective: Objective,
  optimizer: optax.GradientTransformation,
  *,
  seed: int,
  accumulate: int,
  ema: float,
) -> Callable[[State, Any, Any], tuple[State, Metrics]]:
  """`update(state, batch, fixed) -> (state, metrics)`, not compiled yet.

  Args:
    objective: what is minimised.
    optimizer: of a dict of arrays.
    seed: decides the keys of all steps.
    accumulate: parts of a batch that are run one after the other; the batch
      must divide. Part i is every so many rows from row i, so that a batch
      that is spread over devices is spread in every part.
    ema: decay of the average of parameters; 0 for none.
  """
  gradient = jax.value_and_grad(objective, has_aux=True)

  def summed(state: State, batch: Any, fixed: Any, rng: Array) -> Any:
    """Means over the parts of loss, metrics and gradient; the last moving."""

    def cut(v: Array) -> Array:
      v = v.reshape(len(v) // accumulate, accumulate, *v.shape[1:])
      return jnp.moveaxis(v, 1, 0)

    def part(carry: Any, inputs: Any) -> Any:
      moving, sums = carry
      number, rows = inputs
      key = jax.random.fold_in(rng, number)
      (loss, (metrics, moving)), grads = gradient(
        state.params, moving, fixed, rows, key
      )
      found = loss, metrics, grads
      return (moving, jax.tree.map(jnp.add, sums, found)), None

    rows = jax.tree.map(cut, batch)
    one = jax.tree.map(lambda v: v[0], rows)
    shapes = jax.eval_shape(
      gradient, state.params, state.moving, fixed, one, rng
    )
    (loss, (metrics, _)), grads = jax.tree.map(jnp.zeros_like, shapes)
    carry = state.moving, (loss, metrics, grads)
    numbers = jnp.arange(accumulate)
    (moving, sums), _ = jax.lax.scan(part, carry, (numbers, rows))
    loss, metrics, grads = jax.tree.map(lambda v: v / accumulate, sums)
    return (loss, (metrics, moving)), grads

  def update(state: State, batch: Any, fixed: Any) -> tuple[State, Metrics]:
    rng = jax.random.fold_in(jax.random.key(seed), state.step)
    if accumulate > 1:
      (loss, (metrics, moving)), grads = summed(state, batch, fixed, rng)
    else:
      (loss, (metrics, moving)), grads = gradient(
        state.params, state.moving, fixed, batch, rng
      )
    with jax.numpy_dtype_promotion('standard'):  # optax wants it
      change, moments = optimizer.update(grads, state.optimizer, state.params)
      params = optax.apply_updates(state.params, change)
    average = state.average
    if average is not None:
      mix = lambda old, new: ema * old + (1 - ema) * new
      average = jax.tree.map(mix, average, params)
    metrics = {'loss': loss, **metrics, 'grad_norm': _norm(grads)}
    return State(params, moving, moments, average, state.step + 1), metrics

  return update


def _norm(tree: Arrays) -> Array:
  return jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(tree)))


def begin(
  params: Arrays,
  moving: Arrays,
  optimizer: optax.GradientTransformation,
  ema: float,
) -> State:
  """The state before the first step: of copies, since steps donate it."""
  copy = functools.partial(jax.tree.map, lambda v: jnp.array(v, copy=True))
  params = copy(params)
  average = copy(params) if ema else None
  step = jnp.zeros((), jnp.int32)
  return State(params, copy(moving), optimizer.init(params), average, step)

"""What fine-tuning minimises and is judged by, on arrays by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from utilized_rank.collection.one_pass import check_batch
from utilized_rank.losses.divergence import Divergence
from utilized_rank.lowrank.low_rank import low_rank
from utilized_rank.moments.gradients import LossFn
from utilized_rank.training import batch_statistics
from utilized_rank.training.batch_statistics import Statistics
from utilized_rank.training.feeding import Placement
from utilized_rank.training.parts import Arrays
from utilized_rank.training.parts import Parts
from utilized_rank.walk import tracing

Array = jax.Array
# train_fn(params, batch, rng) -> outputs.
TrainFn = Callable[[Any, Any, Array], Any]


class Fixed(NamedTuple):
  """Arrays that stay as they are: of the tree, and of the dense one."""

  rest: Arrays
  dense: list[Any]


@dataclasses.dataclass(frozen=True)
class Goal:
  """(1 - a) loss + a divergence, as `step.Objective` and example by example.

  Attributes:
    fn: the function.
    parts: the compressed tree.
    dense: the dense one; only looked at where a is positive.
    loss: of outputs and a batch, or None where a is 1.
    divergence: of dense outputs, outputs and a batch.
    weight: a.
    train_fn: the function while it trains, or None.
    statistics: what moves running statistics with every batch, or None.
    compute_dtype: of what is computed, or None.
  """

  fn: Callable[[Any, Any], Any]
  parts: Parts
  dense: Any
  loss: LossFn | None
  divergence: Divergence
  weight: float
  train_fn: TrainFn | None
  statistics: Statistics | None
  compute_dtype: Any

  def arrays(self) -> tuple[Arrays, Arrays, Fixed]:
    """Trained arrays, in float32 at least; running statistics; the others."""
    trained, rest = self.parts.split()
    moving = self.parts.moving
    wide = lambda v: jnp.asarray(v, jnp.promote_types(v.dtype, jnp.float32))
    rest = {k: v for k, v in rest.items() if k not in moving}
    dense = self._dense[0] if self.weight else []
    return jax.tree.map(wide, trained), moving, Fixed(rest, dense)

  @functools.cached_property
  def _dense(self) -> Any:
    return tracing.split(self.dense)

  def tree(self, arrays: Arrays, fixed: Fixed) -> Any:
    """The compressed tree, every array in its own dtype."""
    old = self.parts.arrays
    return self.parts.join(
      {k: v.astype(old[k].dtype) for k, v in arrays.items()} | fixed.rest
    )

  def __call__(
    self, params: Arrays, moving: Arrays, fixed: Fixed, batch: Any, rng: Array
  ) -> tuple[Array, tuple[dict[str, Array], Arrays]]:
    low = self._lower
    old = self.parts.arrays
    lowered = {
      k: v.astype(self.compute_dtype or old[k].dtype) for k, v in params.items()
    }
    tree = self.parts.join(lowered | moving | low(fixed.rest))
    if self.train_fn is None:
      outputs = low_rank(self.fn)(tree, low(batch))
    else:
      outputs = low_rank(self.train_fn)(tree, low(batch), rng)
    found = self._terms(outputs, fixed, batch)
    means = {name: jnp.mean(value) for name, value in found.items()}
    if self.statistics is not None:
      again = batch_statistics.only(self.statistics, moving)
      moved = again(tree, low(batch))
      moving = {k: v.astype(moving[k].dtype) for k, v in moved.items()}
    logged = means if len(means) > 1 else {}
    return self._sum(means), (logged, moving)

  def per_example(self, outputs: Any, fixed: Fixed, batch: Any) -> Array:
    """(B,): what is minimised the mean of."""
    return self._sum(self._terms(outputs, fixed, batch))

  def _terms(self, outputs: Any, fixed: Fixed, batch: Any) -> dict[str, Array]:
    """Loss and divergence of every example, those that count."""
    found = {}
    outputs = _wide(outputs)
    if self.loss is not None and self.weight < 1:
      found['labels'] = checked(self.loss(outputs, batch), batch, 'loss')
    if self.weight > 0:
      dense = self._dense[1](self._lower(fixed.dense))
      target = _wide(self.fn(dense, self._lower(batch)))
      far = self.divergence(jax.lax.stop_gradient(target), outputs, batch)
      found['divergence'] = checked(far, batch, 'divergence')
    return found

  def _sum(self, terms: dict[str, Array]) -> Array:
    if len(terms) == 1:
      return next(iter(terms.values()))
    a = self.weight
    return (1 - a) * terms['labels'] + a * terms['divergence']

  def _lower(self, tree: Any) -> Any:
    """Floating arrays in the dtype to compute in."""
    if self.compute_dtype is None:
      return tree
    return _cast(tree, self.compute_dtype)


class Validation:
  """Mean of a metric over examples, lower being better.

  Args:
    goal: what is minimised, and the function.
    batches: gone through at every call; they may differ in size.
    metric: of outputs and a batch, (B,); None for what is minimised.
    placed: where arrays and batches are.
    fixed: arrays of the goal that stay.

  Raises:
    ValueError: the batches are an iterator, or there are none.
  """

  def __init__(
    self,
    goal: Goal,
    batches: Iterable[Any],
    metric: LossFn | None,
    placed: Placement,
    fixed: Fixed,
  ):
    if isinstance(batches, Iterator):
      raise ValueError(
        'validation is an iterator, which can be gone through once; pass a '
        'list or a loader'
      )
    self._batches, self._placed = batches, placed
    self._fixed = placed.arrays(fixed)

    def total(arrays: Arrays, fixed: Fixed, batch: Any) -> jax.Array:
      outputs = low_rank(goal.fn)(goal.tree(arrays, fixed), batch)
      if metric is None:
        values = goal.per_example(outputs, fixed, batch)
      else:
        values = checked(metric(outputs, batch), batch, 'metric')
      return jnp.sum(values.astype(jnp.float32))

    self._total = jax.jit(total)

  def __call__(self, arrays: Arrays) -> float:
    sums, count = [], 0
    for number, batch in enumerate(self._batches):
      count += check_batch(batch, number)
      batch = self._placed.arrays(batch)
      sums.append(self._total(arrays, self._fixed, batch))
    if not count:
      raise ValueError('validation has no batches')
    # Fetched at the end: nothing above waits for the device.
    return math.fsum(map(float, jax.device_get(sums))) / count


def _cast(tree: Any, dtype: Any) -> Any:
  is_float = lambda v: (
    tracing.is_array(v) and jnp.issubdtype(v.dtype, jnp.floating)
  )
  return jax.tree.map(
    lambda v: jnp.asarray(v, dtype) if is_float(v) else v, tree
  )


def _wide(tree: Any) -> Any:
  """Outputs in float32 at least."""
  return jax.tree.map(
    lambda v: (
      v.astype(jnp.promote_types(v.dtype, jnp.float32))
      if jnp.issubdtype(v.dtype, jnp.floating)
      else v
    ),
    tree,
  )


def checked(values: Array, batch: Any, what: str) -> Array:
  """Values of examples.

  Raises:
    ValueError: there is not one for each.
  """
  examples = len(jax.tree.leaves(batch)[0])
  if jnp.shape(values) != (examples,):
    raise ValueError(
      f'{what} gives {jnp.shape(values)} on a batch of {examples} examples; '
      f'it must give one number for each, ({examples},)'
    )
  return values

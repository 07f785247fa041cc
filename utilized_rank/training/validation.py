"""The score of parameters on batches that train nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
import math
from typing import Any

import jax
import jax.numpy as jnp

from utilized_rank.collection.one_pass import check_batch
from utilized_rank.lowrank.low_rank import low_rank
from utilized_rank.moments.gradients import LossFn
from utilized_rank.training.feeding import Placement
from utilized_rank.training.goal import Fixed
from utilized_rank.training.goal import Goal
from utilized_rank.training.goal import checked
from utilized_rank.training.parts import Arrays


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

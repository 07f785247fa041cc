"""The loss that stands in where none is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.dtypes import float0
import numpy as np

from utilized_rank.losses.divergence import energies
from utilized_rank.losses.sampled import SampledSquaredError
from utilized_rank.losses.sampled import sampled_squared_error
from utilized_rank.moments import masks
from utilized_rank.moments.masks import Mask
from utilized_rank.moments.masks import Masked
from utilized_rank.walk import tracing


def unlabelled(
  fn: Callable[[Any, Any], Any],
  params: Any,
  batches: Sequence[Any],
  mask: Mask | str | None = None,
) -> SampledSquaredError | None:
  """`sampled_squared_error` in the unit of `squared_error` on these batches.

  Args:
    fn: `fn(params, batch) -> outputs`.
    params: its parameters.
    batches: those that the squared error will be judged on.
    mask: as for `collect`.

  Returns:
    None where outputs hold no floating array, where they have no reverse
    derivative, and without batches.

  Raises:
    ValueError: the function does not accept the parameters or the batches.

  >>> fn = lambda params, x: x @ params['w']
  >>> unlabelled(fn, {'w': jnp.eye(2)}, [jnp.ones((3, 2))]).energies
  (2.0,)
  """
  if not batches:
    return None
  if mask is not None:
    masked = Masked(mask, 1)
    fn = masks.hidden(fn)
    batches = [masked(batch, i) for i, batch in enumerate(batches)]
  values, join = tracing.split(params)
  run = jax.jit(lambda values, batch: energies(fn(join(values), batch)))
  with tracing.explained(fn, params, batches[0]):
    found = jax.eval_shape(run, values, batches[0])
  if not found:
    return None
  loss = sampled_squared_error()

  def slopes(values, batch):
    total = lambda values: loss(fn(join(values), batch), batch).sum()
    return [v for v in jax.vjp(total, values)[1](1.0)[0] if v.dtype != float0]

  try:
    jax.eval_shape(slopes, values, batches[0])
  except Exception:  # each primitive's author raises another
    return None
  means = np.mean([run(values, batch) for batch in batches], axis=0)
  return sampled_squared_error(energies=means)

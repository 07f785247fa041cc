"""Running statistics of norms, for parameters as they are now."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from utilized_rank.host.extras import extra
from utilized_rank.lowrank.low_rank import low_rank
from utilized_rank.tree import paths

with extra('models'):
  import flax.linen as nn

COLLECTION = 'batch_stats'
# statistics(params, batch) -> params with running statistics after the batch.
Statistics = Callable[[Any, Any], Any]


def linen(model: nn.Module) -> Statistics:
  """`statistics(variables, batch)` of a module, of images.

  Args:
    model: a module with `__call__(images, *, train)`.
  """

  def statistics(variables: Any, batch: Mapping[str, Any]) -> Any:
    _, changed = model.apply(
      variables,
      batch['image'],
      train=True,
      rngs={'dropout': jax.random.key(0)},
      mutable=[COLLECTION],
    )
    return {**variables, COLLECTION: changed[COLLECTION]}

  return statistics


def only(
  statistics: Statistics, names: Iterable[str]
) -> Callable[[Any, Any], dict[str, Any]]:
  """`statistics` on trees with `LowRank` leaves, these leaves of its result."""
  wanted = list(names)

  def found(params: Any, batch: Any) -> dict[str, Any]:
    leaves, _ = paths.flatten(statistics(params, batch))
    return {name: leaves[name] for name in wanted}

  return low_rank(found)


def reestimate(
  statistics: Statistics,
  params: Any,
  batches: Iterable[Any],
  names: Iterable[str],
) -> Any:
  """Runs batches through norms that use and average each batch's statistics.

  While parameters move, running statistics lag behind; taken afterwards, with
  the parameters at rest, they fit (Wu and Johnson,
  https://arxiv.org/abs/2105.07576).

  Args:
    statistics: `statistics(params, batch) -> params`.
    params: a tree; kernels may be `LowRank`.
    batches: of the size that it trains with; with a momentum of 0.9 a hundred
      leave nothing of the old statistics.
    names: paths of the running statistics.

  Returns:
    The tree with new statistics.
  """
  names = list(names)
  if not names:
    return params
  step = jax.jit(only(statistics, names))
  for batch in batches:
    named, structure = paths.flatten(params)
    params = paths.unflatten(structure, named | step(params, batch))
  return params

"""Running statistics of batch norms, for parameters as they are now."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax

from utilized_rank.host.extras import extra
from utilized_rank.lowrank.low_rank import low_rank

with extra('models'):
  import flax.linen as nn

COLLECTION = 'batch_stats'


def reestimate(
  model: nn.Module,
  variables: Mapping[str, Any],
  batches: Iterable[Mapping[str, Any]],
) -> dict[str, Any]:
  """Runs batches through norms that use and average each batch's statistics.

  Training needs no running statistics, and while parameters move they lag
  behind; taken afterwards, with the parameters at rest, they fit (Wu and
  Johnson, https://arxiv.org/abs/2105.07576).

  Args:
    model: a module with `__call__(images, *, train)`.
    variables: its variables; kernels may be `LowRank`.
    batches: `{'image': (B, H, W, C)}` each, of the size that it trains with;
      with a momentum of 0.9 a hundred leave nothing of the old statistics.

  Returns:
    The variables with new statistics; without any, the variables as they are.
  """
  if COLLECTION not in variables:
    return dict(variables)

  @jax.jit
  @low_rank
  def statistics(variables: Any, images: jax.Array) -> Any:
    _, changed = model.apply(
      variables,
      images,
      train=True,
      rngs={'dropout': jax.random.key(0)},
      mutable=[COLLECTION],
    )
    return changed[COLLECTION]

  variables = dict(variables)
  for batch in batches:
    variables[COLLECTION] = statistics(variables, batch['image'])
  return variables

"""One share of the parameters for every kernel."""

from __future__ import annotations

import math
from typing import Any

from utilized_rank.moments.moments import Moments
from utilized_rank.products.gauge import check_gauge
from utilized_rank.products.gauge import pair_cost


def uniform_ranks(
  params: Any,
  moments: Moments,
  *,
  params_fraction: float,
  multiple_of: int = 1,
  gauge: str | None = None,
) -> dict[str, int]:
  """Every kernel keeps the same share of its own parameters.

  Args:
    params: dense parameters; only checked against the moments.
    moments: moments of the kernels to shrink.
    params_fraction: share of the kernels' parameters to keep, in (0, 1]; the
      pairs never have more.
    multiple_of: ranks are multiples of this.
    gauge: as for `factorize`; the same share then holds higher ranks.

  Returns:
    Path to the highest rank whose pair keeps no more than the share, at least
    `multiple_of`: without a gauge floor(fraction d m / (d + m)). Empty for a
    fraction of 1.

  Raises:
    ValueError: the fraction is outside (0, 1], or below what the least ranks
      cost; a multiple below 1.

  >>> import jax.numpy as jnp, utilized_rank as ur
  >>> w = jnp.ones((8, 8))
  >>> _, moments = ur.capture(lambda p, x: x @ p['w'])({'w': w}, w)
  >>> uniform_ranks({'w': w}, moments, params_fraction=0.75)
  {'w': 3}
  >>> uniform_ranks({'w': w}, moments, params_fraction=0.75, gauge='identity')
  {'w': 4}
  """
  check_gauge(gauge)
  check_params_fraction(params_fraction)
  if multiple_of < 1:
    raise ValueError(f'multiple_of must be at least 1, got {multiple_of!r}')
  if params_fraction == 1:
    return {}
  ranks = {}
  total = cost = 0
  for path in moments:
    layout = moments[path].layout
    dense = math.prod(layout.matrix_shape)
    rank = min(multiple_of, layout.full_rank)
    for higher in range(rank, layout.full_rank + 1, multiple_of):
      if pair_cost(layout, higher, gauge) <= params_fraction * dense:
        rank = higher
    pair = pair_cost(layout, rank, gauge)
    total += layout.num_groups * dense
    cost += layout.num_groups * min(pair, dense)
    if pair < dense:
      ranks[path] = rank
  if cost > params_fraction * total:
    raise ValueError(
      f'params_fraction={params_fraction} keeps {params_fraction * total:.0f}'
      f' of {total} parameters; rank {multiple_of} everywhere needs {cost}'
    )
  return ranks


def check_params_fraction(fraction: float) -> None:
  """Raises ValueError for what is no share of parameters.

  >>> check_params_fraction(0.5)
  """
  if not 0 < fraction <= 1:
    raise ValueError(f'params_fraction is a share in (0, 1], got {fraction!r}')

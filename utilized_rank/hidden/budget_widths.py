"""Widths of hidden layers within a budget."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from utilized_rank.factorization import methods
from utilized_rank.hidden.layers import Hidden
from utilized_rank.hidden.narrow_hidden import hidden_damages
from utilized_rank.moments.moments import Moments
from utilized_rank.ranks import offers
from utilized_rank.ranks.budget import one_fraction


def budget_widths(
  params: Any,
  moments: Moments,
  hidden: Hidden,
  *,
  params_fraction: float,
  multiple_of: int = 1,
  compensate_mean: bool = True,
  damping: float = methods.DAMPING,
) -> dict[str, int]:
  """The widths of least predicted loss within a budget: the optimum.

  Of layers that share a kernel only one is narrowed (`Hidden.apart`): what a
  unit costs depends on the other's width.

  Args:
    params: dense parameters.
    moments: of every second kernel's inputs, collected with a loss: layers
      have no other unit in common.
    hidden: as `find_hidden` found them.
    params_fraction: share of their kernels' parameters to keep, in (0, 1].
    multiple_of: widths are multiples of this.
    compensate_mean: as for `narrow_hidden`.
    damping: as for `narrow_hidden`.

  Returns:
    Name of the layer to its width; layers that stay as they are, are absent.

  Raises:
    ValueError: the fraction is outside (0, 1] or below what the lowest widths
      cost, or the moments lack a kernel or the gradients.
  """
  one_fraction(params_fraction, None)
  hidden = hidden.apart()
  damages = hidden_damages(
    params,
    moments,
    hidden,
    compensate_mean=compensate_mean,
    damping=damping,
  )
  found = width_offers(hidden, damages, multiple_of)
  total = sum(layer.cost * layer.width for layer in hidden.values())
  return offers.together(offers.spend(found, int(params_fraction * total)))


def width_offers(
  hidden: Hidden, damages: Mapping[str, np.ndarray], multiple_of: int
) -> list[offers.Offer]:
  """What each layer offers a budget: its widths, or to stay as it is.

  Args:
    hidden: as `find_hidden` found them.
    damages: as `hidden_damages` found them.
    multiple_of: widths are multiples of this.
  """
  return [
    offers.by_size(
      name,
      tuple(kernel.path for kernel in layer.kernels),
      layer.cost,
      np.arange(multiple_of, layer.width, multiple_of),
      layer.width,
      damages[name],
    )
    for name, layer in hidden.items()
  ]

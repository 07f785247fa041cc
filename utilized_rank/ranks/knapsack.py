"""Exact allocation of a budget among layers: a multiple-choice knapsack.

Each layer offers choices (cost, damage); one choice per layer is taken so that
the costs fit a budget and the damages add up to the least. The Lagrangian
relaxation gives a bound and, because damages fall convexly with rank, a choice
close to it; choices that cannot be part of anything better are dropped, and
dynamic programming over what is left closes the gap.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# Partial solutions kept per layer before the gap is left open.
_MOST_STATES = 200_000


class Choices(NamedTuple):
  """What one layer offers.

  Attributes:
    costs: (k,) whole numbers, ascending.
    damages: (k,) not negative.
  """

  costs: np.ndarray
  damages: np.ndarray


class Solution(NamedTuple):
  """One choice per layer.

  Attributes:
    picks: for each layer, the index of its choice.
    cost: sum of the costs.
    damage: sum of the damages.
    gap: no allocation has a damage below `damage - gap`; 0 when the solution
      is proved to be the optimum.
  """

  picks: tuple[int, ...]
  cost: int
  damage: float
  gap: float


def allocate(layers: Sequence[Choices], budget: int) -> Solution:
  """The least total damage whose total cost is within the budget.

  Args:
    layers: the choices of each layer.
    budget: most that the choices may cost together.

  Raises:
    ValueError: even the cheapest choices cost more than the budget.

  >>> one = Choices(np.array([1, 2, 4]), np.array([9.0, 3.0, 0.0]))
  >>> allocate([one, one], 6).picks in [(1, 2), (2, 1)]
  True
  """
  least = sum(int(c.costs.min()) for c in layers)
  if least > budget:
    raise ValueError(
      f'the budget is {budget}, but the cheapest choices cost {least}'
    )
  # Damages may differ by orders of magnitude; the scale keeps prices near 1.
  price = _price(layers, budget)
  best = _fill(layers, _picks(layers, price), budget)
  bound = _bound(layers, price, budget)
  if best.damage - bound <= 1e-12 * max(best.damage, 1e-300):
    return best._replace(gap=0.0)
  return _close(layers, budget, price, bound, best)


def _value(layer: Choices, price: float) -> np.ndarray:
  return layer.damages + price * layer.costs


def _picks(layers: Sequence[Choices], price: float) -> list[int]:
  # Of equally good choices the cheapest, so that the budget holds.
  return [int(np.argmin(_value(layer, price))) for layer in layers]


def _cost(layers: Sequence[Choices], picks: Sequence[int]) -> int:
  return sum(int(y.costs[i]) for y, i in zip(layers, picks, strict=True))


def _bound(layers: Sequence[Choices], price: float, budget: int) -> float:
  return sum(_value(y, price).min() for y in layers) - price * budget


def _price(layers: Sequence[Choices], budget: int) -> float:
  """The lowest price per cost at which the choices fit the budget."""
  if _cost(layers, _picks(layers, 0.0)) <= budget:
    return 0.0
  low, high = 0.0, 1.0
  while _cost(layers, _picks(layers, high)) > budget:
    low, high = high, 4 * high
  while low == 0.0 and _cost(layers, _picks(layers, high / 4)) <= budget:
    high /= 4
    if high < 1e-290:
      return high
  for _ in range(200):
    middle = (low + high) / 2
    if not low < middle < high:
      break
    if _cost(layers, _picks(layers, middle)) > budget:
      low = middle
    else:
      high = middle
  return high


def _fill(layers: Sequence[Choices], picks: list[int], budget: int) -> Solution:
  """Spends what is left on the upgrade that saves most, until none fits."""
  picks = list(picks)
  left = budget - _cost(layers, picks)
  while True:
    best, gain = None, 0.0
    for i, layer in enumerate(layers):
      extra = layer.costs - layer.costs[picks[i]]
      saved = layer.damages[picks[i]] - layer.damages
      saved = np.where(extra <= left, saved, -np.inf)
      j = int(np.argmax(saved))
      if saved[j] > gain:
        best, gain = (i, j), float(saved[j])
    if best is None:
      break
    i, j = best
    left -= int(layers[i].costs[j] - layers[i].costs[picks[i]])
    picks[i] = j
  damage = sum(float(y.damages[i]) for y, i in zip(layers, picks))
  return Solution(tuple(picks), budget - left, damage, 0.0)


def _close(
  layers: Sequence[Choices],
  budget: int,
  price: float,
  bound: float,
  best: Solution,
) -> Solution:
  """Searches all that could beat `best`, layer by layer."""
  # reduced[i][j]: how much worse than the bound anything with choice j is.
  reduced = [_value(y, price) - _value(y, price).min() for y in layers]
  gap = best.damage - bound
  order = sorted(
    range(len(layers)), key=lambda i: int(np.sum(reduced[i] <= gap))
  )
  # A partial solution: (cost, damage, reduced so far, choice, parent).
  costs = np.zeros(1, np.int64)
  damages = np.zeros(1)
  spent = np.zeros(1)
  trail: list[tuple[np.ndarray, np.ndarray]] = []
  rest = sum(int(y.costs.min()) for y in layers)
  for i in order:
    layer = layers[i]
    keep = np.flatnonzero(reduced[i] <= gap)
    rest -= int(layer.costs.min())
    cost = (costs[:, None] + layer.costs[keep]).ravel()
    damage = (damages[:, None] + layer.damages[keep]).ravel()
    total = (spent[:, None] + reduced[i][keep]).ravel()
    parent = np.repeat(np.arange(len(costs)), len(keep))
    choice = np.tile(keep, len(costs))
    alive = np.flatnonzero((total <= gap) & (cost + rest <= budget))
    # Cheapest first; a dearer one must do less damage to stay.
    alive = alive[np.lexsort((damage[alive], cost[alive]))]
    lowest = np.minimum.accumulate(damage[alive])
    first = np.r_[True, damage[alive][1:] < lowest[:-1]]
    alive = alive[first]
    if len(alive) > _MOST_STATES:
      return best._replace(gap=gap)
    costs, damages, spent = cost[alive], damage[alive], total[alive]
    trail.append((parent[alive], choice[alive]))
    if not len(alive):
      return best._replace(gap=0.0)  # nothing beats it
  winner = int(np.argmin(damages))
  if damages[winner] >= best.damage:
    return best._replace(gap=0.0)
  picks = [0] * len(layers)
  at = winner
  for i, (parent, choice) in zip(reversed(order), reversed(trail)):
    picks[i] = int(choice[at])
    at = int(parent[at])
  return Solution(
    tuple(picks), _cost(layers, picks), float(damages[winner]), 0.0
  )

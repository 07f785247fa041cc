"""What each kernel offers a budget: ranks, what they cost, what they damage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import math
from typing import Any, NamedTuple

import numpy as np

from utilized_rank.factorization import methods
from utilized_rank.factorization import shared_left
from utilized_rank.factorization.decompose import Families
from utilized_rank.factorization.shared_left import Key
from utilized_rank.moments.moments import Moments
from utilized_rank.products.gauge import pair_cost
from utilized_rank.products.gauge import pair_flops
from utilized_rank.ranks.knapsack import Choices
from utilized_rank.ranks.knapsack import allocate
from utilized_rank.ranks.latency import LatencyTable

# Combinations that are looked at together, for memory's sake.
_BLOCK = 4_000_000
# The metrics of families, and one that knows what kernels cost.
METRICS = (*methods.METRICS, 'balanced')
# Which of a family's metrics each is made of.
OF_FAMILY = {**{name: name for name in methods.METRICS}, 'balanced': 'relative'}
# What 'balanced' adds of the damage that uniform ranks minimise.
_UNIFORM = 0.3
# Kernels that an error names.
_MOST_NAMES = 3


@dataclasses.dataclass(frozen=True)
class Terms:
  """How ranks are to be paid for; see `budget_ranks`."""

  moments: Moments
  metric: str
  gauge: str | None
  by_flops: bool
  latency: LatencyTable | None
  compensate_mean: bool
  multiple_of: int
  limits: Mapping[str, tuple[int, int]]

  def times(self, key: Key) -> int:
    """How often a matrix is paid for: once each, or once per row."""
    moment = self.moments[shared_left.names_of(key)[0]]
    if self.by_flops:
      return int(np.sum(moment.count))
    return moment.layout.num_groups

  def dense_cost(self, key: Key) -> int:
    if self.latency is not None:
      return sum(self.latency.dense(name) for name in shared_left.names_of(key))
    return self.times(key) * math.prod(
      shared_left.matrix_shape(key, self.moments)
    )

  def costs(self, key: Key, ranks: np.ndarray) -> np.ndarray:
    """Of pairs, and of the constants that have no bias to go to."""
    names = shared_left.names_of(key)
    if self.latency is not None:
      return self.latency.pairs(names[0], ranks)
    extra = 0
    for name in names:
      moment = self.moments[name]
      if self.compensate_mean and not self.by_flops:
        extra += moment.layout.matrix_shape[1] * (moment.entry.bias is None)
    if len(names) > 1:
      pairs = ranks * sum(shared_left.matrix_shape(key, self.moments))
    else:
      layout = self.moments[names[0]].layout
      cost = pair_flops if self.by_flops else pair_cost
      pairs = np.array([cost(layout, int(r), self.gauge) for r in ranks])
    return (self.times(key) * (pairs + extra)).astype(np.int64)


class Offer(NamedTuple):
  """Sets of ranks, of which a budget takes one.

  Attributes:
    ranks: for each choice, the ranks that it stands for.
    choices: their costs and damages.
    names: the kernels that they are of, for errors.
  """

  ranks: list[dict[Key, int]]
  choices: Choices
  names: tuple[str, ...] = ()


def offer(terms: Terms, key: Key, families: Families) -> Offer:
  """What a kernel offers, or kernels that may share a left factor.

  Such kernels offer every combination of ranks of their own that no other
  beats in both cost and damage, and every rank of a factor for all of them.

  Raises:
    ValueError: a kernel's limits hold no rank that it can have.
  """
  names = shared_left.names_of(key)
  alone = []
  for name in names:
    alone.append(_ranks(terms, name, families))
    if not alone[-1].ranks:
      raise ValueError(
        f'{name!r} has no rank that is a multiple of {terms.multiple_of} '
        f'within its limits {list(terms.limits[name])}'
      )
  if len(names) == 1:
    return alone[0]
  return _either(functools.reduce(_both, alone), _ranks(terms, key, families))


def _ranks(terms: Terms, key: Key, families: Families) -> Offer:
  """The ranks that a key can have, dense among them if it is one kernel."""
  names = shared_left.names_of(key)
  full = min(shared_left.matrix_shape(key, terms.moments))
  limits = [terms.limits[name] for name in names if name in terms.limits]
  low = max([1, *(low for low, _ in limits)])
  high = min([full, *(high for _, high in limits)])
  ranks = np.arange(terms.multiple_of, high + 1, terms.multiple_of)
  ranks = ranks[ranks >= low]
  costs = terms.costs(key, ranks)
  damages = _damages(terms, key, families, ranks, costs)
  if len(names) == 1 and high == full:
    # Where a pair costs as much as the kernel, the kernel is better.
    dense = terms.dense_cost(key)
    cheaper = costs < dense
    ranks = np.append(ranks[cheaper], 0)
    costs = np.append(costs[cheaper], dense)
    damages = np.append(damages[cheaper], 0.0)
  return Offer(
    [{key: int(r)} if r else {} for r in ranks],
    Choices(costs, damages),
    names,
  )


def _damages(
  terms: Terms,
  key: Key,
  families: Families,
  ranks: np.ndarray,
  costs: np.ndarray,
) -> np.ndarray:
  """What pairs of these ranks and costs damage.

  'balanced' weighs a kernel by its cost c when dense: c (E + 0.3 (1 - s)^2), E
  the share of its output energy that is lost and s the share of c that is left.
  Of the second part alone uniform shares are the optimum, whatever the kernels:
  so a kernel whose energy is in a few directions keeps some of the others,
  which later layers may need.
  """
  if terms.metric != 'balanced':
    return families.damages(key, terms.metric)[ranks]
  names = shared_left.names_of(key)
  matrices = sum(terms.moments[name].layout.num_groups for name in names)
  lost = families.damages(key, OF_FAMILY['balanced'])[ranks] / matrices
  dense = terms.dense_cost(key)
  gone = np.maximum(1 - costs / dense, 0)
  return dense * (lost + _UNIFORM * gone**2)


def by_size(
  name: str,
  names: tuple[str, ...],
  cost: int,
  sizes: np.ndarray,
  width: int,
  damages: np.ndarray,
) -> Offer:
  """What kernels offer that get narrower together, or stay as they are.

  Args:
    name: the key of their size.
    names: the kernels, for errors.
    cost: of each feature that they keep.
    sizes: numbers of features that they may keep.
    width: how many they have.
    damages: (width + 1,): entry k is the damage of k features.

  >>> made = by_size('q', ('q', 'k'), 8, np.arange(1, 3), 4, np.arange(5)[::-1])
  >>> made.ranks, made.choices.costs.tolist(), made.choices.damages.tolist()
  ([{'q': 1}, {'q': 2}, {}], [8, 16, 32], [3, 2, 0])
  """
  taken: list[dict[Key, int]] = [{name: int(k)} for k in sizes]
  sizes = np.append(sizes, width)
  return Offer([*taken, {}], Choices(cost * sizes, damages[sizes]), names)


def spend(
  found: Sequence[Offer], budget: int
) -> list[tuple[dict[Key, int], int]]:
  """The choices of least total damage within a budget.

  Returns:
    For each offer the ranks that it stands for, and its cost.

  Raises:
    ValueError: the lowest ranks of all cost more.
  """
  least = [int(np.argmin(offer.choices.costs)) for offer in found]
  costs = [int(o.choices.costs[i]) for o, i in zip(found, least, strict=True)]
  if sum(costs) > budget:
    dearest = sorted(range(len(found)), key=lambda k: -costs[k])[:_MOST_NAMES]
    named = [f'{_said(found[k], least[k])}: {costs[k]:,}' for k in dearest]
    raise ValueError(
      f'the budget is {budget:,}, but the cheapest choices cost '
      f'{sum(costs):,}, of {len(found)} kernels ({"; ".join(named)}'
      f'{"; …" if len(found) > len(named) else ""}): give a larger share, or '
      'ask for less by multiple_of and limits'
    )
  picks = allocate([o.choices for o in found], budget).picks
  return [
    (offer.ranks[pick], int(offer.choices.costs[pick]))
    for offer, pick in zip(found, picks, strict=True)
  ]


def together(spent: Sequence[tuple[dict[Key, int], int]]) -> dict[Any, int]:
  """The ranks of several choices, of those that `spend` returns.

  >>> together([({'w': 3}, 12), ({}, 9)])
  {'w': 3}
  """
  return {key: rank for taken, _ in spent for key, rank in taken.items()}


def _said(offer: Offer, pick: int) -> str:
  """Whose ranks a choice is of, and which."""
  at = [
    f'{" and ".join(shared_left.names_of(key))} at rank {rank}'
    for key, rank in offer.ranks[pick].items()
  ]
  return ', '.join(at) or f'{" and ".join(offer.names)} dense'


def _both(one: Offer, two: Offer) -> Offer:
  """Every choice of one with every choice of the other, but beaten ones."""
  (costs, damages), (more_costs, more_damages) = one.choices, two.choices
  rows = max(1, _BLOCK // len(more_costs))
  kept: list[np.ndarray] = []
  for start in range(0, len(costs), rows):
    here = slice(start, start + rows)
    cost = np.add.outer(costs[here], more_costs).ravel()
    damage = np.add.outer(damages[here], more_damages).ravel()
    kept.append(_unbeaten(cost, damage) + start * len(more_costs))
  i, j = np.divmod(np.concatenate(kept), len(more_costs))
  cost, damage = costs[i] + more_costs[j], damages[i] + more_damages[j]
  best = _unbeaten(cost, damage)
  return Offer(
    [{**one.ranks[a], **two.ranks[b]} for a, b in zip(i[best], j[best])],
    Choices(cost[best], damage[best]),
    one.names + two.names,
  )


def _either(one: Offer, two: Offer) -> Offer:
  ranks = one.ranks + two.ranks
  cost = np.r_[one.choices.costs, two.choices.costs]
  damage = np.r_[one.choices.damages, two.choices.damages]
  best = _unbeaten(cost, damage)
  choices = Choices(cost[best], damage[best])
  return Offer([ranks[i] for i in best], choices, one.names)


def _unbeaten(costs: np.ndarray, damages: np.ndarray) -> np.ndarray:
  """Choices than which none is cheaper and as good, cheapest first."""
  order = np.lexsort((damages, costs))
  lowest = np.minimum.accumulate(damages[order])
  return order[np.r_[True, damages[order][1:] < lowest[:-1]]]

"""What is narrower within a budget, and pairs of factors for the rest of it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from utilized_rank.attention.heads import Attention
from utilized_rank.compression.candidates import Beginning
from utilized_rank.compression.candidates import Tried
from utilized_rank.compression.factor_pairs import closed_form
from utilized_rank.compression.factor_pairs import factor_pairs
from utilized_rank.compression.problem import Problem
from utilized_rank.factorization.factorize import factorize
from utilized_rank.factorization.kernels import scarce
from utilized_rank.hidden import one_budget
from utilized_rank.hidden.cut_moments import cut_moments
from utilized_rank.hidden.layers import Hidden
from utilized_rank.lowrank.store import on_host_tree


def narrowed(
  problem: Problem, name: str, pairs: Attention, layers: Hidden
) -> list[Beginning]:
  """Heads and layers as narrow as one budget asks for; pairs elsewhere.

  Args:
    problem: the problem.
    name: what the result is called.
    pairs: kernels of attention, of which heads may be narrower.
    layers: hidden layers that may be narrower.

  Returns:
    None of a kind where rows are fewer than features, where there is no share
    of parameters or no gradient (damages have the loss alone in common), and
    where nothing would be narrower.
  """
  less = _narrow(problem, pairs, layers, problem.budget.params_fraction)
  if less is None:
    return []
  padded = on_host_tree(less.tree)
  found = _Narrowed(problem, name, less, padded)
  return [Beginning(name, found.glance, found.search)]


def narrow_first(
  problem: Problem, name: str, layers: Hidden
) -> list[Beginning]:
  """Layers that are narrower, and pairs of what is left of all kernels.

  As narrow as the square root of the share asks for; the pairs do the rest.

  Args:
    problem: the problem.
    name: what the result is called.
    layers: hidden layers; those count whose width the function takes from
      their leaves.

  Returns:
    As `narrowed`; none where no pairs are needed either.
  """
  layers = layers.only(name for name in layers if layers[name].resizes)
  share = problem.budget.params_fraction
  if not layers or share is None:
    return []
  less = _narrow(problem, Attention({}, {}), layers, share**0.5)
  if less is None:
    return []
  moments = cut_moments(problem.moments, less.cuts)
  size = lambda m: sum(math.prod(m[path].layout.shape) for path in m)
  left = share * size(problem.moments) / size(moments)
  if left >= 1:
    return []
  # Factors are fitted behind others where both networks have one shape.
  start = dataclasses.replace(problem, anchored=False).left(
    one_budget.put_back(less.tree, less), moments, left
  )
  glance = lambda: problem.glance(closed_form(start).tree)

  def search() -> Tried:
    with problem.journal.stage(name) as at:
      found = factor_pairs(start)
      at.after = float(found.divergences.mean())
    return dataclasses.replace(found, name=name, units=less.units)

  return [Beginning(name, glance, search)]


@dataclasses.dataclass(frozen=True)
class _Narrowed:
  """A tree with narrower heads and layers, and the problem of the rest.

  Attributes:
    problem: the whole problem.
    name: what the result is called.
    less: what is narrower, and what is left to spend.
    padded: its tree in the dense one's shapes.
  """

  problem: Problem
  name: str
  less: one_budget.Narrowed
  padded: Any

  def glance(self) -> float:
    """Mean divergence on some examples, at the ranks of the one budget."""
    tree = self.padded
    if self.less.rest_ranks:
      tree = factorize(
        tree,
        self.less.rest,
        self.less.rest_ranks,
        method='loss',
        compensate_mean=self.problem.compensate_mean,
        progress=False,
      )
    return self.problem.glance(tree)

  def search(self) -> Tried:
    """The narrow tree with the best pairs at all other kernels."""
    with self.problem.journal.stage(self.name) as at:
      found = self._searched()
      at.after = float(found.divergences.mean())
    return dataclasses.replace(found, name=self.name, units=self.less.units)

  def _searched(self) -> Tried:
    less, problem = self.less, self.problem
    if less.rest:
      found = factor_pairs(
        problem.left(self.padded, less.rest, less.params_fraction)
      )
      tree = one_budget.put_back(found.tree, less)
      return dataclasses.replace(
        found,
        tree=tree,
        ranks=one_budget.ranks(tree),
        predicted={**found.predicted, **less.damages},
      )
    # What is narrower is all there is.
    tree = one_budget.put_back(less.tree, less)
    return Tried(
      tree=tree,
      ranks=one_budget.ranks(tree),
      method='loss',
      compensate_mean=problem.compensate_mean,
      divergences=problem.divergences(tree, problem.batches),
      predicted=less.damages,
    )


def _narrow(
  problem: Problem, pairs: Attention, layers: Hidden, share: float | None
) -> one_budget.Narrowed | None:
  moments = problem.moments
  if share is None or moments.grads is None or scarce(moments, moments):
    return None
  return one_budget.narrow(
    problem.params,
    moments,
    pairs,
    layers,
    params_fraction=share,
    multiple_of=problem.budget.multiple_of,
    gauge=problem.budget.gauge,
    compensate_mean=problem.compensate_mean,
  )

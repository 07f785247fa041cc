"""What is narrower within a budget, and pairs of factors for the rest of it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from utilized_rank.attention.find_attention import find_attention
from utilized_rank.attention.heads import Attention
from utilized_rank.compression.candidates import Tried
from utilized_rank.compression.factor_pairs import factor_pairs
from utilized_rank.compression.problem import Problem
from utilized_rank.hidden import one_budget
from utilized_rank.hidden.cut_moments import cut_moments
from utilized_rank.hidden.find_hidden import find_hidden
from utilized_rank.hidden.layers import Hidden
from utilized_rank.lowrank.leaf import merge
from utilized_rank.walk.interpret import UnsupportedError


def narrowed(
  problem: Problem, name: str, pairs: Attention, layers: Hidden
) -> Tried | None:
  """Heads and layers as narrow as one budget asks for; pairs elsewhere.

  Args:
    problem: the problem.
    name: what the result is called.
    pairs: kernels of attention, of which heads may be narrower.
    layers: hidden layers that may be narrower.

  Returns:
    None where rows are few, where there is no share of parameters or no loss
    (damages have nats alone in common), and where nothing would be narrower.
  """
  if problem.is_scarce:
    return None
  with problem.journal.stage(name) as at:
    found = _narrowed(problem, pairs, layers)
    if found is None:
      return None
    at.after = float(found.divergences.mean())
  return dataclasses.replace(found, name=name)


def _narrowed(
  problem: Problem, pairs: Attention, layers: Hidden
) -> Tried | None:
  less = _narrow(problem, pairs, layers, problem.budget.params_fraction)
  if less is None:
    return None
  if less.rest:
    found = factor_pairs(
      problem.left(merge(less.tree), less.rest, less.params_fraction)
    )
    tree = one_budget.put_back(found.tree, less)
    return dataclasses.replace(
      found,
      tree=tree,
      ranks=one_budget.ranks(tree),
      predicted={**found.predicted, **less.damages},
      units=less.units,
    )
  # What is narrower is all there is.
  return _tried(problem, one_budget.put_back(less.tree, less), less)


def narrow_first(problem: Problem, name: str, layers: Hidden) -> Tried | None:
  """Layers that are narrower, and pairs of what is left of all kernels.

  As narrow as the square root of the share asks for; the pairs do the rest.

  Args:
    problem: the problem.
    name: what the result is called.
    layers: hidden layers; those count whose width the function takes from
      their leaves.

  Returns:
    None where `narrowed` has none.
  """
  with problem.journal.stage(name) as at:
    found = _narrowed_first(problem, layers)
    if found is None:
      return None
    at.after = float(found.divergences.mean())
  return dataclasses.replace(found, name=name)


def _narrowed_first(problem: Problem, layers: Hidden) -> Tried | None:
  layers = layers.only(name for name in layers if layers[name].resizes)
  share = problem.budget.params_fraction
  less = None
  if layers and share is not None:
    less = _narrow(problem, Attention({}, {}), layers, share**0.5)
  if less is None or share is None:
    return None
  tree = one_budget.put_back(less.tree, less)
  moments = cut_moments(problem.moments, less.cuts)
  size = lambda m: sum(math.prod(m[path].layout.shape) for path in m)
  left = share * size(problem.moments) / size(moments)
  if left >= 1:
    return _tried(problem, tree, less)
  # Factors are fitted behind others where both networks have one shape.
  start = dataclasses.replace(problem, anchored=False)
  found = factor_pairs(start.left(tree, moments, left))
  return dataclasses.replace(found, units=less.units)


def _narrow(
  problem: Problem, pairs: Attention, layers: Hidden, share: float | None
) -> one_budget.Narrowed | None:
  moments = problem.moments
  if problem.is_scarce or share is None or moments.grads is None:
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


def _tried(problem: Problem, tree: Any, less: one_budget.Narrowed) -> Tried:
  """A tree without pairs of factors."""
  return Tried(
    tree=tree,
    ranks=one_budget.ranks(tree),
    method='loss',
    compensate_mean=problem.compensate_mean,
    divergences=problem.divergences(tree, problem.batches),
    predicted=less.damages,
    units=less.units,
  )


def attention(problem: Problem) -> Attention:
  """Pairs of attention's kernels; none where the function hides them."""
  try:
    return find_attention(problem.fn, problem.params, problem.batches[0])
  except UnsupportedError:
    return Attention({}, {})


def hidden(problem: Problem) -> Hidden:
  """Hidden layers whose kernels the problem has moments of."""
  found = find_hidden(problem.fn, problem.params, problem.batches[0])
  return found.only(
    name
    for name, layer in found.items()
    if all(kernel.path in problem.moments for kernel in layer.kernels)
  )

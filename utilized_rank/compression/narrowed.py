"""What is narrower within a budget, and pairs of factors for the rest of it."""

from __future__ import annotations

import dataclasses

from utilized_rank.attention.find_attention import find_attention
from utilized_rank.attention.heads import Attention
from utilized_rank.compression.candidates import Tried
from utilized_rank.compression.factor_pairs import factor_pairs
from utilized_rank.compression.problem import Problem
from utilized_rank.hidden import one_budget
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
  share, moments = problem.budget.params_fraction, problem.moments
  if share is None or moments.grads is None:
    return None
  less = one_budget.narrow(
    problem.params,
    moments,
    pairs,
    layers,
    params_fraction=share,
    multiple_of=problem.budget.multiple_of,
    gauge=problem.budget.gauge,
    compensate_mean=problem.compensate_mean,
  )
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
  tree = one_budget.put_back(less.tree, less)
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

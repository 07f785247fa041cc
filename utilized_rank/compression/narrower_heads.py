"""Narrower attention heads, and pairs of factors within what they leave."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
from typing import Any

from utilized_rank.attention import one_budget
from utilized_rank.attention.find_attention import find_attention
from utilized_rank.attention.heads import Attention
from utilized_rank.compression.candidates import Tried
from utilized_rank.compression.factor_pairs import factor_pairs
from utilized_rank.compression.problem import Problem
from utilized_rank.factorization.kernels import scarce
from utilized_rank.lowrank.leaf import merge
from utilized_rank.walk.interpret import UnsupportedError

_NAME = 'narrower heads'


def narrower_heads(problem: Problem) -> Tried | None:
  """Heads as narrow as one budget asks for; pairs at the other kernels.

  Returns:
    None where rows are few, where there is no share of parameters or no loss
    (damages of heads and of pairs have nats alone in common), and where no
    head would be narrower.
  """
  if scarce(problem.moments, problem.moments):
    return None
  with problem.journal.stage(_NAME) as at:
    found = _narrowed(problem)
    if found is not None:
      at.after = float(found.divergences.mean())
  return found


def _narrowed(problem: Problem) -> Tried | None:
  share, moments = problem.budget.params_fraction, problem.moments
  if share is None or moments.grads is None:
    return None
  less = one_budget.narrow(
    problem.params,
    moments,
    _attention(problem.fn, problem.params, problem.batches[0]),
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
    return dataclasses.replace(
      found,
      tree=one_budget.put_back(found.tree, less),
      ranks=found.ranks | less.ranks,
      name=_NAME,
      predicted={**found.predicted, **less.damages},
    )
  # Attention's kernels are all there are.
  return Tried(
    tree=less.tree,
    ranks=less.ranks,
    method='loss',
    compensate_mean=problem.compensate_mean,
    divergences=problem.divergences(less.tree, problem.batches),
    name=_NAME,
    predicted=less.damages,
  )


def _attention(
  fn: Callable[[Any, Any], Any], params: Any, batch: Any
) -> Attention:
  """Pairs of attention's kernels; none where the function hides them."""
  try:
    return find_attention(fn, params, batch)
  except UnsupportedError:
    return Attention({}, {})

"""Narrower attention heads, and pairs of factors within what they leave."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import math
from typing import Any

from utilized_rank.attention import one_budget
from utilized_rank.attention.find_attention import find_attention
from utilized_rank.attention.heads import Attention
from utilized_rank.compression.candidates import Tried
from utilized_rank.compression.factor_pairs import factor_pairs
from utilized_rank.compression.problem import Problem
from utilized_rank.factorization.factorize import factorize
from utilized_rank.lowrank.store import on_host_tree
from utilized_rank.walk.interpret import UnsupportedError

# What a search gains differs between two kinds by less than this factor.
_FAR = 2.0


def narrower_heads(problem: Problem) -> Tried | None:
  """Heads as narrow as one budget asks for; pairs at the other kernels.

  Returns:
    None where rows are few, where there is no share of parameters or no loss
    (damages of heads and of pairs have nats alone in common), and where no
    head would be narrower.
  """
  share, moments = problem.budget.params_fraction, problem.moments
  if problem.is_scarce or share is None or moments.grads is None:
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
  start = on_host_tree(less.tree)
  if _begins_far(problem, less, start):
    return None
  if less.rest:
    found = factor_pairs(problem.left(start, less.rest, less.params_fraction))
    tree = one_budget.put_back(found.tree, less)
    return dataclasses.replace(found, tree=tree, ranks=found.ranks | less.ranks)
  # Attention's kernels are all there are.
  return Tried(
    tree=less.tree,
    ranks=less.ranks,
    method='loss',
    compensate_mean=problem.compensate_mean,
    divergences=problem.divergences(less.tree, problem.batches),
  )


def _begins_far(
  problem: Problem, less: one_budget.Narrowed, start: Any
) -> bool:
  """Whether the heads and pairs that one budget asks for are so much further
  off than pairs alone that the same search from there would not catch up."""
  if problem.to_beat is None:
    return False
  tree = start
  if less.rest_ranks:
    tree = factorize(
      start,
      less.rest,
      less.rest_ranks,
      method='loss',
      compensate_mean=problem.compensate_mean,
      progress=False,
    )
  few = problem.batches[: math.ceil(len(problem.batches) / 4)]
  each = problem.divergences(tree, few)
  return bool(each.mean() > _FAR * problem.to_beat)


def _attention(
  fn: Callable[[Any, Any], Any], params: Any, batch: Any
) -> Attention:
  """Pairs of attention's kernels; none where the function hides them."""
  try:
    return find_attention(fn, params, batch)
  except UnsupportedError:
    return Attention({}, {})

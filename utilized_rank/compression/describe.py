"""What was chosen, as plain data, from the tree that came out."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from utilized_rank.compression.candidates import Compressed
from utilized_rank.compression.candidates import Tried
from utilized_rank.compression.problem import Problem
from utilized_rank.losses.sampled import SampledSquaredError
from utilized_rank.lowrank.leaf import LowRank
from utilized_rank.lowrank.leaf import count_params
from utilized_rank.lowrank.leaf import is_low_rank
from utilized_rank.lowrank.narrow_heads import NarrowHeads
from utilized_rank.moments.coverage import NOT_SELECTED
from utilized_rank.report.choice import Choice
from utilized_rank.report.choice import Kept
from utilized_rank.tree import paths

NO_PAIR = 'no pair would be smaller'
ELSEWHERE = 'its share buys more elsewhere'


def choice(problem: Problem, best: Compressed) -> Choice:
  """What was chosen of all that a problem is about, and how.

  Args:
    problem: whose journal says what was done.
    best: what came out.
  """
  small, _ = paths.flatten(best.tree, is_low_rank)
  lefts = {
    leaf.left
    for leaf in small.values()
    if is_low_rank(leaf) and leaf.left is not None
  }
  kept = [_kept(problem, best, path, small[path], lefts)
          for path in problem.moments]  # fmt: skip
  known = problem.moments.coverage
  for leaf in () if known is None else known.left_out:
    if leaf.why == NOT_SELECTED:
      kept.append(
        Kept(leaf.path, 'dense', leaf.size, leaf.size, why=NOT_SELECTED)
      )
  divergence = None
  if isinstance(best, Tried):
    divergence = float(best.divergences.mean())
  predicted_unit = "share of the output's energy"
  if problem.moments.grads is not None:
    predicted_unit = 'nats'
    if isinstance(problem.loss, SampledSquaredError):
      is_plain = problem.loss.energies is None
      predicted_unit = 'half of the squared error' if is_plain else problem.unit
  return Choice(
    method=best.method,
    damping=best.damping,
    divergence=divergence,
    unit=problem.unit,
    predicted_unit=predicted_unit,
    kernels=tuple(kept),
    contenders=tuple(problem.journal.contenders),
    stages=tuple(problem.journal.stages),
  )


def _kept(
  problem: Problem, best: Compressed, path: str, leaf: Any, lefts: set[str]
) -> Kept:
  layout = problem.moments[path].layout
  before = math.prod(layout.shape)
  kind = _kind(leaf, path in lefts, path in best.units)
  if kind == 'dense':
    return Kept(path, kind, before, before, why=_why_dense(problem, path))
  rank, most = best.ranks.get(path), layout.full_rank
  if isinstance(leaf, NarrowHeads):
    most = leaf.layout.atoms[leaf.head]
  return Kept(
    path,
    kind,
    before,
    count_params(leaf),
    None if rank is None else int(np.max(rank)),
    most,
    best.predicted.get(path),
    best.measured.get(path),
  )


def _kind(leaf: Any, gives_left: bool, of_units: bool) -> str:
  """What stands in a kernel's place, a key of `choice.KINDS`."""
  if isinstance(leaf, NarrowHeads):
    return 'narrower hidden layer' if of_units else 'narrower heads'
  if isinstance(leaf, LowRank):
    if leaf.left is not None or gives_left:
      return 'shared left factor'
    return 'pair' if leaf.order is None else 'identity pair'
  return 'narrower hidden layer' if of_units else 'dense'


def _why_dense(problem: Problem, path: str) -> str:
  terms = problem.budget.terms(problem.moments, problem.compensate_mean)
  least = terms.costs(path, np.array([problem.budget.multiple_of]))[0]
  return ELSEWHERE if least < terms.dense_cost(path) else NO_PAIR

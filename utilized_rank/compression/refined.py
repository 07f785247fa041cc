"""A tree, trained on the dense outputs."""

from __future__ import annotations

import dataclasses
from typing import Any

from utilized_rank.compression.candidates import Compressed
from utilized_rank.compression.candidates import Tried
from utilized_rank.compression.problem import Problem
from utilized_rank.refit.distill import NoDerivative
from utilized_rank.refit.distill import distill
from utilized_rank.refit.distill import hold_out

STAGE = 'refine'


def refined(problem: Problem, best: Compressed, steps: int) -> Compressed:
  """The same ranks, trained; as it is where that brings nothing nearer.

  Args:
    problem: its `training` examples train and judge.
    best: what was chosen.
    steps: number of updates; 0 for none.
  """
  if not steps:
    return best
  with problem.journal.stage(STAGE) as at:
    if isinstance(best, Tried):
      at.before = float(best.divergences.mean())
    tree = _trained(problem, best.tree, steps)
    if tree is best.tree:
      return best
    found = problem.divergences(tree, problem.batches)
    at.after = float(found.mean())
  return dataclasses.replace(best, tree=tree).judged(found)


def rehearsed(problem: Problem, found: Compressed, steps: int) -> Tried:
  """The same ranks, trained, judged on examples that trained nothing.

  Args:
    problem: as for `refined`.
    found: what one kind of compression came to.
    steps: number of updates.
  """
  _, held = hold_out(problem.training)
  with problem.journal.stage(f'{STAGE} {found.name}') as at:
    tree = _trained(problem, found.tree, steps)
    judged = problem.divergences(tree, held)
    at.after = float(judged.mean())
  return dataclasses.replace(found, tree=tree).judged(judged)


def _trained(problem: Problem, tree: Any, steps: int) -> Any:
  """`distill`; the tree itself where nothing is nearer or has no derivative.

  That the function has no derivative is said where ranks are tuned.
  """
  try:
    return distill(
      problem.fn,
      problem.params,
      tree,
      problem.training,
      divergence=problem.divergence,
      steps=steps,
      # Mixtures of examples would be padded where one of them is.
      mixup=problem.mask is None,
      progress=problem.progress,
    )
  except NoDerivative:
    return tree

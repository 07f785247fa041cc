"""Whether what fits few data is better than what looks at none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from utilized_rank.collection.collect import collect
from utilized_rank.collection.one_pass import check_batch
from utilized_rank.compression.candidates import Compressed
from utilized_rank.compression.candidates import Tried
from utilized_rank.compression.problem import Problem
from utilized_rank.factorization.factorize import factorize
from utilized_rank.losses.divergence import comes_closer
from utilized_rank.moments.moments import Moments
from utilized_rank.ranks.uniform import uniform_ranks
from utilized_rank.tree import paths

Fit = Callable[[Problem], Tried]


def unfitted(problem: Problem) -> Compressed:
  """Truncated SVDs of one share of every kernel: no data are looked at.

  The same share of every kernel's parameters is that share of its FLOPs.
  """
  ranks = uniform_ranks(
    problem.params,
    problem.moments,
    params_fraction=problem.budget.fraction,
    multiple_of=problem.budget.multiple_of,
    gauge=problem.budget.gauge,
  )
  tree = factorize(
    problem.params,
    problem.moments,
    ranks,
    method='weight',
    compensate_mean=False,
    gauge=problem.budget.gauge,
    progress=False,
  )
  return Compressed(
    tree=tree,
    ranks=ranks,
    method='weight',
    compensate_mean=False,
    name='truncated SVD',
  )


def generalises(problem: Problem, blind: Any, fit: Fit) -> bool:
  """Whether a tree fitted to data beats one made without, on other data.

  Each half of the examples is compressed for, and judged on the other one.

  Args:
    problem: of its moments only which kernels they are of, and whether they
      have gradients.
    blind: the tree to beat, such as truncated SVDs.
    fit: makes the tree that is compared, of the problem on a half.

  Returns:
    Whether outputs are closer to the dense ones by more than the standard
    error of the difference; False where there is but one example.
  """
  halves = _halves(problem.batches)
  if halves is None:
    return False
  before: list[np.ndarray] = []
  after: list[np.ndarray] = []
  for part, judge in (halves, halves[::-1]):
    fitted = fit(problem.on_part(_collected(problem, part), part)).tree
    for tree, found in ((blind, before), (fitted, after)):
      found.append(problem.divergences(tree, judge))
  return comes_closer(np.concatenate(before), np.concatenate(after))


def _collected(problem: Problem, batches: list[Any]) -> Moments:
  """Moments of the problem's kernels on some of its batches."""
  return collect(
    problem.fn,
    problem.params,
    batches,
    loss=None if problem.moments.grads is None else problem.loss,
    mask=problem.mask,
    select=paths.only(problem.moments),
    progress=False,
  )


def _halves(batches: Sequence[Any]) -> tuple[list[Any], list[Any]] | None:
  """Every other batch, or the two halves of the only one."""
  if len(batches) > 1:
    return list(batches[::2]), list(batches[1::2])
  middle = check_batch(batches[0], 0) // 2
  if not middle:
    return None
  part = lambda cut: jax.tree.map(lambda v: v[cut], batches[0])
  return [part(slice(middle))], [part(slice(middle, None))]

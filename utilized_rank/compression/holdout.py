"""What is nearest on examples that it was not fitted to, where data are few.

Three quarters of the examples make moments, ranks and factors, and the last one
judges; then the first quarter takes its place. Compared are the truncated SVD
of the weights, which looks at no data, factors of closed form at the ranks of
one prediction (`budget_ranks`, `factorize`), and what `factor_pairs` searches.
A later kind is taken where it is closer than those before it by more than the
standard error. (Ranks tried on the quarter that then judges fit it: of
KWT-1, 21 clips, they say .06 nats there and are .30 elsewhere, those tried on
all that makes the moments are .19.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from utilized_rank.collection.collect import collect
from utilized_rank.collection.one_pass import check_batch
from utilized_rank.compression.candidates import Compressed
from utilized_rank.compression.factor_pairs import CLOSED_FORM
from utilized_rank.compression.factor_pairs import TUNED
from utilized_rank.compression.factor_pairs import closed_form
from utilized_rank.compression.factor_pairs import factor_pairs
from utilized_rank.compression.problem import Problem
from utilized_rank.factorization.factorize import factorize
from utilized_rank.losses.divergence import comes_closer
from utilized_rank.moments.merging import merge_moments
from utilized_rank.moments.moments import Moments
from utilized_rank.ranks.uniform import uniform_ranks
from utilized_rank.tree import paths

_HELD_OUT = 'examples held out'
_PARTS = 4


# The problem on the examples that fit, and the batches that judge.
_Turn = tuple[Problem, list[Any]]


def nearest_unsearched(problem: Problem) -> Compressed | None:
  """What is nearer on held-out examples than what a search finds.

  Args:
    problem: whose examples are few.

  Returns:
    The truncated SVDs, or the factors of one prediction, made of all examples;
    None where the search pays. SVDs where there is but one example.
  """
  blind = unfitted(problem)
  parts = _parts(problem.batches)
  if len(parts) < 2:
    return blind
  turns = _turns(problem, parts)
  best, found = blind.name, _judged(turns, [blind.tree] * len(turns))
  compared = problem.journal.compared
  compared(best, None, found, True, _HELD_OUT)
  kinds = {CLOSED_FORM: closed_form, TUNED: factor_pairs}
  for name, fit in kinds.items():
    each = _judged(turns, [fit(part).tree for part, _ in turns])
    closer = comes_closer(found, each)
    compared(name, found, each, closer, _HELD_OUT)
    if closer:
      best, found = name, each
  if best == TUNED:
    return None
  made = closed_form(problem) if best == CLOSED_FORM else blind
  return made.judged(found)


def _judged(turns: Sequence[_Turn], trees: Sequence[Any]) -> np.ndarray:
  """Divergences of all examples that judge, of a tree for each turn."""
  return np.concatenate(
    [
      part.divergences(tree, judge)
      for (part, judge), tree in zip(turns, trees, strict=True)
    ]
  )


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


def _turns(problem: Problem, parts: Sequence[list[Any]]) -> list[_Turn]:
  """The first part judges what the others make, and then the last one does.

  Each part is run through once: moments add.
  """
  first, *middle, last = parts
  inside = [batch for part in middle for batch in part]
  sums = [_collected(problem, part) for part in (first, inside, last) if part]
  found: list[_Turn] = []
  for fit, judge, moments in (
    (first + inside, last, sums[:-1]),
    (inside + last, first, sums[1:]),
  ):
    whole = moments[0] if len(moments) == 1 else merge_moments(*moments)
    found.append((problem.on_part(whole, fit), judge))
  return found


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


def _parts(batches: Sequence[Any]) -> list[list[Any]]:
  """Up to four parts: every fourth batch, or slices of few batches."""
  if len(batches) >= _PARTS:
    return [list(batches[i::_PARTS]) for i in range(_PARTS)]
  found: list[list[Any]] = []
  each = -(-_PARTS // len(batches))
  for number, batch in enumerate(batches):
    size = check_batch(batch, number)
    ends = [size * i // each for i in range(each + 1)]
    cuts = [slice(*ends[i : i + 2]) for i in range(each)]
    found += [
      [jax.tree.map(lambda v, cut=cut: v[cut], batch)]
      for cut in cuts
      if cut.start < cut.stop
    ]
  return found

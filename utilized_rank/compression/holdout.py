"""What is nearest on examples that it was not fitted to, where data are few.

Three quarters of the examples make the moments and the factors, the last one
chooses ranks and judges; then the first quarter takes its place. Compared are
the truncated SVD of the weights, which looks at no data, factors of closed form
at the ranks of one prediction (`budget_ranks`, `factorize`), those at ranks
that trials chose, and factors fitted one behind the other. A later kind is
taken where it is closer than those before it by more than the standard error.
What is taken is then made of all examples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import dataclasses
from typing import Any

import jax
import numpy as np

from utilized_rank.collection.collect import collect
from utilized_rank.collection.one_pass import check_batch
from utilized_rank.compression import factor_pairs
from utilized_rank.compression.candidates import Compressed
from utilized_rank.compression.problem import Problem
from utilized_rank.factorization.factorize import factorize
from utilized_rank.losses.divergence import comes_closer
from utilized_rank.moments.merging import merge_moments
from utilized_rank.moments.moments import Moments
from utilized_rank.ranks.uniform import uniform_ranks
from utilized_rank.tree import paths

_HELD_OUT = 'examples held out'
_PARTS = 4


@dataclasses.dataclass(frozen=True)
class _Turn:
  """The problem on the examples that fit, and on those that judge.

  Attributes:
    fit: moments and batches of most examples.
    judge: the same moments, the batches of the others.
  """

  fit: Problem
  judge: Problem


@dataclasses.dataclass(frozen=True)
class _Kind:
  """A kind of trees.

  Attributes:
    name: what it is.
    trees: one for each turn.
    make: makes the one of all examples.
  """

  name: str
  trees: list[Any]
  make: Callable[[], Compressed]

  def judged(self, turns: Sequence[_Turn]) -> np.ndarray:
    """Divergences of all examples that judge."""
    return np.concatenate(
      [
        turn.judge.divergences(tree, turn.judge.batches)
        for turn, tree in zip(turns, self.trees, strict=True)
      ]
    )


def nearest_held_out(problem: Problem) -> Compressed:
  """The nearest kind on held-out examples, made of all of them.

  Args:
    problem: of its moments only which kernels they are of, and whether they
      have gradients, are looked at before what is taken is made.

  Returns:
    Truncated SVDs where there is but one example.
  """
  blind = unfitted(problem)
  parts = _parts(problem.batches)
  if len(parts) < 2:
    return blind
  turns = _turns(problem, parts)
  best = _Kind(blind.name, [blind.tree] * len(turns), lambda: blind)
  found = best.judged(turns)
  compared = problem.journal.compared
  compared(best.name, None, found, True, _HELD_OUT)
  for kind in _kinds(problem, turns):
    each = kind.judged(turns)
    closer = comes_closer(found, each)
    compared(kind.name, found, each, closer, _HELD_OUT)
    if closer:
      best, found = kind, each
  return best.make().judged(found)


def _kinds(problem: Problem, turns: Sequence[_Turn]) -> Iterator[_Kind]:
  """What looks at data, the cheapest first."""
  closed = [factor_pairs.closed_form(turn.fit) for turn in turns]
  yield _Kind(
    factor_pairs.CLOSED_FORM,
    [one.tree for one in closed],
    lambda: factor_pairs.closed_form(problem),
  )
  tuned = [factor_pairs.tuned(turn.judge) for turn in turns]
  yield _Kind(
    factor_pairs.TUNED,
    [one.tree for one in tuned],
    lambda: factor_pairs.like(problem, tuned[0]),
  )
  trees = [
    factor_pairs.anchored_tree(turn.fit, one)
    for turn, one in zip(turns, tuned, strict=True)
  ]
  if all(tree is not None for tree in trees):
    yield _Kind(
      factor_pairs.ANCHORED,
      trees,
      lambda: dataclasses.replace(
        tuned[0],
        tree=factor_pairs.anchored_tree(problem, tuned[0]),
        name=factor_pairs.ANCHORED,
      ),
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
  found = []
  for fit, judge, moments in (
    (first + inside, last, sums[:-1]),
    (inside + last, first, sums[1:]),
  ):
    whole = moments[0] if len(moments) == 1 else merge_moments(*moments)
    found.append(
      _Turn(problem.on_part(whole, fit), problem.on_part(whole, judge))
    )
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

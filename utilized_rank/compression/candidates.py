"""Trees that solve a problem of compression, and the nearest of them."""

from __future__ import annotations

from collections.abc import Iterable
import dataclasses
from typing import Any, Protocol

import numpy as np

from utilized_rank.compression.problem import Problem
from utilized_rank.factorization import methods
from utilized_rank.losses.divergence import comes_closer
from utilized_rank.moments.moments import Moments
from utilized_rank.storage.recipe import Recipe


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compressed:
  """A tree for `low_rank(fn)`, and how it was made.

  Attributes:
    tree: the parameters.
    ranks: of its factored leaves, by path.
    method: as for `factorize`.
    damping: as for `factorize`.
    compensate_mean: as for `factorize`.
  """

  tree: Any
  ranks: dict[str, int]
  method: str
  damping: float = methods.DAMPING
  compensate_mean: bool = True

  def recipe(self, moments: Moments) -> Recipe:
    """What rebuilds the tree's shapes.

    Args:
      moments: all that was collected.
    """
    return Recipe.of(
      self.tree,
      moments,
      self.ranks,
      method=self.method,
      compensate_mean=self.compensate_mean,
      damping=self.damping,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tried(Compressed):
  """One that was tried on the problem's batches.

  Attributes:
    divergences: of every example, (B,), from the dense outputs.
    predicted: mean divergence of what was predicted to be best, before
      trials; None where that is not known.
  """

  divergences: np.ndarray
  predicted: float | None = None


class Candidate(Protocol):
  """A kind of compression, such as pairs of factors or narrower heads."""

  def __call__(self, problem: Problem) -> Tried | None:
    """The best of its kind within the budget; None where there is none."""


def nearest(best: Tried, others: Iterable[Tried | None]) -> Tried:
  """The one whose outputs are nearest to the dense ones.

  A later one replaces an earlier one only where outputs are closer by more
  than the standard error of the difference.

  Args:
    best: the first, to be beaten.
    others: tried on the same examples, None where there is none of a kind;
      looked at one by one, so that two at a time are in memory if they are
      made so.

  >>> one, two = (
  ...     Tried(tree=None, ranks={'w': r}, method='loss', divergences=d)
  ...     for r, d in ((2, np.array([2.0, 3.0])), (1, np.array([1.0, 1.5]))))
  >>> nearest(one, [None, two]).ranks
  {'w': 1}
  """
  for other in others:
    if other is not None and comes_closer(best.divergences, other.divergences):
      best = other
  return best

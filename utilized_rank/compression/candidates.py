"""Trees that solve a problem of compression, and the nearest of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
import dataclasses
from typing import Any, Protocol

import numpy as np

from utilized_rank.compression.journal import Journal
from utilized_rank.compression.problem import Problem
from utilized_rank.factorization import methods
from utilized_rank.losses.divergence import comes_closer
from utilized_rank.moments.moments import Moments
from utilized_rank.storage.recipe import Recipe

# What a search gains differs between two kinds by less than this factor.
FAR = 2.0
_AT_A_GLANCE = 'where its search would begin'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compressed:
  """A tree for `low_rank(fn)`, and how it was made.

  Attributes:
    tree: the parameters.
    ranks: of its factored leaves, by path.
    method: as for `factorize`.
    damping: as for `factorize`.
    compensate_mean: as for `factorize`.
    name: what it is, in a word or two.
    predicted: damage that was predicted of each compressed leaf, by path.
    measured: what trials say of it.
    units: paths of kernels whose narrow leaves are of a hidden layer.
  """

  tree: Any
  ranks: dict[str, int]
  method: str
  damping: float = methods.DAMPING
  compensate_mean: bool = True
  name: str = ''
  predicted: Mapping[str, float] = dataclasses.field(default_factory=dict)
  measured: Mapping[str, float] = dataclasses.field(default_factory=dict)
  units: frozenset[str] = frozenset()

  def judged(self, divergences: np.ndarray) -> Tried:
    """The same, with what was seen of it.

    Args:
      divergences: of every example that judged, (B,).
    """
    known = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
    return Tried(**{**known, 'divergences': divergences})

  def recipe(self, moments: Moments, params: Any) -> Recipe:
    """What rebuilds the tree's shapes.

    Args:
      moments: all that was collected.
      params: the dense parameters.
    """
    return Recipe.of(
      self.tree,
      moments,
      self.ranks,
      method=self.method,
      compensate_mean=self.compensate_mean,
      damping=self.damping,
      params=params,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tried(Compressed):
  """One that was tried on the problem's batches.

  Attributes:
    divergences: of every example, (B,), from the dense outputs.
  """

  divergences: np.ndarray


@dataclasses.dataclass(frozen=True)
class Beginning:
  """Where the search for the best tree of a kind begins.

  Attributes:
    name: of the kind.
    glance: mean divergence, on some of the examples, of the tree that one
      prediction asks for.
    search: finds the best of the kind.
  """

  name: str
  glance: Callable[[], float]
  search: Callable[[], Tried]


class Candidate(Protocol):
  """A kind of compression, such as pairs of factors or narrower heads."""

  def __call__(self, problem: Problem) -> list[Beginning]:
    """Where its searches would begin; empty where there is none."""


def promising(
  found: list[Beginning], journal: Journal | None = None
) -> list[Beginning]:
  """Those that begin no further off than the same search may gain.

  Args:
    found: of all kinds.
    journal: where it is written down which are not searched.

  >>> begin = lambda name, far: Beginning(name, lambda: far, lambda: None)
  >>> some = promising([begin('a', 1.0), begin('b', 0.3), begin('c', 0.5)])
  >>> [one.name for one in some]
  ['b', 'c']
  """
  seen = [one.glance() for one in found]
  least = min((far for far in seen if not np.isnan(far)), default=np.nan)
  # Below zero a divergence is rounding, as one so far above it is.
  most = FAR * abs(least)
  kept = []
  for one, far in zip(found, seen, strict=True):
    if far <= most or np.isnan(most):
      kept.append(one)
    elif journal is not None:
      journal.compared(one.name, None, np.array([far]), False, _AT_A_GLANCE)
  return kept


def nearest(
  best: Tried,
  others: Iterable[Tried | None],
  journal: Journal | None = None,
  judged: str = '',
) -> Tried:
  """The one whose outputs are nearest to the dense ones.

  A later one replaces an earlier one only where outputs are closer by more
  than the standard error of the difference.

  Args:
    best: the first, to be beaten.
    others: tried on the same examples, None where there is none of a kind;
      looked at one by one, so that two at a time are in memory if they are
      made so.
    journal: where the comparisons are written down; None for nowhere.
    judged: on which examples, as for `Journal.compared`.

  >>> one, two = (
  ...     Tried(tree=None, ranks={'w': r}, method='loss', divergences=d)
  ...     for r, d in ((2, np.array([2.0, 3.0])), (1, np.array([1.0, 1.5]))))
  >>> nearest(one, [None, two]).ranks
  {'w': 1}
  """
  for other in others:
    if other is None:
      continue
    closer = comes_closer(best.divergences, other.divergences)
    if journal is not None:
      journal.compared(
        other.name, best.divergences, other.divergences, closer, judged
      )
    if closer:
      best = other
  return best

"""Ranks chosen by what they do to the outputs, not by predictions alone.

Predicted damages (`budget_ranks`) are quadratic and take every kernel alone;
where much is cut both fail, and which prediction fails least differs from
network to network. So the allocations that several predictions ask for are
tried on data, and the best is then corrected: one backward pass through the
compressed function tells what each kernel's discarded directions cost where
the network now is, the predictions are scaled to it, and the budget is spent
anew, as long as the outputs come closer to the dense function's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import functools
from typing import Any

import numpy as np

from utilized_rank.collection.one_pass import several
from utilized_rank.factorization import methods
from utilized_rank.factorization.decompose import Families
from utilized_rank.factorization.decompose import decompose
from utilized_rank.host.progress import track
from utilized_rank.host.warning import warn
from utilized_rank.losses.divergence import Divergence
from utilized_rank.losses.divergence import comes_closer
from utilized_rank.moments.gradients import first_line
from utilized_rank.moments.moments import Moments
from utilized_rank.ranks.budget import budget_ranks
from utilized_rank.ranks.offers import OF_FAMILY
from utilized_rank.ranks.trials import Trials
from utilized_rank.walk import compat
from utilized_rank.walk import tracing

# Of the gradient moment's mean diagonal. Little trusts the quadratic
# approximation of the loss, much tends to 'output'; no value is best for all.
DAMPINGS = (0.01, 0.1, 1.0)
# Predictions of damage whose allocations are tried.
METRICS = ('loss', 'geometric', 'balanced')
# The same where there are no gradients; there may be no correction either.
_WITHOUT_LOSS = ('balanced', 'relative')
# Shares of the correction that are tried, the boldest first.
_STEPS = (1.0, 0.5, 0.25)
# Standard errors of the difference beyond which a set of ranks that is further
# off on the first quarter of the examples is not tried on the rest.
_FAR = 2.0
# No kernel counts for less than this share of the mean effect: a slope at one
# point says little about a kernel that seems not to matter there.
_LEAST_EFFECT = 0.02


@dataclasses.dataclass(frozen=True)
class Trial:
  """One set of ranks that was tried.

  Attributes:
    method: of the factors.
    damping: of the factors.
    allocation: what chose the ranks: a metric of `budget_ranks`, or
      'corrected'.
    divergence: mean over the examples.
    accepted: whether it was the best so far.
  """

  method: str
  damping: float
  allocation: str
  divergence: float
  accepted: bool


class TunedRanks(dict[str, int]):
  """Ranks by path, with the factors they were tried with.

  Attributes:
    families: the factors; pass them to `factorize(families=)`.
    trials: every set of ranks tried, in order.
    divergences: of every example that was tried on, (B,), float64.
    effects: path to what the directions cut of it cost, by the slopes of the
      mean divergence; of the kernels of which slopes at these ranks are known.
  """

  def __init__(
    self,
    ranks: Mapping[str, int],
    families: Families,
    trials: list[Trial],
    divergences: np.ndarray,
    effects: Mapping[str, float] | None = None,
  ):
    super().__init__(ranks)
    self.effects = dict(effects or {})
    self.families = families
    self.trials = trials
    self.divergences = divergences

  @property
  def divergence(self) -> float:
    """Mean divergence per example on the data that were tried on."""
    return float(self.divergences.mean())


@compat.moves_data
@tracing.remembered()
def tune_ranks(
  fn: Callable[[Any, Any], Any],
  params: Any,
  moments: Moments,
  batches: Sequence[Any],
  *,
  divergence: Divergence,
  params_fraction: float | None = None,
  flops_fraction: float | None = None,
  multiple_of: int = 1,
  limits: Sequence[tuple[str, tuple[int, int]]] = (),
  gauge: str | None = None,
  compensate_mean: bool = True,
  reference: Any = None,
  rounds: int = 4,
  at_once: int = 1,
  progress: bool = True,
) -> TunedRanks:
  """The ranks and the method, of those tried, that change the outputs least.

  Args:
    fn: `fn(params, batch) -> outputs`.
    params: dense parameters.
    moments: moments of the kernels to shrink; with gradients 'loss' factors
      are tried beside those of 'output', and 'coupled' ones where moments
      were collected with `coupled=True`.
    batches: data to try on, kept in memory with the dense outputs; batches of
      one size compile once.
    divergence: `divergence(dense outputs, outputs, batch) -> (B,)`, such as
      `kl_divergence()` or `squared_error`.
    params_fraction: as for `budget_ranks`.
    flops_fraction: as for `budget_ranks`.
    multiple_of: as for `budget_ranks`.
    limits: as for `budget_ranks`.
    gauge: as for `factorize`.
    compensate_mean: as for `factorize`.
    reference: parameters of the dense function to stay near to; default
      `params`, other kernels of which may be compressed already.
    rounds: corrections of the best allocation; each takes one backward pass
      and up to three trials, and ends the search if it brings nothing. Where
      the function has no reverse derivative there are none: a warning.
    at_once: sets of ranks tried in one call; more fill a large accelerator.
    progress: show a progress bar.

  Returns:
    `TunedRanks`: a corrected allocation only where it beats the one before
    by more than the standard error of the difference over the examples.

  Raises:
    ValueError: as `budget_ranks`; no batches; the function does not accept
      the parameters or a batch.
  """
  if not several(batches):
    raise ValueError('tune_ranks needs at least one batch to try ranks on')
  allocate = functools.partial(
    budget_ranks,
    params,
    moments,
    params_fraction=params_fraction,
    flops_fraction=flops_fraction,
    multiple_of=multiple_of,
    limits=limits,
    gauge=gauge,
    compensate_mean=compensate_mean,
    progress=False,
  )
  trials = Trials(
    fn,
    params,
    moments,
    batches,
    divergence,
    reference=reference,
    at_once=at_once,
  )
  search = _Search(trials, allocate)
  recipes = [('output', methods.DAMPING)]
  if moments.grads is not None:
    recipes += [('loss', damping) for damping in DAMPINGS]
  if moments.coupled is not None:
    recipes += [('coupled', damping) for damping in DAMPINGS]
  steps: Iterable[int] = range(len(recipes) + rounds)
  if progress:
    steps = track(
      steps,
      total=len(recipes) + rounds,
      desc='ranks',
      unit='step',
      status=lambda: f'divergence {search.best.mean():.3g}',
    )
  step = iter(steps)
  for method, damping in recipes:
    next(step)
    families = decompose(
      params,
      moments,
      method=method,
      compensate_mean=compensate_mean,
      damping=damping,
      progress=False,
    )
    search.try_predictions(families)
  for _ in range(rounds):
    next(step)
    if not search.has_slopes() or not search.correct():
      break
  return TunedRanks(
    search.ranks,
    search.families,
    search.log,
    search.best,
    search.effects,
  )


def _key(ranks: dict[str, int], families: Families) -> Any:
  """The same for what need not be tried twice."""
  return families.method, families.damping, frozenset(ranks.items())


def _is_far(each: np.ndarray, nearest: np.ndarray) -> bool:
  """Whether some examples tell that a set of ranks is not the nearest one."""
  if not np.all(np.isfinite(nearest)):
    return False
  over = each - nearest
  return bool(over.mean() > _FAR * over.std() / len(over) ** 0.5)


class _Search:
  """The best set of ranks so far, and how to look for a better one."""

  best: np.ndarray  # divergence of every example
  ranks: dict[str, int]
  families: Families
  _metric: str

  def __init__(self, trials: Trials, allocate: Callable[..., dict[str, int]]):
    self._trials, self._allocate = trials, allocate
    self.best = np.array([np.inf])
    self.effects: dict[str, float] = {}
    self._tried: set[Any] = set()
    self.log: list[Trial] = []

  def try_predictions(self, families: Families) -> None:
    """Tries the allocations that each prediction of damage asks for."""
    allocations: dict[Any, tuple[str, dict[str, int]]] = {}
    for metric in METRICS if 'loss' in families.metrics else _WITHOUT_LOSS:
      ranks = self._spend(families, metric)
      # Predictions that agree are tried once.
      allocations.setdefault(_key(ranks, families), (metric, ranks))
    tried = list(allocations.values())
    for (metric, ranks), each in zip(
      tried, self._measured([r for _, r in tried], families), strict=True
    ):
      self._tried.add(_key(ranks, families))
      better = self._is_whole(each) and each.mean() < self.best.mean()
      self._note(families, metric, each, better)
      if better:
        self.best, self.ranks, self.families = each, ranks, families
        self._metric = metric
        self._scale = dict.fromkeys(families, 0.0)

  def _measured(
    self, candidates: Sequence[dict[str, int]], families: Families
  ) -> list[np.ndarray]:
    """The divergences of sets of ranks.

    Returns:
      Of each, those of every example; or of the first examples alone, where
      they tell already that it is not the best one.
    """
    trials = self._trials
    first = list(trials.measure(candidates, families, trials.few))
    if not trials.others:
      return first
    nearest = min([*first, self.best[: len(first[0])]], key=np.mean)
    near = [i for i, each in enumerate(first) if not _is_far(each, nearest)]
    if near:
      rest = trials.measure(
        [candidates[i] for i in near], families, trials.others
      )
      for i, each in zip(near, rest, strict=True):
        first[i] = np.append(first[i], each)
    return first

  def _is_whole(self, each: np.ndarray) -> bool:
    """Whether it was tried on all examples."""
    return len(each) == self._trials.examples

  def has_slopes(self) -> bool:
    """Whether the outputs have a derivative; a warning where they have not."""
    why = self._trials.no_slopes(self.ranks, self.families)
    if why is not None:
      warn(
        'ranks are chosen by predictions and trials alone, without slopes: '
        f'the function has no reverse derivative ({first_line(why)})'
      )
    return why is None

  def correct(self) -> bool:
    """Scales the predictions to what is seen; whether that helped."""
    slopes = self._trials.slopes(self.ranks, self.families)
    effects = {
      path: max(0.0, -float(slopes[path][:, rank:].sum()))
      for path, rank in self.ranks.items()
    }
    self.effects = effects
    least = _LEAST_EFFECT * sum(effects.values()) / max(len(effects), 1)
    wanted: dict[Any, float] = {}
    for path, rank in self.ranks.items():
      predicted = self.families.damages(path, OF_FAMILY[self._metric])[rank]
      if predicted > 0 and least > 0:
        wanted[path] = np.log(max(effects[path], least) / predicted)
    if not wanted:
      return False
    # Only ratios between kernels matter; a dense one is taken as predicted.
    middle = float(np.mean(list(wanted.values())))
    goal = {p: wanted.get(p, middle) - middle for p in self.families}
    for share in _STEPS:
      scale = {
        p: (1 - share) * old + share * goal[p] for p, old in self._scale.items()
      }
      factors = {p: float(np.exp(v)) for p, v in scale.items()}
      ranks = self._spend(self.families.scaled(factors), self._metric)
      key = _key(ranks, self.families)
      if key in self._tried:
        continue
      self._tried.add(key)
      (each,) = self._measured([ranks], self.families)
      better = self._is_whole(each) and comes_closer(self.best, each)
      self._note(self.families, 'corrected', each, better)
      if better:
        self.effects = {
          path: effect
          for path, effect in effects.items()
          if ranks.get(path) == self.ranks[path]
        }
        self.best, self.ranks, self._scale = each, ranks, scale
        return True
    return False

  def _spend(self, families: Families, metric: str) -> dict[str, int]:
    return self._allocate(
      families=families,
      method=families.method,
      damping=families.damping,
      metric=metric,
    )

  def _note(
    self, families: Families, allocation: str, each: np.ndarray, better: bool
  ) -> None:
    self.log.append(
      Trial(
        families.method,
        families.damping,
        allocation,
        float(each.mean()),
        bool(better),
      )
    )

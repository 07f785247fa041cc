"""The paper's search: per layer, the lowest energy that costs no accuracy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
import dataclasses
import hashlib
import json
import math
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from utilized_rank.factorization.kernels import Kernel
from utilized_rank.factorization.kernels import kernels
from utilized_rank.factorization.kernels import to_leaf
from utilized_rank.host import files
from utilized_rank.host.progress import track
from utilized_rank.linalg.subspace import check_energy
from utilized_rank.lowrank.leaf import is_low_rank
from utilized_rank.moments.moments import Moments
from utilized_rank.products.gauge import check_gauge
from utilized_rank.products.gauge import saves
from utilized_rank.tree import paths

Pair = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Trial:
  """One evaluation: a group of kernels projected, the others dense.

  Attributes:
    paths: the projected kernels.
    energies: (e_S, e_T).
    metric: what `evaluate` returned.
    accepted: whether the metric stayed within the tolerance.
  """

  paths: tuple[str, ...]
  energies: Pair
  metric: float
  accepted: bool


class SearchedRanks(dict[str, int]):
  """Ranks by path, and how they were found.

  Attributes:
    baseline: metric of the dense parameters.
    energies: path to the (e_S, e_T) found; a kernel that no energy in the
      range leaves accurate enough is absent. `project(params, moments,
      energy=ranks.energies)` is the network with all of them transformed.
    trials: every evaluation, in order.
  """

  def __init__(
    self,
    ranks: Mapping[str, int],
    baseline: float,
    energies: dict[str, Pair],
    trials: list[Trial],
  ):
    super().__init__(ranks)
    self.baseline = baseline
    self.energies = energies
    self.trials = trials


def count_evaluations(
  groups: int, *, steps: int = 12, separate: bool = False
) -> int:
  """Most evaluations that a search over so many groups can take.

  >>> count_evaluations(72)
  865
  """
  return 1 + groups * steps * (2 if separate else 1)


def search_ranks(
  evaluate: Callable[[Any], float],
  params: Any,
  moments: Moments,
  *,
  tolerance: float = 1e-3,
  energy_range: Pair = (0.8, 0.9999),
  steps: int = 12,
  separate: bool = False,
  centered: bool = False,
  group: Callable[[str], str] | None = None,
  checkpoint: str | os.PathLike[str] | None = None,
  gauge: str | None = None,
  progress: bool = True,
) -> SearchedRanks:
  """Searches the energies of each kernel as the paper does.

  One kernel at a time is replaced by W' = P_S W P_T while the others stay
  dense; the lowest energy whose metric is no worse than the tolerance allows
  is found by bisection. W' has W's shape: a jitted `evaluate` compiles once.

  Args:
    evaluate: metric of a parameter tree on held-out data, higher is better.
    params: dense parameters.
    moments: moments of the kernels to search.
    tolerance: largest loss, as a share of the dense metric (0.001 is 0.1 %).
    energy_range: lowest and highest energy to consider.
    steps: evaluations per kernel at most; both ends of the range count.
    separate: search e_S first (with every output direction), then e_T.
      Whether the paper does so is not established; one shared energy is what
      its known re-implementation does, and the default.
    centered: take the spectra about the mean.
    group: kernels for which this gives one name are projected together and
      share an energy; for large models.
    checkpoint: JSON file of the evaluations made so far. A search that finds
      it goes on where it stopped, to the same result.
    gauge: as for `factorize`; with 'identity' every r < min(d, m) saves.
    progress: show a progress bar; its total is the most evaluations that can
      be needed, see `count_evaluations`.

  Returns:
    `SearchedRanks`: r = min(k_S, k_T) of each kernel, the maximum over the
    members of a stack, where it saves parameters.

  Raises:
    ValueError: a range that is none, fewer than 2 steps, a metric that is not
      finite, or a checkpoint of another search.

  Source: arXiv 2407.04797; range, steps and tolerance as in its known
  re-implementation.
  """
  low, high = energy_range
  check_gauge(gauge)
  check_energy(low)
  check_energy(high)
  if not low < high or steps < 2 or tolerance < 0:
    raise ValueError(
      f'energy_range={energy_range}, steps={steps}, tolerance={tolerance}: '
      'the range must rise, steps be at least 2, the tolerance not negative'
    )
  members = {
    path: list(found)
    for path, found in kernels(params, moments, centered=centered)
  }
  groups: dict[str, list[str]] = {}
  for path in members:
    groups.setdefault(group(path) if group else path, []).append(path)
  total = count_evaluations(len(groups), steps=steps, separate=separate)
  bar = iter(
    track(range(total), total=total, desc='search', unit='evaluation')
    if progress
    else range(total)
  )
  run = _Search(
    evaluate,
    params,
    moments,
    members,
    _fingerprint(params, members),
    checkpoint,
    bar,
  )
  floor = run.baseline - tolerance * abs(run.baseline)
  energies: dict[str, Pair] = {}
  for names in groups.values():
    found = _side(run, names, floor, low, high, steps, separate)
    if found is not None:
      energies.update(dict.fromkeys(names, found))
  ranks = {}
  for path, (e_s, e_t) in energies.items():
    rank = max(max(1, min(k.ranks(e_s, e_t))) for k in members[path])
    if saves(moments[path].layout, rank, gauge):
      ranks[path] = rank
  return SearchedRanks(ranks, run.baseline, energies, run.trials)


def _side(run, names, floor, low, high, steps, separate) -> Pair | None:
  if not separate:
    shared = _bisect(run, names, floor, low, high, steps, lambda e: (e, e))
    return None if shared is None else (shared, shared)
  e_s = _bisect(run, names, floor, low, high, steps, lambda e: (e, 1.0))
  if e_s is None:
    return None
  e_t = _bisect(run, names, floor, low, high, steps, lambda e: (e_s, e))
  return None if e_t is None else (e_s, e_t)


def _bisect(run, names, floor, low, high, steps, pair) -> float | None:
  """The lowest accepted energy: the ends first, then halves."""
  if run.accepts(names, pair(low), floor):
    return low
  if not run.accepts(names, pair(high), floor):
    return None
  for _ in range(steps - 2):
    # Between two energies of equal ranks nothing changes any more.
    if run.ranks(names, pair(low)) == run.ranks(names, pair(high)):
      break
    middle = (low + high) / 2
    if run.accepts(names, pair(middle), floor):
      high = middle
    else:
      low = middle
  return high


class _Search:
  """Evaluations, none made twice: equal ranks are equal parameters."""

  def __init__(
    self, evaluate, params, moments, members, settings, checkpoint, bar
  ):
    self._evaluate = evaluate
    self._named, self._treedef = paths.flatten(params, is_low_rank)
    self._moments = moments
    self._members = members
    self._settings = settings
    self._checkpoint = checkpoint
    self._bar = bar
    self._known = self._restore()
    self.trials: list[Trial] = []
    self.baseline = self._metric('dense', {})

  def ranks(
    self, names: Iterable[str], energies: Pair
  ) -> list[tuple[int, int]]:
    return [k.ranks(*energies) for n in names for k in self._members[n]]

  def accepts(self, names: list[str], energies: Pair, floor: float) -> bool:
    key = json.dumps([names, self.ranks(names, energies)])
    metric = self._metric(key, dict.fromkeys(names, energies))
    accepted = metric >= floor
    self.trials.append(Trial(tuple(names), energies, metric, accepted))
    return accepted

  def _metric(self, key: str, projected: Mapping[str, Pair]) -> float:
    if key not in self._known:
      next(self._bar, None)
      named = dict(self._named)
      for name, energies in projected.items():
        matrices = [k.projected(*energies) for k in self._members[name]]
        named[name] = to_leaf(matrices, self._moments[name].layout, named[name])
      metric = float(self._evaluate(paths.unflatten(self._treedef, named)))
      if not math.isfinite(metric):
        raise ValueError(
          f'evaluate returned {metric} with {list(projected) or "nothing"} '
          'projected; it must be finite'
        )
      self._known[key] = metric
      self._save()
    return self._known[key]

  # --- interruption ---

  def _restore(self) -> dict[str, float]:
    if self._checkpoint is None or not os.path.exists(self._checkpoint):
      return {}
    settings, known = files.read_json(
      self._checkpoint, 'search', lambda r: (r['settings'], r['metrics'])
    )
    if settings != self._settings:
      raise ValueError(
        f'{os.fspath(self._checkpoint)!r} belongs to a search over other '
        'parameters, moments or kernels'
      )
    return known

  def _save(self) -> None:
    if self._checkpoint is None:
      return
    record = {'settings': self._settings, 'metrics': self._known}
    files.write_text(self._checkpoint, json.dumps(record))


def _fingerprint(params: Any, members: Mapping[str, list[Kernel]]) -> str:
  """What metrics depend on besides `evaluate`: parameters, and moments."""
  digest = hashlib.sha256()
  for path, leaf in paths.flatten(params, is_low_rank)[0].items():
    for part in jax.tree.leaves(leaf):
      is_plain = hasattr(part, 'dtype') and not jnp.issubdtype(
        part.dtype, jax.dtypes.extended
      )
      if is_plain:  # no random key, flag or function
        digest.update(path.encode() + np.asarray(part).tobytes())
  for path, group in members.items():
    digest.update(path.encode())
    for kernel in group:
      digest.update(kernel.second.tobytes())
  return digest.hexdigest()

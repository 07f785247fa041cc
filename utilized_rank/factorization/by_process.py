"""Kernels shared out over the processes of a job.

Each process makes a share of them, and what it made is told to the others, so
that all end with the same. A kernel's factors are made in seconds (a ViT-B/16's
wide ones in one) and told in milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
import itertools
import pickle
from typing import Any, TypeVar

import jax

from utilized_rank.factorization import shared_left
from utilized_rank.factorization.kernels import Kernel
from utilized_rank.factorization.shared_left import Key
from utilized_rank.host import agreement
from utilized_rank.host import threads
from utilized_rank.host.processes import gathered
from utilized_rank.host.processes import together
from utilized_rank.host.progress import track
from utilized_rank.lowrank import leaf
from utilized_rank.moments.moments import Moments
from utilized_rank.tree import paths

R = TypeVar('R')
# A key, the place in its stack, and the kernel of each of its paths.
Unit = tuple[Key, int, tuple[Kernel, ...]]
Place = tuple[Key, int]


def agree(
  caller: str,
  params: Any,
  moments: Moments,
  **more: agreement.Argument,
) -> None:
  """Raises ValueError on every process if they do not call alike.

  Args:
    caller: the function that is called.
    params: parameters.
    moments: moments of their kernels.
    more: its other arguments, as `agreement.check` takes them.
  """
  agreement.check(
    caller,
    lambda: {
      'params': paths.flatten(params, leaf.is_low_rank)[0],
      'moments': dict(_sums(moments)),
      **more,
    },
  )


def _sums(moments: Moments) -> Iterator[tuple[str, Any]]:
  """Each kernel's sums, those that several share with the first."""
  seen = set()
  for place, path in enumerate(moments):
    moment = moments[path]
    own = moment.grad_panels, moment.examples, moment.row_grad
    new = moment.sums if moment.entry.index not in seen else None
    seen.add(moment.entry.index)
    yield path, [place, repr(moment.entry), own, new]


def each_unit(
  solve: Callable[[Unit], R],
  params: Any,
  moments: Moments,
  keys: Sequence[Key],
  *,
  centered: bool,
  processes: bool,
  progress: bool,
  desc: str,
) -> Iterator[R]:
  """Yields `solve` of every unit, computed side by side.

  Args:
    solve: what to do with a unit; its result can be pickled.
    params: parameters that hold the kernels.
    moments: moments of the kernels.
    keys: the kernels, and sets of kernels with one left factor.
    centered: as for `shared_left.units`.
    processes: share the units out over the processes of the job, which must
      all take all results.
    progress: show a progress bar, of this process's share.
    desc: what is going on, in a word.
  """
  # A kernel's float64 moments are made, used and dropped one by one.
  units: Iterator[Unit] = (
    (key, place, group)
    for key, groups in shared_left.units(
      params, moments, keys, centered=centered
    )
    for place, group in enumerate(groups)
  )

  def made(taken: Iterator[Unit], total: int) -> Iterator[R]:
    found = threads.ordered_map(solve, taken)
    if progress:
      return track(found, total=total, desc=desc, unit='kernel')
    return found

  if not processes or jax.process_count() == 1:
    yield from made(units, shared_left.count_units(keys, moments))
    return
  senders: list[int] = []
  index = jax.process_index()

  def work() -> list[bytes]:
    makers = divide(keys, moments, jax.process_count())

    def own() -> Iterator[Unit]:
      for unit in units:
        senders.append(makers[unit[:2]])
        if senders[-1] == index:
          yield unit

    total = list(makers.values()).count(index)
    # One program at both ends, and a pickle keeps every dtype and layout.
    return [pickle.dumps(one, protocol=5) for one in made(own(), total)]

  messages = together(work)
  for message in gathered(messages, senders):
    yield pickle.loads(message)


def divide(
  keys: Iterable[Key], moments: Moments, count: int
) -> dict[Place, int]:
  """Which process makes which unit: the same answer wherever it is asked.

  The largest first, each where there is least to do so far. Kernels that need
  one eigenbasis of their input stay together, unless that is more than a
  process's part of the work.

  Args:
    keys: the kernels, and sets of kernels with one left factor.
    moments: moments of the kernels; only shapes are looked at.
    count: of processes.

  Returns:
    (key, place in its stack) -> process, for every unit.
  """
  bundles: dict[Any, list[Place]] = {}
  costs: dict[Any, tuple[float, float]] = {}
  for key in keys:
    moment = moments[shared_left.names_of(key)[0]]
    d, m = shared_left.matrix_shape(key, moments)
    own = d * m * min(d, m) + min(d, m) ** 3
    for place in range(moment.layout.num_groups):
      by_input = d <= m
      name = moment.entry.index if by_input else key, place
      bundles.setdefault(name, []).append((key, place))
      costs[key, place] = own, d**3 * by_input
  whole = lambda units: (
    sum(costs[u][0] for u in units) + max(costs[u][1] for u in units)
  )
  part = sum(map(whole, bundles.values())) / count
  groups = itertools.chain.from_iterable(
    [units] if whole(units) <= part else [[unit] for unit in units]
    for units in bundles.values()
  )
  makers: dict[Place, int] = {}
  load = [0.0] * count
  for units in sorted(groups, key=whole, reverse=True):
    least = load.index(min(load))
    load[least] += whole(units)
    makers |= dict.fromkeys(units, least)
  return makers

"""Moments of some kernels at a time, put together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
import contextlib
import dataclasses
import os
from typing import Any

import jax

from utilized_rank.collection.plan import SitePlan
from utilized_rank.host import processes
from utilized_rank.moments.moments import Entry
from utilized_rank.moments.moments import Moments
from utilized_rank.moments.moments import Sums
from utilized_rank.moments.sites import Sites
from utilized_rank.storage import checkpoint


def check_repeatable(batches: Iterable[Any], passes: int) -> None:
  """Raises ValueError where the batches can be run through only once."""
  if isinstance(batches, Iterator):
    raise ValueError(
      f'the sums fit memory_limit in {passes} passes over the batches, which '
      f'are a {type(batches).__name__} that ends after one: pass a list, or '
      'an object whose __iter__ starts anew'
    )


def each(
  members: Sequence[Sequence[str]],
  sites: Sites,
  collect_pass: Callable[[int, str | None], Moments],
  folder: str | os.PathLike[str] | None,
  everywhere: bool,
) -> list[Moments]:
  """Collects pass after pass; what is done is kept in a folder until all are.

  Args:
    members: paths of the kernels of every pass.
    sites: all kernels.
    collect_pass: makes the pass of a number, with a folder for running sums.
    folder: None to keep nothing.
    everywhere: all processes of the job collect together.

  Raises:
    ValueError: the folder holds something else.
  """
  if folder is None:
    return [collect_pass(i, None) for i in range(len(members))]
  finished = _Finished(folder, members, sites)
  parts = []
  for i in range(len(members)):
    have = finished.take(i)
    # A process that was killed before it had written has all collect again.
    if everywhere and not processes.exchange([have is not None]).all():
      have = None
    if have is None:
      have = collect_pass(i, finished.running(i))
      finished.keep(i, have)
    parts.append(have)
  finished.remove()
  return parts


class _Finished:
  """The moments of passes that are done, one file of each process for each."""

  def __init__(
    self,
    folder: str | os.PathLike[str],
    members: Sequence[Sequence[str]],
    sites: Sites,
  ):
    self._sites = sites
    self._folder = os.path.abspath(os.fspath(folder))
    self._members = members
    self._names = [f'pass-{i}-of-{len(members)}' for i in range(len(members))]
    os.makedirs(self._folder, exist_ok=True)
    count = jax.process_count()
    for name in sorted(os.listdir(self._folder)):
      one, _, process = name.partition('.process-')
      if one not in self._names or (process and f'-of-{count}.' not in process):
        raise ValueError(
          f'{self._folder!r} holds no sums of a collection in {len(members)} '
          f'passes by {count} processes: there is {name!r}'
        )

  def running(self, number: int) -> str:
    """Where a pass keeps its running sums."""
    return os.path.join(self._folder, self._names[number])

  def take(self, number: int) -> Moments | None:
    """The moments of a pass, if it is done."""
    where, members = self._path(number), self._members[number]
    if not os.path.exists(where):
      return None
    moments, _ = checkpoint.load_file(where)
    have = {entry.path: entry.measured for entry in moments.table}
    want = {path: self._sites[path].measured for path in members}
    if have != want:
      raise ValueError(
        f'{where!r} is of other kernels than this pass, which collects '
        f'{sorted(want)}; go on with the function, parameters and memory_limit '
        f'of before, or remove {self._folder!r}'
      )
    return moments

  def keep(self, number: int, moments: Moments) -> None:
    checkpoint.save_file(self._path(number), moments, {})

  def remove(self) -> None:
    for number in range(len(self._names)):
      os.remove(self._path(number))
    with contextlib.suppress(OSError):  # until the last process is done
      os.rmdir(self._folder)

  def _path(self, number: int) -> str:
    return f'{self.running(number)}.{processes.own_name()}.npz'


def join(parts: Sequence[Moments], kernels: dict[str, SitePlan]) -> Moments:
  """Moments of disjoint kernels over the same batches, as one.

  Args:
    parts: moments by pass.
    kernels: every kernel, and in which pass it was collected.

  Raises:
    ValueError: the passes saw different batches.
  """
  counts = {int(m.examples) for m in parts if m.examples is not None}
  table: list[Entry] = []
  sums: list[Sums] = []
  grads: list[Any] = []
  coupled: list[Any] = []
  rows: list[Any] = []
  places: dict[int, int] = {}
  for path, kernel in kernels.items():
    site, moment = kernel.site, parts[kernel.number][path]
    if site.index not in places:
      places[site.index] = len(sums)
      sums.append(moment.sums)
    # What a selection of kernels cannot know, such as whose a bias is, the
    # sites of all kernels do.
    entry = {f.name: getattr(site, f.name) for f in dataclasses.fields(Entry)}
    table.append(
      Entry(**{**entry, 'index': places[site.index], 'number': kernel.number})
    )
    grads.append(moment.grad_panels)
    coupled.append(moment.coupled)
    rows.append(moment.row_grad)
  if len(counts) > 1:
    raise ValueError(
      f'the passes over the batches saw {sorted(counts)} examples; every '
      'pass must yield the same batches'
    )
  one = parts[0]
  return Moments(
    tuple(table),
    tuple(sums),
    None if one.grads is None else tuple(grads),
    one.examples,
    None if one.row_grads is None else tuple(rows),
    coupled=None if one.coupled is None else tuple(coupled),
  )

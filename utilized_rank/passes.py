"""Moments of some kernels at a time, put together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
import dataclasses
from typing import Any

from utilized_rank.moments import Entry
from utilized_rank.moments import Moments
from utilized_rank.moments import Sums
from utilized_rank.plan import SitePlan


def check_repeatable(batches: Iterable[Any], passes: int) -> None:
  """Raises ValueError where the batches can be run through only once."""
  if isinstance(batches, Iterator):
    raise ValueError(
      f'the sums fit memory_limit in {passes} passes over the batches, which '
      f'are a {type(batches).__name__} that ends after one: pass a list, or '
      'an object whose __iter__ starts anew'
    )


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
  )

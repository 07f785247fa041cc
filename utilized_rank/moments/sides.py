"""From which side a kernel is measured, and by what."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
import dataclasses
import operator
from typing import Any

from utilized_rank.linalg import sketch
from utilized_rank.tree import paths

# Ordered `(regex, columns)` rules over leaf paths; 0 for no sketch.
Columns = Sequence[tuple[str, int]]


@dataclasses.dataclass(frozen=True)
class Sides:
  """What is summed for each kernel, as the caller's rules have it.

  Attributes:
    from_outputs: ordered `(regex, bool)` rules, or None.
    sketch: ordered `(regex, columns)` rules, or None.
  """

  from_outputs: paths.Rules | None = None
  sketch: Columns | None = None

  def among(self, names: Iterable[str]) -> Chosen:
    """The rules, applied to leaf paths.

    Raises:
      ValueError: a rule is none, or matches no path; two are for one kernel.
    """
    names = list(names)
    outputs, columns = {}, {}
    if self.from_outputs is not None:
      outputs = paths.select(names, self.from_outputs)
    if self.sketch is not None:
      columns = paths.choose(names, self.sketch, 'sketch', _columns, 0)
    both = [path for path in names if outputs.get(path) and columns.get(path)]
    if both:
      raise ValueError(
        f'{both[0]!r} is selected by from_outputs= and by sketch=: it is '
        'measured by T, or by a sketch of S'
      )
    return Chosen(outputs, columns)


INPUTS = Sides()  # every S, whole


@dataclasses.dataclass(frozen=True)
class Chosen:
  """What is summed for each kernel of one function."""

  outputs: dict[str, bool]
  columns: dict[str, int]

  def of(self, path: str, d: int) -> tuple[str, int]:
    """The side of a kernel with d inputs, and its sketch's columns, or 0."""
    if self.outputs.get(path):
      return 'output', 0
    columns = self.columns.get(path, 0)
    # What is no smaller than S tells less for more.
    if columns and sketch.saves(d, columns):
      return 'sketch', columns
    return 'input', 0


def _columns(value: Any) -> int:
  if isinstance(value, bool) or (number := operator.index(value)) < 0:
    raise ValueError('columns are at least 0, and a number')
  return number

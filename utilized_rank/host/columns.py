"""Rows of text as columns, for `print`."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
  """A line for each row, its cells padded to the width of their columns.

  Args:
    rows: as many cells each, the first at the left, those behind it at the
      right; the last one is a note of any length, or empty.

  >>> print(*aligned([('leaf', 'shape', ''), ('w', '2', 'dot')]), sep='|')
  leaf  shape|w         2  dot
  """
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = []
  for row in rows:
    name, *cells, note = row
    padded = [cell.rjust(w) for cell, w in zip(cells, widths[1:])]
    lines.append('  '.join([name.ljust(widths[0]), *padded, note]).rstrip())
  return lines

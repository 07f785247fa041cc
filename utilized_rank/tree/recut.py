"""Axes made of atoms, cut anew to other sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Axes = tuple[tuple[int, ...], ...]


def recut(
  atoms: Sequence[int],
  axes: Sequence[Sequence[int]],
  sizes: Sequence[int],
  new_sizes: Sequence[int],
) -> tuple[tuple[int, ...], Axes, dict[int, list[int]]] | None:
  """What atoms and axes become when an array is reshaped.

  Args:
    atoms: their sizes.
    axes: for each axis the atoms that make it up; none for a broadcast one.
    sizes: the array's shape.
    new_sizes: its new shape.

  Returns:
    Sizes of the new atoms, the new axes, and for each atom the new ones that
    it is cut into; None where a new axis would hold part of an atom whose size
    it does not divide, or would mix atoms with a broadcast axis.

  >>> recut((6, 4), ((1,), (0,)), (4, 6), (4, 2, 3))
  ((2, 3, 4), ((2,), (0,), (1,)), {0: [0, 1], 1: [2]})
  """
  # A broadcast axis goes through as an item of its own: atom None.
  queue: list[tuple[int | None, int]] = []
  for axis_atoms, size in zip(axes, sizes, strict=True):
    if axis_atoms:
      queue += [(a, atoms[a]) for a in axis_atoms]
    elif is_long(size):
      queue.append((None, size))
  pieces: dict[int, list[int]] = {a: [s] for a, s in enumerate(atoms)}
  out: list[list[tuple[int | None, int]]] = []
  for size in new_sizes:
    axis: list[tuple[int | None, int]] = []
    left = size
    while is_long(left) or (queue and queue[0][1] == 1 and not axis):
      if not queue:
        return None
      atom, n = queue.pop(0)
      # Sizes may be symbolic: of two, it is not known which is more.
      if n != left and n % left == 0:
        queue.insert(0, (atom, n // left))
        if atom is not None:
          # Row-major: the outer piece belongs to this axis.
          pieces[atom][-1:] = [left, n // left]
        n = left
      elif left % n != 0:
        return None
      axis.append((atom, n))
      left = 1 if n == left else left // n
    out.append(axis)
  if any(size != 1 for _, size in queue):
    return None
  if queue:
    # Trailing atoms of size one; they can sit on any axis with atoms.
    home = next((x for x in reversed(out) if x and x[-1][0] is not None), None)
    if home is None:
      return None
    home += queue
  numbers: dict[int, list[int]] = {}
  new_atoms: list[int] = []
  for a, parts in sorted(pieces.items()):
    numbers[a] = list(range(len(new_atoms), len(new_atoms) + len(parts)))
    new_atoms += parts
  next_part = {a: iter(n) for a, n in numbers.items()}
  new_axes = []
  for axis in out:
    if len({a is None for a, _ in axis}) > 1:
      return None
    new_axes.append(tuple(next(next_part[a]) for a, _ in axis if a is not None))
  return tuple(new_atoms), tuple(new_axes), numbers


def is_long(size: Any) -> bool:
  """Whether an axis may have several indices; one of symbolic size may."""
  return bool(size > 1) if isinstance(size, (int, np.integer)) else True

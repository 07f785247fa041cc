"""Values whose axes run along the examples of a batch, or along its tokens.

An axis is a product of pieces, so that reshapes can be followed that join the
examples' axis with others or cut it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
import dataclasses
import math

EXAMPLE = 'example'
TOKEN = 'token'


@dataclasses.dataclass(frozen=True)
class Piece:
  """A factor of an axis.

  Attributes:
    size: its length.
    name: EXAMPLE or TOKEN; None for anything else.
    step: by how much the example's (token's) number grows along it.
  """

  size: int
  name: str | None = None
  step: int = 0


Axis = tuple[Piece, ...]


@dataclasses.dataclass(frozen=True)
class Where:
  """What is known of one value.

  Attributes:
    axes: the pieces of every axis, in row-major order; sizes of 1 have none.
    mixed: why an element may depend on several examples; None if it does not.
    token: the one token that the value is of, or why tokens were lost sight
      of; None where neither is known.
  """

  axes: tuple[Axis, ...]
  mixed: str | None = None
  token: int | str | None = None

  @property
  def pieces(self) -> list[Piece]:
    return [p for axis in self.axes for p in axis]

  def has(self, name: str) -> bool:
    return any(p.name == name for p in self.pieces)

  def is_along(self, name: str, size: int) -> bool:
    """Whether every example (token) is on it, once."""
    return _covers([p for p in self.pieces if p.name == name], size)

  def without(self, name: str) -> Where:
    """The same, `name` being forgotten."""
    forget = lambda p: Piece(p.size) if p.name == name else p
    axes = tuple(merged(map(forget, axis)) for axis in self.axes)
    return dataclasses.replace(self, axes=axes)


def plain(shape: Sequence[int]) -> Where:
  """A value that does not depend on the batch."""
  return Where(tuple(whole(n) for n in shape))


def batch_array(shape: Sequence[int], tokens: int | None) -> Where:
  """An array of the batch; its axis 1 runs along the tokens if it can."""
  axes = [whole(n) for n in shape]
  axes[0] = whole(shape[0], EXAMPLE)
  if tokens is not None and len(shape) > 1 and shape[1] == tokens:
    axes[1] = whole(tokens, TOKEN)
  return Where(tuple(axes))


def lead(shape: Sequence[int], examples: Sequence[int]) -> Where:
  """An array whose leading axes together run along the examples."""
  axes, step = [whole(n) for n in shape], 1
  for i in reversed(range(len(examples))):
    if shape[i] != 1:
      axes[i] = (Piece(shape[i], EXAMPLE, step),)
    step *= shape[i]
  return Where(tuple(axes))


def whole(size: int, name: str | None = None) -> Axis:
  """An axis of one piece, or of none if it has one index."""
  return (Piece(size, name, 1 if name else 0),) if size != 1 else ()


def _covers(pieces: list[Piece], size: int) -> bool:
  step = 1
  for piece in sorted(pieces, key=lambda p: p.step):
    if piece.step != step:
      return False
    step *= piece.size
  return step == size


def merged(pieces: Iterable[Piece]) -> Axis:
  """Neighbours that are one piece, joined."""
  out: list[Piece] = []
  for p in pieces:
    last = out[-1] if out else None
    if last and last.name == p.name and last.step == p.step * p.size:
      out[-1] = Piece(last.size * p.size, p.name, p.step)
    else:
      out.append(p)
  return tuple(out)


def join(values: Sequence[Where], name: str) -> Where:
  """A value whose every element depends on that very element of each."""
  mixed = next((v.mixed for v in values if v.mixed), None)
  axes = []
  for same in zip(*(v.axes for v in values), strict=True):
    axis = common(same)
    if axis is None:
      if any(p.name == EXAMPLE for a in same for p in a):
        mixed = mixed or f'{name} of values in which examples lie apart'
      axis = whole(math.prod(p.size for p in same[0]))
    axes.append(axis)
  return Where(tuple(axes), mixed, token_of(values))


def token_of(values: Sequence[Where]) -> int | str | None:
  """The one token that a result is of, or why that is not known."""
  tokens = {v.token for v in values if v.token is not None}
  lost = [t for t in tokens if isinstance(t, str)]
  return lost[0] if lost else tokens.pop() if len(tokens) == 1 else None


def mixed_up(reason: str, where: Where) -> Where:
  """The value, elements of which depend on several examples."""
  return dataclasses.replace(where.without(EXAMPLE), mixed=reason)


def common(axes: Sequence[Axis]) -> Axis | None:
  """The pieces of one axis as several values have it; None: they disagree."""
  left = [list(axis) for axis in axes]
  out: list[Piece] = []
  while left[0]:
    size = min(side[0].size for side in left)
    heads = set()
    for side in left:
      head = side[0]
      if head.size % size:
        return None
      if head.size > size:
        # The outer factor comes first; what is left of it is the inner one.
        inner = head.size // size
        side[0] = Piece(inner, head.name, head.step)
        head = Piece(size, head.name, head.step * inner)
      else:
        side.pop(0)
      if head.name is not None:
        heads.add(head)
    if len(heads) > 1:
      return None
    out.append(heads.pop() if heads else Piece(size))
  return merged(out)


def regrouped(
  pieces: Sequence[Piece], sizes: Sequence[int]
) -> tuple[Axis, ...] | None:
  """Pieces in row-major order as axes of other sizes, if they can be."""
  left = list(merged(pieces))
  out: list[Axis] = []
  for size in sizes:
    axis: list[Piece] = []
    need = size
    while need > 1:
      head = left.pop(0)
      share = math.gcd(head.size, need)
      if share == head.size:
        axis.append(head)
      elif share == need:
        inner = head.size // share
        axis.append(Piece(share, head.name, head.step * inner))
        left.insert(0, Piece(inner, head.name, head.step))
      else:
        return None
      need //= share
    out.append(merged(axis))
  return tuple(out)


def names(axis: Axis) -> set[str | None]:
  """What an axis runs along."""
  return {p.name for p in axis}


def outermost(where: Where) -> tuple[int, int, int, int]:
  """(axis, size, before, behind) of the examples' outermost piece."""
  axis, at, piece = max(
    (
      (k, j, p)
      for k, axis in enumerate(where.axes)
      for j, p in enumerate(axis)
      if p.name == EXAMPLE
    ),
    key=lambda found: found[2].step,
  )
  sizes = [p.size for p in where.axes[axis]]
  return axis, piece.size, math.prod(sizes[:at]), math.prod(sizes[at + 1 :])

"""Parts of a leaf along one of its axes."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import math
from typing import Any

import jax

from utilized_rank.tree.layout import View
from utilized_rank.walk.values import Dense
from utilized_rank.walk.values import Param
from utilized_rank.walk.values import Pieces

# Reason for a leaf of which only a part is used, not one of several equal
# parts: its other parts may go anywhere.
PART = 'a slice that is not one of equal parts'
_REASONS = dict.fromkeys(('slice', 'split', 'dynamic_slice'), PART) | {
  'gather': 'a lookup (gather)',
}
# Parts of 2 h and h are three parts of h. Into more than these an axis is cut
# for the arithmetic alone: they are no kernels of anyone's.
_MOST = 8


def reason(eqn: Any) -> str:
  """Why an equation's result is no leaf any more."""
  return _REASONS.get(eqn.primitive.name, eqn.primitive.name)


def cut_axis(lengths: Sequence[int], sizes: Sequence[int]) -> int | None:
  """The one axis that a slice shortens, or None."""
  short = [
    i
    for i, (n, size) in enumerate(zip(lengths, sizes, strict=True))
    if n != size
  ]
  return short[0] if len(short) == 1 else None


def cut(view: View, axis: int, length: int) -> View | None:
  """The view with an axis cut into (parts, length)."""
  parts = view.sizes[axis] // length
  sizes = (*view.sizes[:axis], parts, length, *view.sizes[axis + 1 :])
  return view.reshape(sizes)


def taken(eqn: Any, value: Param | Pieces) -> list[Any] | None:
  """What `slice`, `split` or `unstack` takes of a leaf, if it is its parts."""
  p, shape = eqn.params, eqn.invars[0].aval.shape
  if eqn.primitive.name == 'slice':
    starts, limits = p['start_indices'], p['limit_indices']
    lengths = [b - a for a, b in zip(starts, limits, strict=True)]
    if any(s != 1 for s in p['strides'] or ()):
      return None
    if lengths == [*shape]:
      return [value]
    axis = cut_axis(lengths, shape)
    if axis is None:
      if isinstance(value, Pieces):
        return None
      odd = _odd(value, starts, limits)
      return None if odd is None else [odd]
    places = [(starts[axis], lengths[axis])]
  else:
    axis = p['axis']
    sizes = [int(n) for n in p.get('sizes', [1] * len(eqn.outvars))]
    places = [(sum(sizes[:i]), n) for i, n in enumerate(sizes)]
  found: list[Any] = []
  for start, length in places:
    if isinstance(value, Pieces):
      found.append(_some(value, axis, start, length))
    elif eqn.primitive.name == 'unstack':
      found.append(member(value, axis, start))
    else:
      part = _taken(value, axis, start, length)
      if part is None:
        at = lambda n: (*[0] * axis, n, *[0] * (len(shape) - axis - 1))
        limit = (*shape[:axis], start + length, *shape[axis + 1 :])
        part = _odd(value, at(start), limit)
      found.append(part)
  return None if None in found else found


def _odd(
  param: Param, starts: Sequence[int], limits: Sequence[int]
) -> Param | None:
  """A part that is none of equal ones; it is followed, to be named."""
  if not isinstance(param.payload, Dense):
    return None
  array = jax.lax.slice(param.payload.array, starts, limits)
  view = View.of_leaf(param.view.path, array.shape, param.view.dtype)
  sizes = zip(array.shape, param.view.sizes, strict=True)
  cut = ', '.join(f'{n} of {size}' for n, size in sizes if n != size)
  part = param.view.part or f'{PART} ({cut})'
  return Param(dataclasses.replace(view, part=part), Dense(array))


def _taken(
  param: Param, axis: int, start: int, length: int
) -> Param | Pieces | None:
  size = param.view.sizes[axis]
  unit = math.gcd(start, length, size)
  if not length or unit == length:
    return _part(param, axis, start, length)
  if unit == 1 or size // unit > _MOST:
    return None
  return _joined(
    [_part(param, axis, at, unit) for at in range(start, start + length, unit)],
    axis,
  )


def _some(
  pieces: Pieces, axis: int, start: int, length: int
) -> Param | Pieces | None:
  unit = pieces.params[0].view.sizes[axis]
  if axis != pieces.axis or not length or start % unit or length % unit:
    return None
  first = start // unit
  return _joined(pieces.params[first : first + length // unit], axis)


def _joined(params: Sequence[Param | None], axis: int) -> Param | Pieces | None:
  found = tuple(p for p in params if p is not None)
  if len(found) < len(params):
    return None
  return found[0] if len(found) == 1 else Pieces(found, axis)


def _part(param: Param, axis: int, start: int, length: int) -> Param | None:
  """One of the equal parts that an axis is cut into, if it is one."""
  if not length or param.view.sizes[axis] % length or start % length:
    return None
  found = cut(param.view, axis, length)
  if found is None or not found.axes[axis]:
    return None
  at = start // length
  payload = param.payload.index(found, axis, at)
  return None if payload is None else Param(found.take(axis, at), payload)


def member(param: Param, axis: int, at: int) -> Param | None:
  """One index of an axis, the axis gone; None if it cannot be followed."""
  part = _part(param, axis, at, 1)
  if part is None:
    return None
  return Param(part.view.squeeze([axis]), part.payload.squeeze(axis))

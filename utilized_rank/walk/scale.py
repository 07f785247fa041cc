"""A leaf times a number, which is that leaf still."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from utilized_rank.walk import compat
from utilized_rank.walk.values import Output
from utilized_rank.walk.values import Param

SCALES = ('mul', 'div', 'neg')


def shape_of(value: Any) -> tuple[int, ...]:
  """A factor's shape; a leaf has size one along axes it is broadcast along."""
  if isinstance(value, Param):
    axes = zip(value.view.axes, value.view.sizes, strict=True)
    return tuple(size if atoms else 1 for atoms, size in axes)
  return np.shape(value)


def scaled(
  walk: Any, eqn: Any, operands: list[Any], params: list[int]
) -> list[Any] | None:
  """A leaf times or divided by a number, which may be a leaf as well.

  Args:
    walk: the walk.
    eqn: a multiplication, division or negation.
    operands: its operands.
    params: which of them are leaves.
  """
  size = lambda i: math.prod(shape_of(operands[i]))
  for which in sorted(params, key=size, reverse=True):
    if which and eqn.primitive.name == 'div':
      continue
    param, other, factor = operands[which], None, -1.0
    if len(operands) == 2:
      other = operands[1 - which]
      other = other.value if isinstance(other, Output) else other
      factor = walk.repeats.get(id(other), (other, other))[0]
    if not _fits(param, shape_of(factor)):
      continue
    if isinstance(other, Param):
      narrow = tuple(slice(0, n) for n in shape_of(other))
      reason = f'{eqn.primitive.name}, as a scale of {param.view.path}'
      other = walk.materialise(other, reason)
      factor = other[narrow]
    found = _times(eqn, param, which, other, factor)
    if found is not None:
      return [found]
  return None


def _fits(param: Param, shape: tuple[int, ...]) -> bool:
  """Whether a leaf times an array of this shape is the leaf, scaled."""
  if not compat.is_floating(param.view.dtype):
    return False
  return _scaled_view(param, shape, None) is not None


def _times(
  eqn: Any, param: Param, which: int, other: Any, factor: Any
) -> Param | None:
  """The leaf times a factor, as it stands in a function.

  Args:
    eqn: a multiplication, division or negation.
    param: the leaf; the factor fits.
    which: its place among the operands.
    other: the other operand, if there is one.
    factor: that, of size one along axes along which it repeats itself.

  Returns:
    The leaf; None if its payload cannot be multiplied.
  """
  name, shape = eqn.primitive.name, shape_of(factor)
  known = number(factor) if name != 'neg' else -1.0
  if name == 'div':
    factor, known = 1 / factor, 1 / known if known else None
  view = _scaled_view(param, shape, known)
  assert view is not None

  def make(array):
    operands = [other, other]
    operands[which] = array
    return compat.bind(eqn, operands if name != 'neg' else [array])[0]

  if known == 1:  # what it is, for exactness and speed
    payload = param.payload
  else:
    payload = param.payload.scaled(param.view, make, jnp.asarray(factor))
  return None if payload is None else Param(view, payload)


def _scaled_view(param: Param, shape: tuple[int, ...], known: float | None):
  sizes = param.view.sizes
  if math.prod(shape) == 1 and len(shape) <= len(sizes):
    shape = (1,) * len(sizes)
  if len(shape) != len(sizes):
    return None
  if any(n not in (1, size) for n, size in zip(shape, sizes)):
    return None
  return param.view.multiply(shape, known)


def number(value: Any) -> float | None:
  """A factor that is known when a function is traced."""
  if isinstance(value, (int, float, np.ndarray, np.generic)):
    return float(np.reshape(value, -1)[0]) if np.size(value) == 1 else None
  return None

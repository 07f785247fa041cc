"""Several of the equal parts of a leaf as one value of a walk.

The two thirds of a kernel that hold two gates of three, say. A product with
them is taken apart into one with each, so that nothing else need know of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from utilized_rank.walk import compat
from utilized_rank.walk import parts
from utilized_rank.walk import scale
from utilized_rank.walk.values import Param
from utilized_rank.walk.values import Pieces

PRODUCTS = ('dot_general', 'conv_general_dilated')


# From an equation, its operands and the places of leaves to its results.
Move = Callable[[Any, list[Any], list[int]], 'list[Any] | None']


def results(
  walk: Any, eqn: Any, operands: list[Any], move: Move
) -> list[Any] | None:
  """An equation of which an operand is several parts of a leaf.

  Args:
    walk: the walk.
    eqn: the equation.
    operands: its operands.
    move: what layout operations make of one part; None if it is lost.

  Returns:
    Its results; None where the parts are to be an array.
  """
  name = eqn.primitive.name
  places = [i for i, v in enumerate(operands) if isinstance(v, Pieces)]
  pieces = operands[places[0]]
  if name in compat.OPAQUE:
    walk.visitor.opaque(pieces.params[0].view, name)
    return None
  rule = walk.rules.get(name)
  if rule is not None:
    return rule(walk, eqn, operands)
  if len(places) > 1:
    return None
  if name in PRODUCTS:
    return _products(walk, eqn, operands, places[0])
  if name in ('slice', 'split'):
    return parts.taken(eqn, pieces)
  return _each(eqn, operands, places[0], move)


def _each(
  eqn: Any, operands: list[Any], which: int, move: Move
) -> list[Any] | None:
  """What a layout operation, or a scale, makes of each part."""
  pieces = operands[which]
  others = operands[:which] + operands[which + 1 :]
  relaid: tuple[Any, int, int] | None = None
  if eqn.primitive.name in scale.SCALES:
    if all(n == 1 for v in others for n in scale.shape_of(v)):
      relaid = eqn, pieces.axis, 1
  elif not others:
    relaid = _relaid(eqn, pieces)
  if relaid is None:
    return None
  one, axis, order = relaid
  made: list[Param] = []
  for param in pieces.params[::order]:
    both = [*operands[:which], param, *operands[which + 1 :]]
    result = move(one, both, [which])
    if result is None:
      return None
    made += result
  return [Pieces(tuple(made), axis)]


def _products(
  walk: Any, eqn: Any, operands: list[Any], which: int
) -> list[Any] | None:
  pieces, x = operands[which], operands[1 - which]
  if isinstance(x, Param) or not walk.visitor.wants(pieces.params[0].view):
    return None
  if walk.rescales(eqn, pieces.params[0].view):
    return None
  x, name = walk.materialise(x, eqn.primitive.name), eqn.primitive.name
  found = _one_by_one(eqn, which, pieces, x)
  if found is None:
    return None
  products, axis = found
  made = []
  for one, param, mine in products:
    both = [mine, mine]
    both[which] = param
    result = walk.visitor.product(one, both, which, walk)
    made.append(walk.materialise(result, name))
  return [together(made, axis)]


@dataclasses.dataclass(frozen=True)
class _Atom:
  """A part of a variable of the function; `whole` is the variable."""

  whole: Any
  aval: Any

  @classmethod
  def of(cls, atom: Any, shape: Sequence[int]) -> _Atom:
    whole = getattr(atom, 'whole', atom)
    return cls(whole, jax.ShapeDtypeStruct(shape, atom.aval.dtype))


@dataclasses.dataclass(frozen=True)
class Equation:
  """An equation of the function, of parts of its variables."""

  primitive: Any
  params: dict[str, Any]
  invars: Sequence[Any]
  outvars: Sequence[Any]


def _relaid(eqn: Any, pieces: Pieces) -> tuple[Any, int, int] | None:
  """A layout operation as it is for each of several parts.

  Returns:
    The equation, the axis along which its results lie, and in which order, 1
    or -1; None if they are not side by side.
  """
  name, p, axis = eqn.primitive.name, dict(eqn.params), pieces.axis
  count, order = len(pieces.params), 1
  size = eqn.invars[0].aval.shape
  if name == 'transpose':
    axis = p['permutation'].index(axis)
  elif name == 'squeeze':
    axis -= sum(d < axis for d in p['dimensions'])
  elif name == 'broadcast_in_dim' and len(eqn.invars) == 1:
    axis = int(p['broadcast_dimensions'][axis])
    p['shape'] = _shorter(p['shape'], axis, count)
  elif name == 'reshape':
    before = math.prod(size[:axis])
    axes = [
      i
      for i, n in enumerate(p['new_sizes'])
      if math.prod(p['new_sizes'][:i]) == before and n % count == 0 and n
    ]
    if not axes or p['dimensions'] is not None:
      return None
    axis = axes[0]
    p['new_sizes'] = _shorter(p['new_sizes'], axis, count)
  elif name == 'rev':
    order = -1 if axis in p['dimensions'] else 1
  elif name not in _SAME:
    return None
  if p.get('sharding') is not None:
    return None
  return Equation(eqn.primitive, p, eqn.invars, eqn.outvars), axis, order


_SAME = (
  'convert_element_type',
  'copy',
  'copy_p',
  'name',
  'reduce_precision',
  'stop_gradient',
  'pvary',
  'pcast',
)


def _shorter(sizes: Sequence[int], axis: int, count: int) -> tuple[int, ...]:
  return (*sizes[:axis], sizes[axis] // count, *sizes[axis + 1 :])


def _one_by_one(
  eqn: Any, which: int, pieces: Pieces, x: Any
) -> tuple[list[tuple[Any, Param, Any]], int | None] | None:
  """A product with several parts as one with each.

  Args:
    eqn: a `dot_general` or a convolution.
    which: where the parts are among its operands.
    pieces: the parts.
    x: the other operand.

  Returns:
    (equation, part, its other operand) for each, and the axis along which the
    results lie, None if they are summed; None if it cannot be taken apart.
  """
  places = _axes(eqn, which, pieces.axis)
  if places is None:
    return None
  along_x, along_y = places
  count, found = len(pieces.params), []
  atom, out = eqn.invars[1 - which], eqn.outvars[0]
  if along_x is not None:
    atom = _Atom.of(atom, _shorter(x.shape, along_x, count))
  if along_y is not None:
    out = _Atom.of(out, _shorter(out.aval.shape, along_y, count))
  for i, param in enumerate(pieces.params):
    mine = x
    if along_x is not None:
      n = x.shape[along_x] // count
      mine = jax.lax.slice_in_dim(x, i * n, i * n + n, axis=along_x)
    invars = [atom, atom]
    invars[which] = _Atom.of(eqn.invars[which], param.view.sizes)
    one = Equation(eqn.primitive, eqn.params, invars, [out])
    found.append((one, param, mine))
  return found, along_y


def together(results: Sequence[Any], axis: int | None) -> Any:
  """The results of a product's parts as the product's."""
  if axis is None:
    return sum(results[1:], results[0])
  return jnp.concatenate(results, axis)


def _axes(
  eqn: Any, which: int, axis: int
) -> tuple[int | None, int | None] | None:
  """The axes of the other operand, and of the result, that the parts' is."""
  if eqn.primitive.name == 'dot_general':
    contract, batch = eqn.params['dimension_numbers']
    mine = [*contract[which]], [*batch[which]]
    if axis in mine[0]:
      return contract[1 - which][mine[0].index(axis)], None
    if axis in mine[1]:
      at = mine[1].index(axis)
      return batch[1 - which][at], at
    ranks = [len(a.aval.shape) for a in eqn.invars]
    free = [i for i in range(ranks[which]) if i not in mine[0] + mine[1]]
    before = ranks[0] - len(contract[0]) if which else len(batch[0])
    return None, before + free.index(axis)
  p = eqn.params
  numbers = p['dimension_numbers']
  if which != 1 or (p['feature_group_count'], p['batch_group_count']) != (1, 1):
    return None
  if axis == numbers.rhs_spec[0]:
    return None, numbers.out_spec[1]
  if axis == numbers.rhs_spec[1]:
    return numbers.lhs_spec[1], None
  return None

"""Walks a traced function and follows its parameters to their products.

The walker repeats every equation of a jaxpr. A value that is a parameter leaf,
or a leaf behind layout operations alone, travels as a `Param`; everything else
is a plain array. Where a matrix product or a convolution has exactly one
`Param` among its operands, the walker asks its *visitor* what to compute there.
What the visitor emits (sums of activations, say) is carried out of loops,
branches and remat by the walker.

Nothing is passed over in silence: a `Param` that meets a primitive which hides
its computation is an error that names both, and every other place where a leaf
stops being a leaf is recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
import itertools
from typing import Any

from utilized_rank.tree.layout import View
from utilized_rank.walk import compat
from utilized_rank.walk import control
from utilized_rank.walk import sums
from utilized_rank.walk.values import Loop
from utilized_rank.walk.values import Output
from utilized_rank.walk.values import Param
from utilized_rank.walk.values import Tape
from utilized_rank.walk.values import UnsupportedError
from utilized_rank.walk.values import Visitor

__all__ = ['PART', 'UnsupportedError', 'Walk']

_KEEPS_LAYOUT = frozenset(
  {
    'copy',
    'copy_p',
    'stop_gradient',
    'sharding_constraint',
    'reduce_precision',
    'name',
    'pvary',
    'pcast',
    'reshard',
    'device_put',
  }
)
_RENAMES = frozenset(
  {
    'convert_element_type',
    'reshape',
    'transpose',
    'squeeze',
    'broadcast_in_dim',
    'copy',
    'name',
    'stop_gradient',
    'pvary',
    'sharding_constraint',
  }
)
_PRODUCTS = ('dot_general', 'conv_general_dilated')
# Their sub-computation combines two scalars; it holds no product.
_REDUCERS = ('scatter', 'reduce', 'select_and_', 'arg', 'cum')
# Reason for a leaf of which only a part is used, not one of several equal
# parts: its other parts may go anywhere.
PART = 'a slice that is not one of equal parts'
_REASONS = dict.fromkeys(('slice', 'split', 'dynamic_slice'), PART) | {
  'gather': 'a lookup (gather)',
}


class Walk:
  """One walk over a traced function."""

  # What to do at calls, loops and branches that a `Param` enters.
  rules = control.RULES

  def __init__(self, visitor: Visitor):
    self.visitor = visitor
    self.tape = Tape()
    # id of a value -> (what it is a plain renaming of, the value). The value
    # is kept so that its id stays its own.
    self._origins: dict[int, tuple[Hashable, Any]] = {}
    self._serial = itertools.count()
    self._made: dict[Hashable, Any] = {}
    # id of a value -> (the leaf that it is a multiple of, the value).
    self.multiples: dict[int, tuple[Param, Any]] = {}

  def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
    """Makes a value the first time that its key is seen in this scope."""
    if key not in self._made:
      self._made[key] = make()
    return self._made[key]

  def origin(self, value: Any) -> Hashable:
    """A key that two values share if one computation made both.

    Three casts of one activation, as q, k and v make, are one value.
    """
    known = self._origins.get(id(value))
    if known is None:
      known = self._origins[id(value)] = (('value', next(self._serial)), value)
    return known[0]

  def scope(self) -> Walk:
    """The walk of a body: emissions of its own, all else shared."""
    inner = type(self)(self.visitor)
    inner._origins, inner._serial = self._origins, self._serial
    inner.multiples = self.multiples
    return inner

  def run(
    self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]
  ) -> list[Any]:
    """Evaluates an open jaxpr; values in and out may be `Param`s."""
    env: dict[Any, Any] = {}
    uses = compat.count_uses(jaxpr)
    live = dict(uses)

    def write(var, value):
      if isinstance(value, Output) and uses.get(var, 0) != 1:
        # Only a bias that is the sole thing done to a product is its bias.
        value = self.shared(value)
      env[var] = value

    def read(atom):
      return atom.val if isinstance(atom, compat.Literal) else env[atom]

    for var, value in zip(
      [*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True
    ):
      write(var, value)
    for eqn in jaxpr.eqns:
      operands = [read(a) for a in eqn.invars]
      with compat.context_of(eqn):
        results = self._equation(eqn, operands)
      for var, value in zip(eqn.outvars, results, strict=True):
        write(var, value)
      for atom in eqn.invars:
        if not isinstance(atom, compat.Literal):
          live[atom] -= 1
          if not live[atom]:
            del env[atom]
    return [read(a) for a in jaxpr.outvars]

  def shared(self, output: Output) -> Any:
    """What stands for a product's output that is used more than once."""
    return output.value

  def materialise(self, value: Any, reason: str) -> Any:
    """The plain array behind a value of the walk, the loss being noted."""
    if isinstance(value, Param):
      self.visitor.dropped(value.view, reason)
      return value.payload.materialise(value.view)
    return value.value if isinstance(value, Output) else value

  def _equation(self, eqn: Any, operands: list[Any]) -> list[Any]:
    name = eqn.primitive.name
    params = [i for i, v in enumerate(operands) if isinstance(v, Param)]
    if not params:
      return self._plain(eqn, operands)
    if name in _PRODUCTS:
      return [self._product(eqn, operands, params)]
    moved = self._move_params(eqn, operands, params)
    if moved is not None:
      return moved
    if any(isinstance(v, Output) for v in operands):
      summed = sums.followed(self, eqn, operands)
      if summed is not None:
        return summed
    operands = [v.value if isinstance(v, Output) else v for v in operands]
    rule = self.rules.get(name)
    if rule is not None:
      return rule(self, eqn, operands)
    if name in compat.OPAQUE or (
      compat.sub_jaxprs(eqn) and not name.startswith(_REDUCERS)
    ):
      for i in params:
        self.visitor.opaque(operands[i].view, name)
    reason = _REASONS.get(name, name)
    results = compat.bind(eqn, [self.materialise(v, reason) for v in operands])
    if name == 'mul' and len(params) == 1:
      self.multiples[id(results[0])] = operands[params[0]], results[0]
    return results

  def _plain(self, eqn: Any, operands: list[Any]) -> list[Any]:
    if any(isinstance(v, Output) for v in operands):
      if len(operands) == 1:
        views = [moved(eqn, term.view) for term in operands[0].terms]
        if any(view is not None for view in views):
          (value,) = compat.bind(eqn, [operands[0].value])
          return [operands[0].moved(value, views)]
      summed = sums.followed(self, eqn, operands)
      if summed is not None:
        return summed
      operands = [v.value if isinstance(v, Output) else v for v in operands]
    results = compat.bind(eqn, operands)
    if eqn.primitive.name in _RENAMES and len(operands) == 1:
      key = (
        eqn.primitive.name,
        self.origin(operands[0]),
        compat.params_key(eqn),
      )
      self._origins[id(results[0])] = (key, results[0])
      if id(operands[0]) in self.multiples:
        leaf, _ = self.multiples[id(operands[0])]
        self.multiples[id(results[0])] = leaf, results[0]
    return results

  def _product(self, eqn: Any, operands: list[Any], params: list[int]) -> Any:
    kernels = [i for i in params if self.visitor.wants(operands[i].view)]
    if len(kernels) != 1:
      # None that is looked at, or two: which of them is the kernel?
      kernels = []
    plain = []
    for i, value in enumerate(operands):
      if isinstance(value, Param) and i not in kernels:
        reason = eqn.primitive.name
        if len(params) == 2:
          reason += f' with {operands[1 - i].view.path}'
        value = self.materialise(value, reason)
      plain.append(value.value if isinstance(value, Output) else value)
    if kernels:
      return self.visitor.product(eqn, plain, kernels[0], self)
    return compat.bind(eqn, plain)[0]

  # --- layout operations ---

  def _move_params(
    self, eqn: Any, operands: list[Any], params: list[int]
  ) -> list[Any] | None:
    name = eqn.primitive.name
    if name == 'optimization_barrier':
      # A barrier orders what is computed; a parameter is not computed.
      plain = [
        v.value if isinstance(v, Output) else v
        for v in operands
        if not isinstance(v, Param)
      ]
      results = iter(eqn.primitive.bind(*plain) if plain else ())
      return [v if isinstance(v, Param) else next(results) for v in operands]
    if name == 'dynamic_slice' and params == [0]:
      return self._dynamic_index(eqn, operands)
    if len(operands) != 1:
      return sums.unscaled(eqn, operands)
    (param,) = operands
    if name == 'slice':
      starts, limits = eqn.params['start_indices'], eqn.params['limit_indices']
      if any(s != 1 for s in eqn.params['strides'] or ()):
        return None
      lengths = [b - a for a, b in zip(starts, limits, strict=True)]
      cut = _cut_axis(lengths, param.view)
      if cut is None:
        return None
      part = _part(param, cut, starts[cut], lengths[cut])
      return None if part is None else [part]
    if name in ('split', 'unstack'):
      return _parts(eqn, param)
    view = moved(eqn, param.view)
    if view is None:
      return None
    return [Param(view, param.payload.relayout(eqn, view))]

  def _dynamic_index(self, eqn: Any, operands: list[Any]) -> list[Any] | None:
    """One traced index of one axis that is one atom."""
    param = operands[0]
    lengths = eqn.params['slice_sizes']
    axis = _cut_axis(lengths, param.view)
    if axis is None or lengths[axis] != 1 or len(param.view.axes[axis]) != 1:
      return None
    start = operands[1 + axis]
    if isinstance(start, Output):
      start = start.value
    cut = _cut(param.view, axis, 1)
    assert cut is not None  # an atom is cut into itself and ones
    payload = param.payload.index(cut, axis, start)
    if payload is None:
      return None
    return [Param(cut.take(axis, (Loop('traced index'), start)), payload)]


def _cut_axis(lengths: Sequence[int], view: View) -> int | None:
  """The one axis that a slice shortens, or None."""
  cut = [
    i
    for i, (n, size) in enumerate(zip(lengths, view.sizes, strict=True))
    if n != size
  ]
  return cut[0] if len(cut) == 1 else None


def _cut(view: View, axis: int, length: int) -> View | None:
  """The view with an axis cut into (parts, length)."""
  parts = view.sizes[axis] // length
  sizes = (*view.sizes[:axis], parts, length, *view.sizes[axis + 1 :])
  return view.reshape(sizes)


def _part(param: Param, axis: int, start: int, length: int) -> Param | None:
  """One of the equal parts that an axis is cut into, if it is one."""
  if not length or param.view.sizes[axis] % length or start % length:
    return None
  cut = _cut(param.view, axis, length)
  if cut is None or (not cut.axes[axis]):
    return None
  at = start // length
  payload = param.payload.index(cut, axis, at)
  return None if payload is None else Param(cut.take(axis, at), payload)


def _parts(eqn: Any, param: Param) -> list[Any] | None:
  """`lax.split` into equal parts, or `lax.unstack`."""
  axis = eqn.params['axis']
  if eqn.primitive.name == 'unstack':
    length = 1
  else:
    length, *others = map(int, eqn.params['sizes'])
    if any(n != length for n in others):
      return None
  parts = []
  for i in range(len(eqn.outvars)):
    if eqn.primitive.name == 'unstack':
      part = member(param, axis, i)
    else:
      part = _part(param, axis, i * length, length)
    if part is None:
      return None
    parts.append(part)
  return parts


def member(param: Param, axis: int, at: int) -> Param | None:
  """One index of an axis, the axis gone; None if it cannot be followed."""
  part = _part(param, axis, at, 1)
  if part is None:
    return None
  return Param(part.view.squeeze([axis]), part.payload.squeeze(axis))


def moved(eqn: Any, view: View) -> View | None:
  """The view after a layout operation; None if the equation is not one."""
  name, p = eqn.primitive.name, eqn.params
  if name == 'convert_element_type':
    # What an integer keeps of a number is no renaming of it.
    kept = compat.is_floating(p['new_dtype']) or p['new_dtype'] == view.dtype
    return view.cast(p['new_dtype']) if kept else None
  if name in _KEEPS_LAYOUT:
    return view
  if name == 'transpose':
    return view.transpose(p['permutation'])
  if name == 'squeeze':
    return view.squeeze(p['dimensions'])
  if name == 'broadcast_in_dim' and len(eqn.invars) == 1:
    return view.broadcast(p['shape'], p['broadcast_dimensions'])
  if name == 'reshape':
    if p['dimensions'] is not None:  # as vmap writes a transposition
      view = view.transpose(p['dimensions'])
    return view.reshape(p['new_sizes'])
  return None

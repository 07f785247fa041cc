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

import jax.numpy as jnp
import numpy as np

from utilized_rank.tree.layout import View
from utilized_rank.walk import compat
from utilized_rank.walk import control
from utilized_rank.walk import parts
from utilized_rank.walk import pieces
from utilized_rank.walk import scale
from utilized_rank.walk import sums
from utilized_rank.walk.rescaling import BY_ITSELF
from utilized_rank.walk.rescaling import NOTHING
from utilized_rank.walk.rescaling import RESCALES
from utilized_rank.walk.rescaling import Rescaling
from utilized_rank.walk.values import Loop
from utilized_rank.walk.values import Output
from utilized_rank.walk.values import Param
from utilized_rank.walk.values import Pieces
from utilized_rank.walk.values import Running
from utilized_rank.walk.values import Tape
from utilized_rank.walk.values import UnsupportedError
from utilized_rank.walk.values import Visitor

__all__ = ['UnsupportedError', 'Walk']

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
_RAGGED = 'ragged_dot_general'
_PRODUCTS = (*pieces.PRODUCTS, _RAGGED)
# Their sub-computation combines two scalars; it holds no product.
_REDUCERS = ('scatter', 'reduce', 'select_and_', 'arg', 'cum')


class Walk:
  """One walk over a traced function.

  `rescaling` is what the function does to its parameters before their use.
  """

  # What to do at calls, loops and branches that a `Param` enters.
  rules = control.RULES

  def __init__(self, visitor: Visitor, rescaling: Rescaling = NOTHING):
    self.visitor = visitor
    self.rescaling = rescaling
    self.tape = Tape()
    # id of a value -> (what it is a plain renaming of, the value). The value
    # is kept so that its id stays its own.
    self._origins: dict[int, tuple[Hashable, Any]] = {}
    self._serial = itertools.count()
    self._made: dict[Hashable, Any] = {}
    # id of a value -> (the leaf that it is a multiple of, the value).
    self.multiples: dict[int, tuple[Param, Any]] = {}
    # id of an array of one number -> (that number, the array).
    self.repeats: dict[int, tuple[Any, Any]] = {}

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

  def scope(self, running: Running | None = None) -> Walk:
    """The walk of a body: emissions of its own, all else shared.

    Args:
      running: the examples that are not done, where the body is a loop's that
        runs on for others; the visitor's `among` is told, if it has one.
    """
    visitor = self.visitor
    if running is not None and hasattr(visitor, 'among'):
      visitor = visitor.among(running)
    inner = type(self)(visitor, self.rescaling)
    inner._origins, inner._serial = self._origins, self._serial
    inner.multiples = self.multiples
    inner.repeats = self.repeats
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
    if isinstance(value, Pieces):
      arrays = [self.materialise(p, reason) for p in value.params]
      return pieces.together(arrays, value.axis)
    if isinstance(value, Param):
      self.visitor.dropped(value.view, reason)
      return value.payload.materialise(value.view)
    return value.value if isinstance(value, Output) else value

  def _equation(self, eqn: Any, operands: list[Any]) -> list[Any]:
    name = eqn.primitive.name
    if any(isinstance(v, Pieces) for v in operands):
      found = pieces.results(self, eqn, operands, self._move_params)
      if found is not None:
        return found
      operands = [
        self.materialise(v, parts.reason(eqn)) if isinstance(v, Pieces) else v
        for v in operands
      ]
    if name == _RAGGED:
      operands = self._read_ragged(eqn, operands)
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
    results = compat.bind(
      eqn, [self.materialise(v, self._reason(eqn, v)) for v in operands]
    )
    if name == 'mul' and len(params) == 1:
      self.multiples[id(results[0])] = operands[params[0]], results[0]
    return results

  def rescales(self, eqn: Any, view: View) -> bool:
    """Whether a product does no more than set the size of a parameter."""
    return (eqn.outvars[0], view.path) in self.rescaling.products

  def _reason(self, eqn: Any, value: Any) -> str:
    """Why an equation's operand is no leaf any more, if it is one."""
    reason = parts.reason(eqn)
    if isinstance(value, Param) and eqn.outvars:
      use = eqn.outvars[0], value.view.path
      reason += BY_ITSELF * (use in self.rescaling.by_itself)
    return reason

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
    if eqn.primitive.name == 'broadcast_in_dim' and np.size(operands[0]) == 1:
      one = jnp.reshape(operands[0], ())
      self.repeats[id(results[0])] = (one, results[0])
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
    kernels = [
      i
      for i in params
      if self.visitor.wants(operands[i].view) and operands[i].view.part is None
    ]
    idle = [i for i in params if self.rescales(eqn, operands[i].view)]
    if len(kernels) != 1 or kernels[0] in idle:
      # None that is looked at, or two: which of them is the kernel?
      kernels = []
    plain = []
    for i, value in enumerate(operands):
      if isinstance(eqn.invars[i], compat.Literal):
        # A number; what reads rows wants an array.
        value = np.asarray(value, eqn.invars[i].aval.dtype)
      if isinstance(value, Param) and i not in kernels:
        reason = value.view.part or eqn.primitive.name
        if len(params) == 2:
          reason += f' with {operands[1 - i].view.path}'
        if i in idle:
          reason = RESCALES
        value = self.materialise(value, reason)
      plain.append(value.value if isinstance(value, Output) else value)
    if kernels:
      return self.visitor.product(eqn, plain, kernels[0], self)
    return compat.bind(eqn, plain)[0]

  def _read_ragged(self, eqn: Any, operands: list[Any]) -> list[Any]:
    """The operands, of which a `Param` is one that may be a kernel.

    Raises:
      UnsupportedError: a kernel of which each group has rows of its own, or of
        a ragged batch.
    """
    *both, sizes = operands
    sizes = self.materialise(sizes, eqn.primitive.name)
    ways = eqn.params['ragged_dot_dimension_numbers']
    if not (ways.rhs_group_dimensions and isinstance(both[1], Param)):
      for i, value in enumerate(both):
        if isinstance(value, Param):
          self.visitor.opaque(value.view, eqn.primitive.name)
          both[i] = self.materialise(value, eqn.primitive.name)
    return [*both, sizes]

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
    if name in scale.SCALES:
      return scale.scaled(self, eqn, operands, params)
    if len(operands) != 1:
      return None
    (param,) = operands
    if name in ('slice', 'split', 'unstack'):
      return parts.taken(eqn, param)
    view = moved(eqn, param.view)
    if view is None:
      return None
    return [Param(view, param.payload.relayout(eqn, view))]

  def _dynamic_index(self, eqn: Any, operands: list[Any]) -> list[Any] | None:
    """One traced index of one axis that is one atom."""
    param = operands[0]
    lengths = eqn.params['slice_sizes']
    axis = parts.cut_axis(lengths, param.view.sizes)
    if axis is None or lengths[axis] != 1 or len(param.view.axes[axis]) != 1:
      return None
    start = operands[1 + axis]
    if isinstance(start, Output):
      start = start.value
    cut = parts.cut(param.view, axis, 1)
    assert cut is not None  # an atom is cut into itself and ones
    payload = param.payload.index(cut, axis, start)
    if payload is None:
      return None
    return [Param(cut.take(axis, (Loop('traced index'), start)), payload)]


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
  if name == 'rev':
    return view.flip(p['dimensions'])
  if name == 'broadcast_in_dim' and len(eqn.invars) == 1:
    return view.broadcast(p['shape'], p['broadcast_dimensions'])
  if name == 'reshape':
    if p['dimensions'] is not None:  # as vmap writes a transposition
      view = view.transpose(p['dimensions'])
    return view.reshape(p['new_sizes'])
  return None

"""Follows the outputs of kernels for as long as each unit is by itself.

What a product with a kernel makes is *units*, along one axis. They stay units
where every other operand has one number for each of them (a leaf: a bias, a
norm's scale) or one for all, and through layout and sums along other axes. A
product that contracts them with a kernel reads them; anything else ends them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import copy
import dataclasses
import math
from typing import Any, NamedTuple

from utilized_rank.hidden.ends import Refusal
from utilized_rank.hidden.ends import contracted_with
from utilized_rank.hidden.ends import long_atoms
from utilized_rank.hidden.ends import loops_of
from utilized_rank.hidden.ends import made_by
from utilized_rank.hidden.ends import plain_product
from utilized_rank.hidden.ends import unit_kernel
from utilized_rank.hidden.ends import units_of
from utilized_rank.hidden.layers import UnitKernel
from utilized_rank.hidden.layers import Units
from utilized_rank.products import describe
from utilized_rank.products.product import Product
from utilized_rank.tree.layout import View
from utilized_rank.walk import compat
from utilized_rank.walk.analysis import Analysis
from utilized_rank.walk.interpret import moved
from utilized_rank.walk.values import Loop

PRODUCTS = ('dot_general', 'conv_general_dilated', 'ragged_dot_general')
# Each number of the result is of the numbers at its place.
_OF_NUMBERS = """
  abs add add_any and asinh atan cbrt ceil clamp convert_element_type copy
  copy_p cos cosh div eq erf erf_inv erfc exp exp2 expm1 floor ge gt integer_pow
  is_finite le log log1p logistic lt max min mul name ne neg not or pow
  reduce_precision rem round rsqrt select_n sign sin sinh sqrt square
  stop_gradient sub tan tanh xor
"""
_ELEMENTWISE = frozenset(_OF_NUMBERS.split())
_REDUCTIONS = tuple(f'reduce_{of}' for of in ('sum', 'max', 'min', 'prod'))
_WINDOWS = ('reduce_window_sum', 'reduce_window_max', 'reduce_window_min')


class Vector(NamedTuple):
  """A leaf with one number for each index of an axis."""

  at: Units
  loops: tuple[Any, ...]


class Made(NamedTuple):
  """Units, by the product that made them, or the one that reads them."""

  kernel: UnitKernel
  loops: tuple[Any, ...]


class Value(NamedTuple):
  """What is known of one value: a leaf, units, vectors, or none of them.

  Attributes:
    view: of a leaf behind layout alone.
    units: numbers of the products whose units it is made of.
    vectors: leaves with one number a unit that it is made of alone.
    axis: along which units or vectors lie.
    flat: axes along which it repeats itself.
  """

  view: View | None = None
  units: frozenset[int] = frozenset()
  vectors: frozenset[Vector] = frozenset()
  axis: int = -1
  flat: frozenset[int] = frozenset()


PLAIN = Value()


@dataclasses.dataclass
class Found:
  """What an analysis found.

  Attributes:
    made: of every product with a kernel that makes units, by number.
    read: (numbers of products, reader) of every product that reads units.
    met: numbers of products whose units meet one by one.
    ends: number of a product to why its units are no hidden layer.
    owned: (leaf, numbers) where units meet a vector.
    uses: path to the number of products of a kernel.
    other: path to what else is done with a leaf.
    plain: path to why a product with a kernel makes no units.
  """

  made: list[Made] = dataclasses.field(default_factory=list)
  read: list[tuple[frozenset[int], Made]] = dataclasses.field(
    default_factory=list
  )
  met: list[frozenset[int]] = dataclasses.field(default_factory=list)
  ends: dict[int, str] = dataclasses.field(default_factory=dict)
  owned: list[tuple[Vector, frozenset[int]]] = dataclasses.field(
    default_factory=list
  )
  uses: dict[str, int] = dataclasses.field(default_factory=dict)
  other: dict[str, dict[str, None]] = dataclasses.field(default_factory=dict)
  plain: dict[str, str] = dataclasses.field(default_factory=dict)

  def copied(self) -> Found:
    """With lists and dicts of its own."""
    held = {k: copy.copy(v) for k, v in vars(self).items()}
    held['other'] = {k: dict(v) for k, v in self.other.items()}
    return Found(**held)


class Flow(Analysis[Value]):
  """One analysis; `found` is what it found."""

  def __init__(self) -> None:
    self.found = Found()

  def again(self) -> Callable[[], None]:
    before = self.found

    def start_over() -> None:
      self.found = before.copied()

    return start_over

  def constant(self, atom: Any) -> Value:
    return Value(flat=_all(atom))

  # --- where values end ---

  def end(self, values: Sequence[Value], reason: str) -> None:
    """They are no units, vectors or kernels from here on."""
    for value in values:
      for number in value.units:
        self.found.ends.setdefault(number, f'its output {reason}')
      named = [v.at.path for v in value.vectors]
      named += [] if value.view is None else [value.view.path]
      for path in named:
        self.found.other.setdefault(path, {})[reason] = None

  def join(self, values: Sequence[Value], what: str) -> Value:
    first = values[0]
    if all(value == first for value in values):
      return first
    self.end(values, f'is one of several in {what}')
    return PLAIN

  def decided(self, by: Value, what: str, values: list[Value]) -> list[Value]:
    self.end([by], f'decides {what}')
    return values

  # --- loops ---

  def _entered(self, values: Sequence[Value], what: str) -> list[Value]:
    """Values on their way into a loop; units do not go there."""
    self.end([v for v in values if v.units], f'enters {what}')
    return [PLAIN if v.units else v for v in values]

  def while_loop(self, eqn: Any, ins: list[Value]) -> list[Value]:
    return super().while_loop(eqn, self._entered(ins, 'a while loop'))

  def scan(self, eqn: Any, ins: list[Value]) -> list[Value]:
    ins = self._entered(ins, 'a scan')
    jaxpr, _ = compat.open_jaxpr(eqn.params['jaxpr'])
    n_consts, n_carry = compat.scan_split(eqn.params)
    n_state = n_consts + n_carry
    token = Loop('scan')
    outs, carry = self.repeat(
      jaxpr,
      ins[:n_consts],
      ins[n_consts:n_state],
      [self._step(v, token) for v in ins[n_state:]],
    )
    ys = outs[n_carry:]
    self.end(ys, 'is stacked by a scan')
    return [*carry, *[PLAIN] * len(ys)]

  def _step(self, value: Value, token: Loop) -> Value:
    """One step of what a scan goes over."""
    if value.view is not None:
      return Value(view=value.view.take(0, token))
    flat = frozenset(i - 1 for i in value.flat if i)
    if value.vectors and not value.axis:
      self.end([value], 'is read by a scan step by step')
      return PLAIN
    return value._replace(axis=value.axis - 1, flat=flat)

  # --- equations ---

  def equation(self, eqn: Any, ins: list[Value]) -> list[Value]:
    name = eqn.primitive.name
    if name in PRODUCTS:
      return [self._product(eqn, ins)]
    first = ins[0] if ins else PLAIN
    if len(ins) == 1 and first.view is not None:
      view = moved(eqn, first.view)
      if view is not None:
        return [Value(view=view)]
    values = [_as_vector(v) for v in ins]
    out = None
    if name in _ELEMENTWISE and len(eqn.outvars) == 1:
      out = self._elementwise(eqn, values)
    elif values and not any(v.units or v.vectors for v in values[1:]):
      out = _laid_out(eqn, values)
    if out is not None:
      return [out] * len(eqn.outvars)
    self.end(values, f'meets {name}')
    return [Value(flat=_all(var)) for var in eqn.outvars]

  def _elementwise(self, eqn: Any, values: list[Value]) -> Value | None:
    shape = eqn.outvars[0].aval.shape
    wide = [
      value
      for atom, value in zip(eqn.invars, values, strict=True)
      if atom.aval.shape == shape and shape
    ]
    if any(v.view is not None for v in values):
      return None
    known = [v for v in values if v.units or v.vectors]
    flat = frozenset(range(len(shape))).intersection(*(v.flat for v in wide))
    if not known:
      return Value(flat=flat)
    axis = known[0].axis
    for value in wide:
      same = value.axis == axis
      if not (same if value.units or value.vectors else axis in value.flat):
        return None
    units = frozenset().union(*(v.units for v in known))
    vectors = frozenset().union(*(v.vectors for v in known))
    if not units:
      return Value(vectors=vectors, axis=axis, flat=flat)
    self.found.met.append(units)
    self.found.owned += [(vector, units) for vector in vectors]
    return Value(units=units, axis=axis)

  # --- products ---

  def _product(self, eqn: Any, ins: list[Value]) -> Value:
    kernels = [i for i, v in enumerate(ins) if v.view is not None]
    if len(kernels) != 1 or len(ins) > 2:
      self.end(ins, f'meets {eqn.primitive.name}, and no one kernel')
      return PLAIN
    (which,) = kernels
    view, other = ins[which].view, ins[1 - which]
    assert view is not None
    path = view.path
    described = describe.describe(eqn, view, which)
    try:
      product = plain_product(described)
    except Refusal as why:
      self.found.other.setdefault(path, {})[str(why)] = None
      self.found.plain.setdefault(path, str(why))
      self.end([other], f'meets {path!r}: {why}')
      return PLAIN
    self.found.uses[path] = self.found.uses.get(path, 0) + 1
    if other.vectors:
      self.end([other], f'meets {path!r}')
    if other.units:
      self._reads(eqn, other, which, product)
    try:
      axis, kernel = made_by(product)
    except Refusal as why:
      self.found.plain[path] = str(why)
      return PLAIN
    self.found.made.append(Made(kernel, loops_of(product.view)))
    return Value(units=frozenset([len(self.found.made) - 1]), axis=axis)

  def _reads(self, eqn, other: Value, which: int, product: Product) -> None:
    path = product.view.path
    axis = contracted_with(eqn, other.axis, which)
    if axis is None:
      self.end([other], f'meets {path!r}, which does not sum over its units')
      return
    # The product's own view may have one axis more than the equation's.
    try:
      kernel = unit_kernel(product, long_atoms(product.view, axis))
    except Refusal as why:
      self.end([other], f'meets {path!r}: {why}')
      return
    self.found.met.append(other.units)
    self.found.read.append((other.units, Made(kernel, loops_of(product.view))))


def _all(atom: Any) -> frozenset[int]:
  """Every axis of a value of one number."""
  shape = getattr(atom.aval, 'shape', ())
  return frozenset(range(len(shape)) if math.prod(shape) == 1 else ())


def _as_vector(value: Value) -> Value:
  """A leaf with one long axis as a vector; one number as what repeats."""
  view = value.view
  if view is None:
    return value
  every = range(len(view.axes))
  long = [i for i in every if long_atoms(view, i)]
  if not long and not loops_of(view):
    return Value(flat=frozenset(every))
  if len(long) != 1 or view.flipped or len(long_atoms(view, long[0])) != 1:
    return value
  (axis,) = long
  try:
    at = units_of(view, long_atoms(view, axis))
  except Refusal:
    return value
  flat = frozenset(i for i in every if i != axis)
  vector = Vector(at, loops_of(view))
  return Value(vectors=frozenset([vector]), axis=axis, flat=flat)


def _laid_out(eqn: Any, values: list[Value]) -> Value | None:
  """The first operand laid out anew, or summed along other axes; or None."""
  value, name, p = values[0], eqn.primitive.name, eqn.params
  if value.view is not None:
    return None
  shape = eqn.invars[0].aval.shape
  out = eqn.outvars[0].aval.shape
  if name == 'broadcast_in_dim':
    dims = p['broadcast_dimensions']
    to = {i: d for i, d in enumerate(dims) if shape[i] == out[d]}
    flat = frozenset(to[i] for i in value.flat if i in to)
    flat |= frozenset(range(len(out))) - frozenset(to.values())
    return _placed(value, to, flat)
  if name == 'transpose':
    to = {i: j for j, i in enumerate(p['permutation'])}
    return _placed(value, to, frozenset(to[i] for i in value.flat))
  if not (value.units or value.vectors):
    whole = len(value.flat) == len(shape)
    keeps = name in ('reshape', 'squeeze', 'expand_dims')
    return Value(flat=frozenset(range(len(out)))) if whole and keeps else None
  to = _axes_after(name, p, shape, out, value.axis)
  return None if to is None else _placed(value, {value.axis: to}, frozenset())


def _placed(value: Value, to: dict[int, int], flat: frozenset[int]):
  if not (value.units or value.vectors):
    return Value(flat=flat)
  if value.axis not in to:
    return None
  return value._replace(axis=to[value.axis], flat=flat)


def _axes_after(name: str, p: Any, shape: Any, out: Any, axis: int):
  """Where an axis is after an operation on others; None if it is not."""
  if name == 'reshape' and p['dimensions'] is None:
    before = math.prod(shape[:axis])
    for i, n in enumerate(out):
      if n == shape[axis] and math.prod(out[:i]) == before:
        return i
  if name == 'squeeze' and axis not in p['dimensions']:
    return axis - sum(i < axis for i in p['dimensions'])
  if name in _REDUCTIONS and axis not in p['axes']:
    return axis - sum(i < axis for i in p['axes'])
  if name == 'rev' and axis not in p['dimensions']:
    return axis
  if name in ('slice', 'dynamic_slice', 'pad') and out[axis] == shape[axis]:
    whole = name != 'pad' or p['padding_config'][axis] == (0, 0, 0)
    return axis if whole else None
  if name in _WINDOWS and p['window_dimensions'][axis] == 1:
    whole = p['window_strides'][axis] == 1 and p['padding'][axis] == (0, 0)
    return axis if whole else None
  if name.startswith('cum') and p['axis'] != axis:
    return axis
  return None

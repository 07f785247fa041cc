"""Products that do no more than set the size of a parameter.

Spectral normalisation divides a kernel W by its largest singular value, which
products of W with vectors of the state estimate. They are products of a leaf,
but no data is in them: what the layer reads, it reads at x (W / s). A product
of a leaf is one of these, and no use of a kernel, if

* its other operand follows from parameters and constants alone, and
* its result meets what follows from the batch only in a parameter that it
  changes: in the leaf itself (W / s, W - s u v^T), as a number that multiplies
  or divides a parameter, or one that multiplies or divides what the batch and
  the same parameters made ((x W) / s).

Learnt queries, latents and positions follow from parameters alone, too, but
what is made of them meets the batch as activations: theirs are uses. A state
that is an argument beside the parameters counts as data.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import math
from typing import Any, NamedTuple

from utilized_rank.walk import compat
from utilized_rank.walk.analysis import Analysis

# Why such a product is none of the kernel's.
RESCALES = 'a product that only rescales a parameter'
# How an equation uses a leaf beside what was computed from the same leaf.
BY_ITSELF = ' with a value computed from itself'

_PRODUCTS = ('dot_general', 'conv_general_dilated')
_SCALES = ('mul', 'div')
_KEEPS_NUMBER = (
  'broadcast_in_dim',
  'convert_element_type',
  'copy',
  'reshape',
  'squeeze',
  'stop_gradient',
  'transpose',
)
# What these make of a leaf is a part or a repetition of it.
_CUTS = (
  'broadcast_in_dim',
  'concatenate',
  'dynamic_slice',
  'pad',
  'slice',
  'split',
  'unstack',
)


@dataclasses.dataclass(frozen=True)
class Rescaling:
  """What a function does to parameters before it uses them.

  Attributes:
    products: (output variable, leaf) of products that only rescale.
    by_itself: (output variable, leaf) of equations that combine a leaf with a
      value that is computed from it.
  """

  products: frozenset[tuple[Any, str]] = frozenset()
  by_itself: frozenset[tuple[Any, str]] = frozenset()


NOTHING = Rescaling()


def find(jaxpr: Any, params: Sequence[str]) -> Rescaling:
  """Finds them in an open jaxpr.

  Args:
    jaxpr: its first inputs are parameters, its others the batch.
    params: paths of these parameters, in order.
  """
  flow = _Flow()
  leaves = jaxpr.invars[: len(params)]
  values = [
    _Value(False, 1 << i, 1 << i if _size(var) > 1 else 0, _size(var) == 1)
    for i, var in enumerate(leaves)
  ]
  data = _Value(True)
  flow.run(jaxpr, values + [data] * (len(jaxpr.invars) - len(params)))
  named = lambda uses: frozenset((u.var, params[u.leaf]) for u in uses)
  return Rescaling(named(flow.rescales - flow.kept), named(flow.by_itself))


class _Use(NamedTuple):
  """An equation, by its first result, as a use of a leaf."""

  var: Any
  leaf: int


class _Value(NamedTuple):
  """What is known of one value; sets of leaves are the bits of a number.

  Attributes:
    is_data: whether it follows from the batch.
    leaves: what it is computed from.
    like: of which leaves it is a layout, rescaled or changed number by number.
    is_number: whether all of its elements are one number.
    products: products of leaves that it is computed from, those with data
      aside.
  """

  is_data: bool
  leaves: int = 0
  like: int = 0
  is_number: bool = False
  products: frozenset[_Use] = frozenset()


class _Flow(Analysis[_Value]):
  """One analysis. Every set only grows, so bodies may be run repeatedly.

  Attributes:
    rescales: products that change a parameter.
    kept: products of which an activation follows, or that read data.
    by_itself: as in `Rescaling`.
  """

  def __init__(self):
    self.rescales: set[_Use] = set()
    self.kept: set[_Use] = set()
    self.by_itself: set[_Use] = set()

  def constant(self, atom: Any) -> _Value:
    return _Value(False, is_number=_size(atom) == 1)

  def argument(self, var: Any, value: _Value) -> _Value:
    # What a scan reads one of may be one number.
    is_one = not value.is_data and _size(var) == 1
    return value._replace(is_number=True, like=0) if is_one else value

  def equation(self, eqn: Any, ins: list[_Value]) -> list[_Value]:
    leaves = 0
    for value in ins:
      leaves |= value.leaves
    if eqn.primitive.name in _PRODUCTS:
      uses = _uses(eqn, ins)
      if any(v.is_data for v in ins):
        self.kept |= uses
    else:
      uses = frozenset()
    if any(v.is_data for v in ins):
      self._meet_data(eqn, ins)
      return [_Value(True, leaves)] * len(eqn.outvars)
    if eqn.primitive.name in _PRODUCTS:
      made = uses.union(*(v.products for v in ins))
      return [_Value(False, leaves, 0, _size(eqn.outvars[0]) == 1, made)]
    self._note_itself(eqn, ins)
    return [self._changed(eqn, var, ins, leaves) for var in eqn.outvars]

  def _changed(
    self, eqn: Any, var: Any, ins: list[_Value], leaves: int
  ) -> _Value:
    """A result of an equation without data that is no product."""
    name = eqn.primitive.name
    like, size = 0, _size(var)
    for atom, value in zip(eqn.invars, ins, strict=True):
      if name in _CUTS or _size(atom) == size:
        like |= value.like
    is_number = size == 1 or (name in _KEEPS_NUMBER and ins[0].is_number)
    made: frozenset[_Use] = frozenset().union(*(v.products for v in ins))
    done = {use for use in made if like >> use.leaf & 1}
    if like and name in _SCALES:
      done.update(*(v.products for v in ins if v.is_number))
    self.rescales |= done
    like = 0 if is_number else like
    return _Value(False, leaves, like, is_number, made - done)

  def _meet_data(self, eqn: Any, ins: list[_Value]) -> None:
    """What becomes of products whose results meet data."""
    is_scale = eqn.primitive.name in _SCALES
    for i, value in enumerate(ins):
      if value.is_data or not value.products:
        continue
      other = ins[1 - i] if is_scale else value
      if is_scale and value.is_number and other.leaves & value.leaves:
        self.rescales |= value.products
      else:
        self.kept |= value.products

  def _note_itself(self, eqn: Any, ins: list[_Value]) -> None:
    for i, value in enumerate(ins):
      if not value.like or not eqn.outvars:
        continue
      for other in ins[:i] + ins[i + 1 :]:
        for leaf in _bits(value.like & other.leaves):
          self.by_itself.add(_Use(eqn.outvars[0], leaf))

  def join(self, values: Sequence[_Value], what: str) -> _Value:
    del what
    first, *others = values
    for other in others:
      first = _Value(
        first.is_data or other.is_data,
        first.leaves | other.leaves,
        first.like | other.like,
        first.is_number and other.is_number,
        first.products | other.products,
      )
    return self._as_data(first) if first.is_data else first

  def _as_data(self, value: _Value) -> _Value:
    self.kept |= value.products
    return _Value(True, value.leaves)

  # --- computations inside ---

  def decided(
    self, by: _Value, what: str, values: list[_Value]
  ) -> list[_Value]:
    del what
    return [self._as_data(v) for v in values] if by.is_data else values

  def scan(self, eqn: Any, ins: list[_Value]) -> list[_Value]:
    jaxpr, _ = compat.open_jaxpr(eqn.params['jaxpr'])
    n_consts, n_carry = compat.scan_split(eqn.params)
    n_state = n_consts + n_carry
    outs, carry = self.repeat(
      jaxpr, ins[:n_consts], ins[n_consts:n_state], ins[n_state:]
    )
    # A number of each step is no number of them all.
    ys = [v._replace(is_number=False) for v in outs[n_carry:]]
    return [*carry, *ys]

  inner = {**Analysis.inner, 'shard_map': 'call'}


def _uses(eqn: Any, ins: list[_Value]) -> frozenset[_Use]:
  return frozenset(
    _Use(eqn.outvars[0], leaf) for v in ins for leaf in _bits(v.like)
  )


def _bits(number: int) -> list[int]:
  return [i for i in range(number.bit_length()) if number >> i & 1]


def _size(atom: Any) -> int:
  return math.prod(getattr(atom.aval, 'shape', ()))

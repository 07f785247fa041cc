"""Kernels whose heads, or hidden layers, are narrower than the function's.

Logits depend on W_q W_k^T alone, outputs of attention on W_v W_o. Of rank r,
both are made by heads of r features instead of e; padded with zeros to e they
have the kernels' own shapes, and the unmodified function computes the same.
The units of a hidden layer are the features of a single head.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from utilized_rank.lowrank.leaf import LowRank
from utilized_rank.products.factored import Factored
from utilized_rank.products.factored import lay_out
from utilized_rank.products.factors import Factors
from utilized_rank.products.product import Product
from utilized_rank.tree.layout import Atoms
from utilized_rank.tree.layout import Layout
from utilized_rank.tree.layout import View
from utilized_rank.tree.layout import pieces_of


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, repr=False)
class NarrowHeads(LowRank):
  """A kernel that is zero beyond the first r of each head's features.

  A `LowRank` whose second factor is the identity, padded with zeros to the
  function's head width: it is not stored, and not multiplied with.

  Attributes:
    a: (*groups, *inputs, *outputs), r in place of the head's width.
    layout: how the dense leaf is read as matrices (static).
    head: the atom of `layout` along which a head's features lie (static).

  >>> layout = Layout.of((4, 2, 3), inputs=(0,), outputs=(1, 2))
  >>> w = NarrowHeads(jnp.ones((4, 2, 1)), None, None, layout, head=2)
  >>> w.rank, w.shape, w.dense()[0].tolist()
  (1, (4, 2, 3), [[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
  """

  head: int = dataclasses.field(kw_only=True)

  @property
  def rank(self) -> int:
    """r, features that a head keeps."""
    return self.a.shape[_order(self.layout).index(self.head)]

  @property
  def dtype(self) -> Any:
    return self.a.dtype

  def padded(self, rank: int) -> jax.Array:
    """`a` with zeros after each head's features, to `rank` of them."""
    return _pad(self.opened().a, _order(self.layout).index(self.head), rank)

  @property
  def axes(self) -> dict[str, tuple[int | None, ...]]:
    at = _order(self.layout)
    return {'a': tuple(None if i == self.head else i for i in at)}

  def dense(self) -> jax.Array:
    padded = self.padded(self.layout.atoms[self.head])
    groups, matrix = self.layout.group_shape, self.layout.matrix_shape
    return self.layout.from_matrices(padded.reshape(groups + matrix))

  def payload(self) -> Narrowed:
    a = self.opened().a
    factors = Factors(a, None, None, self.layout, self.layout.groups)
    return Narrowed(Factored(factors), self.head)

  def tree_flatten_with_keys(self):
    static = self.layout, self.head, self.box
    return ((jax.tree_util.GetAttrKey('a'), self.a),), static

  @classmethod
  def tree_unflatten(cls, static, children) -> NarrowHeads:
    layout, head, box = static
    return cls(children[0], None, None, layout, head=head, box=box)


def narrow_shape(layout: Layout, head: int, rank: int) -> tuple[int, ...]:
  """Shape of `NarrowHeads.a`: r in place of the width of the heads."""
  return tuple(rank if i == head else layout.atoms[i] for i in _order(layout))


def _order(layout: Layout, groups: Atoms | None = None) -> Atoms:
  """Atoms of a narrow kernel's axes."""
  groups = layout.groups if groups is None else groups
  return groups + layout.inputs + layout.outputs


def _pad(array: Any, axis: int, size: int) -> Any:
  """Zeros after the end of an axis, where it is shorter."""
  if array.shape[axis] == size:
    return array
  more = [(0, 0)] * array.ndim
  more[axis] = (0, size - array.shape[axis])
  # Not `jax.lax.pad`, of which jax2onnx 0.17.1 takes fixed shapes alone.
  return (np if isinstance(array, np.ndarray) else jnp).pad(array, more)


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class Narrowed:
  """A `NarrowHeads` leaf inside a walk; its groups are told by `grouped`."""

  grouped: Factored
  head: int

  def tree_flatten(self):
    return (self.grouped,), self.head

  @classmethod
  def tree_unflatten(cls, head, children) -> Narrowed:
    (grouped,) = children
    return cls(grouped, head)

  def _read(self, read: Callable[[Any], Factored]) -> Callable[[Any], Narrowed]:
    return lambda x: Narrowed(read(x), self.head)

  def relayout(self, eqn: Any, view: View) -> Narrowed:
    return Narrowed(self.grouped.relayout(eqn, view), self.head)

  def scaled(
    self, view: View, make: Callable[[Any], Any], factor: Any
  ) -> Narrowed | None:
    grouped = self.grouped.scaled(view, make, factor)
    return None if grouped is None else Narrowed(grouped, self.head)

  def squeeze(self, axis: int) -> Narrowed:
    return Narrowed(self.grouped.squeeze(axis), self.head)

  def index(self, cut: View, axis: int, at: Any) -> Narrowed | None:
    grouped = self.grouped.index(cut, axis, at)
    return None if grouped is None else Narrowed(grouped, self.head)

  def unstack(self, view: View):
    parts = self.grouped.unstack(view)
    return None if parts is None else (parts[0], self._read(parts[1]))

  def shard(self, cut: View, spec: Any, parts: dict[int, Any]):
    shards = self.grouped.shard(cut, spec, parts)
    return None if shards is None else (*shards[:2], self._read(shards[2]))

  def materialise(self, view: View) -> Any:
    f = self.grouped.factors
    array = _pad(f.a, self._axis, f.layout.atoms[self.head])
    return self._laid_out(array, f.layout.atoms, view)

  def _laid_out(self, array: Any, atoms: Atoms, view: View) -> Any:
    f = self.grouped.factors
    order = _order(f.layout, f.present)
    left = sorted(order)
    sizes = [atoms[a] for a in order]
    array = array.reshape(sizes).transpose([order.index(a) for a in left])
    return lay_out(array, atoms, left, view)

  def multiply(
    self, eqn: Any, which: int, product: Product, x: Any
  ) -> Any | str:
    """The product with `x`, without the zeros; or why it cannot be.

    Args:
      eqn: the product's equation.
      which: the kernel's place among its operands.
      product: what the equation says of the kernel.
      x: the other operand.
    """
    f, view, layout = self.grouped.factors, product.view, product.layout
    name = eqn.primitive.name
    is_conv = name == 'conv_general_dilated'
    if not (is_conv or name == 'dot_general') or (
      eqn.params.get('out_sharding') is not None
    ):
      return f'{name} of another kind than narrow heads run in'
    pieces = pieces_of(f.layout.atoms, layout.atoms)
    fine = f.layout.refine(layout.atoms)
    present = tuple(p for a in f.present for p in pieces[a])
    roles = (fine.inputs, fine.outputs, present)
    axis, at = _whole(pieces[self.head], view)
    if roles != (layout.inputs, layout.outputs, product.present) or axis < 0:
      return f'{name} over other axes than its heads were narrowed for'
    atom, rank = view.axes[axis][at], f.a.shape[self._axis]
    if atom in view.flipped:
      return f'{name} with the features of its heads read backwards'
    cut = _Cut.of(view, axis, at)
    narrow = dataclasses.replace(
      view,
      atoms=_put(view.atoms, atom, rank),
      sizes=_put(view.sizes, axis, cut.before * rank * cut.after),
    )
    kernel = self._laid_out(f.a, _put(f.layout.atoms, self.head, rank), narrow)
    if is_conv:
      if (cut.before, cut.after, len(product.present)) != (1, 1, 0):
        return f'{name} over heads, or in groups'
      return _convolved(eqn, x, kernel, axis)
    kernel = cut.split(kernel, axis)
    contract, batch = (
      [list(pair[side]) for side in (which, 1 - which)]
      for pair in eqn.params['dimension_numbers']
    )
    if axis in contract[0]:
      its = contract[1][contract[0].index(axis)]
      x = cut.split(x, its)
      x = jax.lax.slice_in_dim(x, 0, rank, axis=its + cut.place)
      contract[1] = cut.renumber(contract[1], its)
      batch[1] = cut.renumber(batch[1], its)
    contract[0] = cut.renumber(contract[0], axis)
    batch[0] = cut.renumber(batch[0], axis)
    operands, sides = (kernel, x), (0, 1)
    if which:
      operands, sides = (x, kernel), (1, 0)
    dims = [[tuple(d[s]) for s in sides] for d in (contract, batch)]
    out = jax.lax.dot_general(
      *operands,
      ((dims[0][0], dims[0][1]), (dims[1][0], dims[1][1])),
      precision=eqn.params['precision'],
      preferred_element_type=eqn.params['preferred_element_type'],
    )
    if self.head in f.layout.outputs:
      place = next(
        i for i, atoms in enumerate(product.output.axes) if atom in atoms
      )
      out = _pad(out, place + cut.place, cut.size)
    return out.reshape(product.output.sizes)

  @property
  def _axis(self) -> int:
    f = self.grouped.factors
    return _order(f.layout, f.present).index(self.head)


def _convolved(eqn: Any, x: Any, kernel: Any, axis: int) -> Any:
  """A convolution with fewer input or output channels than the function's."""
  p = eqn.params
  numbers = p['dimension_numbers']
  if axis == numbers.rhs_spec[1]:
    at = numbers.lhs_spec[1]
    x = jax.lax.slice_in_dim(x, 0, kernel.shape[axis], axis=at)
  out = jax.lax.conv_general_dilated(
    x,
    kernel,
    p['window_strides'],
    p['padding'],
    p['lhs_dilation'],
    p['rhs_dilation'],
    numbers,
    precision=p['precision'],
    preferred_element_type=p['preferred_element_type'],
  )
  channels = numbers.out_spec[1]
  return _pad(out, channels, eqn.outvars[0].aval.shape[channels])


def _put(sizes: tuple[int, ...], i: int, size: int) -> tuple[int, ...]:
  return (*sizes[:i], size, *sizes[i + 1 :])


def _whole(pieces: Atoms, view: View) -> tuple[int, int]:
  """Axis, and place in it, of the one atom that the pieces are; else -1."""
  for axis, atoms in enumerate(view.axes):
    if len(pieces) == 1 and pieces[0] in atoms:
      return axis, atoms.index(pieces[0])
  return -1, -1


@dataclasses.dataclass(frozen=True)
class _Cut:
  """An axis cut into what is outside a head's features, those, and inside."""

  before: int
  size: int
  after: int

  @classmethod
  def of(cls, view: View, axis: int, at: int) -> _Cut:
    sizes = [view.atoms[a] for a in view.axes[axis]]
    before = after = 1
    for n in sizes[:at]:
      before *= n
    for n in sizes[at + 1 :]:
      after *= n
    return cls(before, sizes[at], after)

  @property
  def place(self) -> int:
    """Where the features are among the axes that the cut makes."""
    return int(self.before > 1)

  def split(self, array: Any, axis: int) -> Any:
    size = array.shape[axis] // (self.before * self.after)
    parts = [self.before] * (self.before > 1) + [size]
    parts += [self.after] * (self.after > 1)
    return array.reshape(*array.shape[:axis], *parts, *array.shape[axis + 1 :])

  def renumber(self, axes: list[int], cut: int) -> list[int]:
    """Axes of the array that was cut, in those that the cut makes."""
    more = (self.before > 1) + (self.after > 1)
    out: list[int] = []
    for axis in axes:
      if axis == cut:
        out += range(axis, axis + more + 1)
      else:
        out.append(axis + more if axis > cut else axis)
    return out

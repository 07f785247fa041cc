"""A pair of factors in place of a kernel, while a function is walked."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from utilized_rank.products import gauge
from utilized_rank.products.factors import Factors
from utilized_rank.products.factors import read_backwards
from utilized_rank.tree.layout import Atoms
from utilized_rank.tree.layout import View
from utilized_rank.tree.layout import pieces_of
from utilized_rank.walk import compat


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class Factored:
  """A pair of factors inside a walk; `present` groups are still axes."""

  factors: Factors

  @property
  def arrays(self) -> tuple[Any, ...]:
    f = self.factors
    return f.a, f.b, f.c, f.order

  def _with(self, arrays: Any, present: Atoms) -> Factored:
    f, (a, b, c, order) = self.factors, arrays
    return Factored(Factors(a, b, c, f.layout, present, order, f.scaled))

  def tree_flatten(self):
    f = self.factors
    return self.arrays, (f.layout, f.present, f.scaled)

  @classmethod
  def tree_unflatten(cls, static, children) -> Factored:
    (a, b, c, order), (layout, present, scaled) = children, static
    return cls(Factors(a, b, c, layout, present, order, scaled))

  def relayout(self, eqn: Any, view: View) -> Factored:
    del view
    if eqn.primitive.name not in compat.VARY:
      return self
    return jax.tree.map(lambda array: compat.bind(eqn, [array])[0], self)

  def _cut(self, view: View, axes: Iterable[int]) -> Factored:
    """With groups of their own where an axis of a view is a part of one.

    A stack of layers may be read as rows of stacks, one loop in another.
    """
    f = self.factors
    pieces = pieces_of(f.layout.atoms, view.atoms)
    read = {p for axis in axes for p in view.axes[axis]}
    parts = {
      g for g in f.present if 0 < len(read & {*pieces[g]}) < len(pieces[g])
    }
    if not parts:
      return self
    atoms: list[int] = []
    new: list[Atoms] = []
    for a, size in enumerate(f.layout.atoms):
      cut = [view.atoms[p] for p in pieces[a]] if a in parts else [size]
      new.append(tuple(range(len(atoms), len(atoms) + len(cut))))
      atoms += cut
    layout = f.layout.refine(atoms)
    present = tuple(p for g in f.present for p in new[g])
    arrays = _regrouped(self.arrays, len(f.present), layout.sizes(present))
    return Factored(dataclasses.replace(f, layout=layout))._with(
      arrays, present
    )

  def _groups(self, view: View, axis: int) -> tuple[int, ...] | None:
    """Which axes of the factors a view's axis is, if it is whole groups.

    It is several where the function joins axes of a stack, outermost first.
    """
    factors, found, left = self.factors, [], view.axes[axis]
    pieces = pieces_of(factors.layout.atoms, view.atoms)
    while left:
      for i, group in enumerate(factors.present):
        whole = pieces[group]
        backwards = view.flipped.intersection(whole)
        if left[: len(whole)] == whole and len(backwards) in (0, len(whole)):
          found.append(i)
          left = left[len(whole) :]
          break
      else:
        return None
    return tuple(found) or None

  def _in_view_order(self, view: View, groups: Sequence[int]) -> Any:
    """The arrays, those groups' axes in the order of the view's axes."""
    f = self.factors
    pieces = pieces_of(f.layout.atoms, view.atoms)
    backwards = [
      i for i in groups if view.flipped.intersection(pieces[f.present[i]])
    ]
    return jax.tree.map(lambda v: read_backwards(v, backwards), self.arrays)

  def scaled(
    self, view: View, make: Callable[[Any], Any], factor: Any
  ) -> Factored | None:
    del make
    along = [axis for axis, n in enumerate(jnp.shape(factor)) if n != 1]
    pair = self._cut(view, along)
    f, sizes = pair.factors, [1] * len(pair.factors.present)
    order: list[int] = []
    for axis in along:
      groups = pair._groups(view, axis)
      if groups is None:
        return None
      if view.flipped.intersection(view.axes[axis]):
        factor = read_backwards(factor, [axis])
      order += groups
    whole = f.layout.sizes(f.present)
    for group in order:
      sizes[group] = whole[group]
    lead = factor.reshape([sizes[group] for group in order])
    lead = lead.transpose([order.index(g) for g in sorted(order)])

    def times(array):
      ones = [1] * (array.ndim - len(sizes))
      return array * lead.reshape(*sizes, *ones).astype(array.dtype)

    a, b, c = (jax.tree.map(times, v) for v in (f.a, f.b, f.c))
    if f.b is None or f.order is not None:
      # An identity block stays one; A alone can be multiplied.
      b, own = f.b, True
    else:
      a, own = f.a, f.scaled
    return Factored(Factors(a, b, c, f.layout, f.present, f.order, own))

  def index(self, cut: View, axis: int, at: Any) -> Factored | None:
    pair = self._cut(cut, [axis])
    groups = pair._groups(cut, axis)
    if groups is None or len(groups) > 1:
      return None
    # At its place: loops read one step of a stack that is not moved for it.
    (group,) = groups
    if cut.flipped.intersection(cut.axes[axis]):
      at = cut.sizes[axis] - 1 - at
    arrays = jax.tree.map(
      lambda v: jax.lax.dynamic_index_in_dim(v, at, group, keepdims=False),
      pair.arrays,
    )
    return pair._with(arrays, pair._left(groups))

  def squeeze(self, axis: int) -> Factored:
    del axis
    return self

  def unstack(self, view: View):
    pair = self._cut(view, [0])
    groups = pair._groups(view, 0)
    return None if groups is None else pair._unstacked(view, groups)

  def _unstacked(self, view: View, groups: tuple[int, ...]):
    """The arrays along one leading axis in place of some groups', and what
    reads one step of it."""
    first = range(len(groups))
    arrays = jax.tree.map(
      lambda v: jnp.moveaxis(v, groups, first).reshape(
        -1, *(n for i, n in enumerate(v.shape) if i not in groups)
      ),
      self._in_view_order(view, groups),
    )
    left = self._left(groups)
    return arrays, lambda x: self._with(x, left)

  def _left(self, gone: Collection[int]) -> Atoms:
    """The groups that are still axes when those axes are gone."""
    present = self.factors.present
    return tuple(g for i, g in enumerate(present) if i not in gone)

  def shard(self, cut: View, spec: Any, parts: dict[int, Any]):
    del spec
    spread = self._cut(cut, parts)
    present = spread.factors.present
    where: dict[int, Any] = {}
    for axis, names in parts.items():
      groups = spread._groups(cut, axis)
      if groups is None or len(groups) > 1:
        return None
      where[groups[0]] = names
    specs = PartitionSpec(*(where.get(i) for i in range(len(present))))
    left = spread._left(where)
    spread = spread._with(spread._in_view_order(cut, list(where)), present)

    def read(local):
      # Each device holds one of as many groups as there are devices.
      local = jax.tree.map(lambda v: jnp.squeeze(v, tuple(where)), local)
      return spread._with(local, left)

    return spread.arrays, jax.tree.map(lambda _: specs, self.arrays), read

  def materialise(self, view: View) -> Any:
    f = self.factors
    sizes = f.layout.sizes
    matrices = multiply(f)
    order = f.present + f.layout.inputs + f.layout.outputs
    left = sorted(order)
    array = matrices.reshape(sizes(order))
    array = array.transpose([order.index(a) for a in left])
    return lay_out(array, f.layout.atoms, left, view)


def _regrouped(arrays: Any, count: int, sizes: Sequence[int]) -> Any:
  """With axes of other sizes in place of the first `count`."""
  return jax.tree.map(lambda v: v.reshape(*sizes, *v.shape[count:]), arrays)


def lay_out(
  array: Any, coarse: Atoms, left: Sequence[int], view: View
) -> jax.Array:
  """Lays out an array with one axis per atom of `left` as the view says."""
  pieces = pieces_of(coarse, view.atoms)
  names = [p for a in left for p in pieces[a]]
  gone = {a for a, _ in view.taken}
  array = array.reshape([view.atoms[a] for a in names])
  array = jnp.squeeze(array, tuple(i for i, a in enumerate(names) if a in gone))
  names = [a for a in names if a not in gone]
  backwards = [i for i, a in enumerate(names) if a in view.flipped]
  array = read_backwards(array, backwards)
  order = [a for axis in view.axes for a in axis]
  array = array.transpose([names.index(a) for a in order])
  array = array.reshape(
    [
      size if atoms else 1
      for atoms, size in zip(view.axes, view.sizes, strict=True)
    ]
  )
  return jnp.broadcast_to(array, view.sizes).astype(view.dtype)


def multiply(factors: Factors) -> jax.Array:
  """The matrices (*present, d, m) of a pair."""
  f, (d, _) = factors, factors.layout.matrix_shape
  if f.order is not None and f.is_typed():
    f = f.plain()
  groups = f.layout.sizes(f.present)
  rank = f.b.shape[len(groups)]
  a = f.a.reshape(*groups, d, rank)
  b = f.b.reshape(*groups, rank, -1)
  product = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
  if f.order is None:
    return product
  return gauge.join(a, product, f.order, product.ndim - 1)

"""A pair of factors in place of a kernel, while a function is walked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

  def _group_axis(self, view: View, axis: int) -> int | None:
    """Which axis of the factors a view's axis is, if it is a group's."""
    factors = self.factors
    pieces = pieces_of(factors.layout.atoms, view.atoms)
    for i, group in enumerate(factors.present):
      if view.axes[axis] == pieces[group]:
        backwards = view.flipped.intersection(pieces[group])
        return i if len(backwards) in (0, len(pieces[group])) else None
    return None

  def _in_view_order(self, view: View, axis: int, group: int) -> Any:
    """The arrays, a group's axis in the order of the view's axis."""
    if not view.flipped.intersection(view.axes[axis]):
      return self.arrays
    return jax.tree.map(lambda v: read_backwards(v, [group]), self.arrays)

  def scaled(
    self, view: View, make: Callable[[Any], Any], factor: Any
  ) -> Factored | None:
    del make
    f, sizes = self.factors, [1] * len(self.factors.present)
    order = []
    for axis, n in enumerate(jnp.shape(factor)):
      if n == 1:
        continue
      group = self._group_axis(view, axis)
      if group is None:
        return None
      if view.flipped.intersection(view.axes[axis]):
        factor = read_backwards(factor, [axis])
      order.append(group)
      sizes[group] = n
    lead = jnp.squeeze(
      factor, [i for i, n in enumerate(factor.shape) if n == 1]
    )
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

  def _without(self, axis: int, pick: Callable[[Any], Any]) -> Factored:
    present = self.factors.present
    left: Atoms = present[:axis] + present[axis + 1 :]
    return self._with(jax.tree.map(pick, self.arrays), left)

  def index(self, cut: View, axis: int, at: Any) -> Factored | None:
    group = self._group_axis(cut, axis)
    if group is None:
      return None
    if cut.flipped.intersection(cut.axes[axis]):
      at = cut.sizes[axis] - 1 - at
    return self._without(
      group,
      lambda array: jax.lax.dynamic_index_in_dim(
        array, at, group, keepdims=False
      ),
    )

  def squeeze(self, axis: int) -> Factored:
    del axis
    return self

  def unstack(self, view: View):
    group = self._group_axis(view, 0)
    if group is None:
      return None
    arrays = jax.tree.map(
      lambda array: jnp.moveaxis(array, group, 0),
      self._in_view_order(view, 0, group),
    )
    present = self.factors.present
    left = present[:group] + present[group + 1 :]
    return arrays, lambda x: self._with(x, left)

  def shard(self, cut: View, spec: Any, parts: dict[int, Any]):
    del spec
    present = self.factors.present
    where = {self._group_axis(cut, axis): n for axis, n in parts.items()}
    if None in where:
      return None
    specs = PartitionSpec(*(where.get(i) for i in range(len(present))))
    left = tuple(g for i, g in enumerate(present) if i not in where)
    spread: Any = self
    for axis in parts:
      group = spread._group_axis(cut, axis)
      spread = self._with(spread._in_view_order(cut, axis, group), present)

    def read(local):
      # Each device holds one of as many groups as there are devices.
      local = jax.tree.map(lambda v: jnp.squeeze(v, tuple(where)), local)
      return self._with(local, left)

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

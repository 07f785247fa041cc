"""The `LowRank` leaf, and functions that run on trees that hold it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any
import warnings

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from utilized_rank import compat
from utilized_rank import gauge
from utilized_rank import paths
from utilized_rank import products
from utilized_rank import tracing
from utilized_rank.factors import Factors
from utilized_rank.interpret import Walk
from utilized_rank.layout import Atoms
from utilized_rank.layout import Layout
from utilized_rank.layout import View
from utilized_rank.layout import pieces_of
from utilized_rank.values import Loop
from utilized_rank.values import Output
from utilized_rank.values import Param


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class LowRank:
  """A kernel as a pair of factors: W = A B as a matrix, per group.

  Invariant: `layout.to_matrices(dense)` equals the matrix product of `a` and
  `b` over the rank. The factors keep the kernel's own axes, in the kernel's
  order, so that sharding rules for its heads, experts and channels still
  apply. With an `order`, r of the outputs are x A itself, and
  W = [A, A B'][:, order] with B' (r, m - r): `factorize(gauge='identity')`.

  Attributes:
    a: (*groups, *inputs, r).
    b: (*groups, r, *outputs), or with an order B', (*groups, r, m - r).
    c: None, or a constant added to the product's output, (*groups, *outputs):
      the mean of what the factors leave out, where the kernel has no bias
      to take it.
    layout: how the dense leaf is read as matrices (static).
    order: None, or where each output is, (*groups, m) (static).
    left: None, or the path of the leaf that holds this kernel's A as well as
      its own; `a` is then None here (static).

  >>> layout = Layout.of((4, 3), inputs=(0,), outputs=(1,))
  >>> w = LowRank(jnp.ones((4, 1)), jnp.ones((1, 3)), None, layout)
  >>> w.rank, w.shape, w.dense().shape
  (1, (4, 3), (4, 3))
  """

  a: Any
  b: Any
  c: Any
  layout: Layout
  order: gauge.Order | None = None
  left: str | None = None

  @property
  def rank(self) -> int:
    return self.b.shape[len(self.layout.groups)]

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of the dense kernel."""
    return self.layout.shape

  @property
  def dtype(self) -> Any:
    return self.b.dtype

  def dense(self) -> jax.Array:
    """The kernel multiplied out; `c` is not part of it.

    Raises:
      ValueError: the left factor is another leaf's; `merge` the tree instead.
    """
    if self.a is None:
      raise ValueError(
        f'the left factor of this kernel is held by {self.left!r}: multiply '
        'the whole tree out, with merge'
      )
    factors = Factored.of(self).factors
    return self.layout.from_matrices(_multiply(factors))

  def payload(self) -> Any:
    """What stands for the leaf while a function is walked."""
    return Factored.of(self)

  def tree_flatten_with_keys(self):
    key = jax.tree_util.GetAttrKey
    return (
      ((key('a'), self.a), (key('b'), self.b), (key('c'), self.c)),
      (self.layout, self.order, self.left),
    )

  @classmethod
  def tree_unflatten(cls, static, children) -> LowRank:
    return cls(*children, *static)


def is_low_rank(leaf: Any) -> bool:
  """Whether a leaf is a `LowRank`; for `is_leaf=` of tree functions."""
  return isinstance(leaf, LowRank)


def with_left(named: dict[str, Any]) -> dict[str, Any]:
  """Gives every `LowRank` leaf its A, also where another leaf holds it.

  Raises:
    ValueError: the leaf that should hold it is not there, or does not.
  """
  whole = dict(named)
  for path, leaf in named.items():
    if is_low_rank(leaf) and leaf.a is None:
      holder: Any = named.get(leaf.left)
      if not is_low_rank(holder) or holder.a is None:
        raise ValueError(
          f'{path!r} has its left factor in {leaf.left!r}, which holds none '
          'here: pass the whole tree that was factorized'
        )
      shape = leaf.layout.group_shape + leaf.layout.input_shape
      a = holder.a.reshape(*shape, leaf.rank)
      whole[path] = dataclasses.replace(leaf, a=a)
  return whole


def _multiply(factors: Factors) -> jax.Array:
  """The matrices (*present, d, m) of a pair."""
  f, (d, _) = factors, factors.layout.matrix_shape
  groups = f.layout.sizes(f.present)
  rank = f.b.shape[len(groups)]
  a = f.a.reshape(*groups, d, rank)
  b = f.b.reshape(*groups, rank, -1)
  product = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
  if f.order is None:
    return product
  return gauge.join(a, product, f.order, product.ndim - 1)


def merge(tree: Any) -> Any:
  """Multiplies every `LowRank` leaf out: the stock model's tree again.

  Args:
    tree: parameters with `LowRank` leaves.

  Returns:
    The tree of dense kernels, shapes and dtypes as before factorization.

  Raises:
    ValueError: a leaf has a constant `c`, which no kernel can hold.

  >>> layout = Layout.of((4, 3), inputs=(0,), outputs=(1,))
  >>> w = LowRank(jnp.ones((4, 1)), jnp.ones((1, 3)), None, layout)
  >>> merge({'w': w})['w'].shape
  (4, 3)
  """
  named, treedef = paths.flatten(tree, is_low_rank)
  named = with_left(named)
  for path, leaf in named.items():
    if is_low_rank(leaf):
      if leaf.c is not None:
        raise ValueError(
          f'{path!r} has a constant of shape {tuple(leaf.c.shape)} at its '
          'output and no bias to hold it; factorize with '
          'compensate_mean=False to get a tree that can be merged'
        )
      named[path] = leaf.dense()
  return paths.unflatten(treedef, named)


def count_params(tree: Any) -> int:
  """Number of scalars in a tree; works on shapes as well.

  >>> count_params({'w': jnp.zeros((4, 3)), 'b': jnp.zeros(3)})
  15
  """
  return sum(
    leaf.size for leaf in jax.tree.leaves(tree) if tracing.is_array(leaf)
  )


def low_rank(fn: Callable[..., Any]) -> Callable[..., Any]:
  """Makes `fn` run on a tree with `LowRank` leaves, never multiplying out.

  At every product of an activation x with such a kernel, x W becomes
  (x A) B (+ c); a convolution becomes one with r outputs and a 1x1. Where
  kernels share A, x A is computed once; an identity block is not multiplied
  with (on meshes of explicit axes that is an error). Works
  under and over `jit`, `grad`, `vmap`, `remat` and `scan`. A leaf that meets
  anything but a product (an embedding's lookup, say) is multiplied out there,
  and a warning says so once per place.

  Args:
    fn: `fn(params, *args, **kwargs)`, the dense model's own function.

  Returns:
    A function of the same signature. It re-reads the model's trace at every
    call: jit it, or what calls it.

  >>> layout = Layout.of((4, 3), inputs=(0,), outputs=(1,))
  >>> w = LowRank(jnp.ones((4, 1)), jnp.ones((1, 3)), None, layout)
  >>> low_rank(lambda params, x: x @ params['w'])({'w': w}, jnp.ones((2, 4)))
  Array([[4., 4., 4.],
         [4., 4., 4.]], dtype=float32)
  """

  @functools.wraps(fn)
  def factored(params, *args, **kwargs):
    traced = tracing.trace(
      fn,
      params,
      args,
      kwargs,
      is_low_rank,
      lambda leaf: (
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        if is_low_rank(leaf)
        else leaf
      ),
    )
    params = with_left(traced.params)
    values = [
      Param(
        View.of_leaf(p, leaf.shape, leaf.dtype, leaf.layout.atoms),
        leaf.payload(),
      )
      if is_low_rank(leaf)
      else leaf
      for p, leaf in params.items()
    ]
    lefts = {
      p: leaf.left
      for p, leaf in params.items()
      if is_low_rank(leaf) and leaf.left is not None
    }
    lefts |= {p: p for p in lefts.values()}
    walk = Walk(_Substitution(lefts))
    outs = walk.run(traced.jaxpr, traced.consts, [*values, *traced.args])
    return jax.tree.unflatten(
      traced.out_tree, [walk.materialise(v, 'output') for v in outs]
    )

  return factored


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class Factored:
  """A `LowRank` leaf inside a walk; `present` groups are still axes."""

  factors: Factors

  @classmethod
  def of(cls, leaf: LowRank) -> Factored:
    order = None if leaf.order is None else leaf.order.array
    layout = leaf.layout
    return cls(Factors(leaf.a, leaf.b, leaf.c, layout, layout.groups, order))

  @property
  def arrays(self) -> tuple[Any, ...]:
    f = self.factors
    return f.a, f.b, f.c, f.order

  def _with(self, arrays: Any, present: Atoms) -> Factored:
    a, b, c, order = arrays
    layout = self.factors.layout
    return Factored(Factors(a, b, c, layout, present, order))

  def tree_flatten(self):
    return self.arrays, (self.factors.layout, self.factors.present)

  @classmethod
  def tree_unflatten(cls, static, children) -> Factored:
    (a, b, c, order), (layout, present) = children, static
    return cls(Factors(a, b, c, layout, present, order))

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
        return i
    return None

  def _without(self, axis: int, pick: Callable[[Any], Any]) -> Factored:
    present = self.factors.present
    left: Atoms = present[:axis] + present[axis + 1 :]
    return self._with(jax.tree.map(pick, self.arrays), left)

  def index(self, cut: View, axis: int, at: Any) -> Factored | None:
    group = self._group_axis(cut, axis)
    if group is None:
      return None
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
      lambda array: jnp.moveaxis(array, group, 0), self.arrays
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

    def read(local):
      # Each device holds one of as many groups as there are devices.
      local = jax.tree.map(lambda v: jnp.squeeze(v, tuple(where)), local)
      return self._with(local, left)

    return self.arrays, jax.tree.map(lambda _: specs, self.arrays), read

  def materialise(self, view: View) -> Any:
    f = self.factors
    sizes = f.layout.sizes
    matrices = _multiply(f)
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
  order = [a for axis in view.axes for a in axis]
  array = array.transpose([names.index(a) for a in order])
  array = array.reshape(
    [
      size if atoms else 1
      for atoms, size in zip(view.axes, view.sizes, strict=True)
    ]
  )
  return jnp.broadcast_to(array, view.sizes).astype(view.dtype)


def _token(by: Any) -> Any:
  """What took an atom, without the traced value of an index."""
  return by[0] if isinstance(by, tuple) else by


class _Substitution:
  """Visitor that runs products with factors.

  `lefts` maps the paths of kernels that share an A to the one that holds it.
  """

  def __init__(self, lefts: dict[str, str]):
    self._lefts = lefts

  def wants(self, view: View) -> bool:
    return True

  def opaque(self, view: View, primitive: str) -> None:
    pass  # it gets the dense kernel, and `dropped` says so

  def dropped(self, view: View, reason: str) -> None:
    warnings.warn(
      f'{view.path!r} is low-rank but meets {reason!r}, which is no product '
      'with an activation: it is multiplied out there',
      stacklevel=2,
    )

  def product(self, eqn, operands, which, walk):
    param = operands[which]
    found = products.describe(eqn, param.view, which)
    payload = param.payload
    if isinstance(found, str):
      reason = found
    elif not isinstance(payload, Factored):  # it runs its products itself
      out = payload.multiply(eqn, which, found, operands[1 - which])
      if not isinstance(out, str):
        return out
      reason = out
    elif not products.fits(payload.factors, found):
      reason = f'{eqn.primitive.name} over other axes than it was factored for'
    else:
      x = operands[1 - which]
      if payload.factors.order is not None and compat.has_explicit_axes(x):
        raise ValueError(
          f'{param.view.path!r} has an identity block, whose outputs are put '
          'in order by a lookup; on AxisType.Explicit meshes JAX does not say '
          'how that is sharded: use AxisType.Auto, or gauge=None'
        )
      left = self._lefts.get(param.view.path)
      if left is None:
        return found.factored(x, payload.factors, lambda make: make())
      key = (
        left,
        tuple(_token(by) for a, by in sorted(param.view.taken)),
        walk.origin(x),
        found.key,
        param.view.dtype,
        which,
        compat.params_key(eqn),
      )
      return found.factored(
        x, payload.factors, lambda make: walk.once(key, make)
      )
    plain = list(operands)
    plain[which] = walk.materialise(param, reason)
    return compat.bind(eqn, plain)[0]

  def biased(self, output: Output, bias: Param) -> bool:
    raise AssertionError('no outputs are followed when factors run')

  def stacked(self, use: Any, loop: Loop, size: int, is_stacked: bool) -> Any:
    raise AssertionError('nothing is emitted when factors run')

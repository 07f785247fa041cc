"""The `LowRank` leaf, in place of a kernel in a tree."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
from typing import Any

import jax

from utilized_rank.lowrank.no_array import NoArray
from utilized_rank.products import gauge
from utilized_rank.products.factored import Factored
from utilized_rank.products.factored import multiply
from utilized_rank.products.factors import Factors
from utilized_rank.tree import paths
from utilized_rank.tree.layout import Layout
from utilized_rank.walk import tracing


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, repr=False)
class LowRank(NoArray):
  """A kernel as a pair of factors: W = A B as a matrix, per group.

  Invariant: `layout.to_matrices(dense)` equals the matrix product of `a` and
  `b` over the rank. The factors keep the kernel's own axes, in the kernel's
  order, so that sharding rules for its heads, experts and channels still
  apply. With an `order`, r of the outputs are x A itself, and
  `W = [A, A B'][:, order]` with B' (r, m - r):
  `factorize(gauge='identity')`.

  The order decides the function and is no array: `jax.grad` refuses integer
  leaves, weight decay and casts change floating ones. In its place the key of
  B' holds the order's digest, as in `b_3fa9c21e`: reading arrays by their keys
  into a tree of another order (plain orbax, an npz of key paths) fails where it
  would compute something else, and a call costs no more. Rules over paths match
  it as `b(_.*)?`. What reads arrays by place alone must compare structures.

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
    box: None, or the structure of the `nnx.Variable` that was around the
      kernel; one is around each factor then (static).

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
  box: Any = dataclasses.field(default=None, kw_only=True, repr=False)

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

  def __repr__(self) -> str:
    held = self.a if self.b is None else self.b
    if not hasattr(held, 'dtype'):  # specs, or what a tree function made
      return f'{type(self).__name__}(a={self.a}, b={self.b}, c={self.c})'
    return (
      f'{type(self).__name__}(shape={self.shape}, rank={self.rank}, '
      f'dtype={self.dtype})'
    )

  def boxed(self, box: Any) -> LowRank:
    """The leaf with a variable around each factor, its axes named anew."""
    around = lambda name, v: _variable(box, v, self.axes[name], self.layout)
    return self.changed(around, box)

  def opened(self) -> LowRank:
    """The leaf without them."""
    if self.box is None:
      return self
    return self.changed(lambda _, v: jax.tree.leaves(v)[0])

  def changed(
    self, change: Callable[[str, Any], Any], box: Any = None
  ) -> LowRank:
    """The leaf with `change(name, factor)` for each factor that it holds."""
    held = {name: getattr(self, name) for name in ('a', 'b', 'c')}
    new = {k: change(k, v) for k, v in held.items() if v is not None}
    return dataclasses.replace(self, **new, box=box)

  @property
  def axes(self) -> dict[str, tuple[int | None, ...]]:
    """Of every factor, the layout's atoms that its axes are; None for r."""
    y = self.layout
    rest = y.outputs if self.order is None else (None,)
    return {
      'a': (*y.groups, *y.inputs, None),
      'b': (*y.groups, None, *rest),
      'c': (*y.groups, *y.outputs),
    }

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
    return self.layout.from_matrices(multiply(self.payload().factors))

  def written_out(self) -> LowRank:
    """The same pair without an order: all of B is stored."""
    if self.order is None:
      return self
    b = gauge.written_out(self.b, self.order.array, self.layout.output_shape)
    return dataclasses.replace(self, b=b, order=None)

  def payload(self) -> Any:
    """What stands for the leaf while a function is walked."""
    layout = self.layout
    order = None if self.order is None else self.order.array
    leaf = self.opened()
    factors = Factors(leaf.a, leaf.b, leaf.c, layout, layout.groups, order)
    return Factored(factors)

  def tree_flatten_with_keys(self):
    key = jax.tree_util.GetAttrKey
    b = 'b' if self.order is None else f'b_{self.order.digest}'
    return (
      ((key('a'), self.a), (key(b), self.b), (key('c'), self.c)),
      (self.layout, self.order, self.left, self.box),
    )

  @classmethod
  def tree_unflatten(cls, static, children) -> LowRank:
    *static, box = static
    return cls(*children, *static, box=box)


def _variable(
  box: Any, factor: Any, axes: tuple[int | None, ...], layout: Layout
) -> Any:
  """A kernel's variable around a factor; mesh axes go with the axes."""
  variable = jax.tree.unflatten(box, [factor])
  for key in ('out_sharding', 'optimizer_sharding'):
    names = variable.get_metadata(key, None)
    if isinstance(names, (tuple, jax.sharding.PartitionSpec)):
      is_whole = layout.atoms == layout.shape
      known = dict(enumerate(names)) if is_whole else {}
      variable.set_metadata(
        key, tuple(None if i is None else known.get(i) for i in axes)
      )
  return variable


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


def merge(tree: Any) -> Any:
  """Multiplies every `LowRank` leaf out: the stock model's tree again.

  Args:
    tree: parameters with `LowRank` leaves.

  Returns:
    The tree of dense kernels, shapes and dtypes as before factorization.

  Raises:
    ValueError: a leaf has a constant `c`, which no kernel can hold:
      `compensate_mean=False` of `compress` and `factorize` makes none.

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
          'output and no bias to hold it: compress or factorize with '
          'compensate_mean=False for a tree that can be merged'
        )
      named[path] = leaf.dense()
  return paths.unflatten(treedef, named)


def write_out(tree: Any) -> Any:
  """Gives pairs with an identity block all of their B: the same function.

  For serving from a tree that `factorize(gauge='identity')` or `compress` made,
  where its r^2 numbers may be had again: `low_rank` does it at every call.

  Args:
    tree: parameters with `LowRank` leaves.

  Returns:
    The tree with plain pairs, of the same ranks.

  >>> layout = Layout.of((4, 3), inputs=(0,), outputs=(1,))
  >>> order = gauge.Order([1, 0, 2])
  >>> w = LowRank(jnp.ones((4, 1)), jnp.full((1, 2), 2.0), None, layout, order)
  >>> write_out({'w': w})['w'].b
  Array([[2., 1., 2.]], dtype=float32)
  """
  named, treedef = paths.flatten(tree, is_low_rank)
  for path, leaf in named.items():
    if is_low_rank(leaf):
      named[path] = leaf.written_out()
  return paths.unflatten(treedef, named)


def count_params(tree: Any) -> int:
  """Number of scalars in a tree, what stands at two places once.

  Works on shapes as well.

  >>> count_params({'w': jnp.zeros((4, 3)), 'b': jnp.zeros(3)})
  15
  """
  return sum(
    leaf.size
    for leaf in paths.flatten(tree)[0].values()
    if tracing.is_array(leaf)
  )

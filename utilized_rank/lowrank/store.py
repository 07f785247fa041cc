"""Pairs of float64 factors as leaves of a tree, constants where they fit."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
from typing import Any, NamedTuple

import numpy as np

from utilized_rank.linalg.best_pairs import Pair
from utilized_rank.lowrank.leaf import LowRank
from utilized_rank.lowrank.leaf import is_low_rank
from utilized_rank.lowrank.leaf import with_left
from utilized_rank.lowrank.place import place
from utilized_rank.lowrank.place import place_like
from utilized_rank.products.gauge import Order
from utilized_rank.products.gauge import has_identity
from utilized_rank.products.gauge import to_identity
from utilized_rank.products.gauge import widen
from utilized_rank.tree import paths
from utilized_rank.tree.layout import Layout


class Stored(NamedTuple):
  """One matrix's factors as its leaf holds them, in the leaf's dtype.

  Attributes:
    a: A (d, r).
    b: B (r, m), or with an identity block B' (r, m - r).
    order: (m,) of the identity block; None without.
  """

  a: np.ndarray
  b: np.ndarray
  order: np.ndarray | None

  def pair(self) -> Pair:
    """(A, B) in float64."""
    a, b = (np.asarray(v, np.float64) for v in (self.a, self.b))
    if self.order is not None:
      b = np.hstack([np.eye(len(b)), b])[:, self.order]
    return Pair(a, b)


def store(
  pair: Pair, layout: Layout, rank: int, dtype: Any, gauge: str | None
) -> Stored:
  """A pair as its leaf will hold it.

  Threads may call it: where float64 is enabled by a context, they do not see
  that, and arrays of JAX would be cut to float32.

  Args:
    pair: float64.
    layout: of the leaf.
    rank: of the leaf; no lower than the pair's own.
    dtype: of the leaf.
    gauge: as for `factorize`.
  """
  order = None
  if has_identity(layout, rank, gauge):
    a, b, order = to_identity(*pair)
    a, b = widen(a, b, rank)
  else:
    more = (0, rank - pair.a.shape[1])
    a, b = np.pad(pair.a, [(0, 0), more]), np.pad(pair.b, [more, (0, 0)])
  return Stored(a.astype(dtype), b.astype(dtype), order)


def assemble(stored: Sequence[Stored], layout: Layout) -> LowRank:
  """A leaf of the pairs of its matrices, on the host."""
  groups, b_shape = layout.group_shape, layout.output_shape
  a = np.stack([s.a for s in stored])
  b = np.stack([s.b for s in stored])
  rank, order = a.shape[-1], None
  orders = [s.order for s in stored if s.order is not None]
  if orders:
    order, b_shape = Order(np.stack(orders).reshape(*groups, -1)), b.shape[-1:]
  return LowRank(
    a.reshape(groups + layout.input_shape + (rank,)),
    b.reshape(groups + (rank,) + b_shape),
    None,
    layout,
    order,
  )


def stored_pairs(leaf: LowRank) -> list[Pair]:
  """The factors of every member of a leaf, as they are stored, in float64."""
  (d, m), rank = leaf.layout.matrix_shape, leaf.rank
  a = np.asarray(leaf.a).reshape(-1, d, rank)
  b = np.asarray(leaf.b).reshape(len(a), rank, -1)
  orders: Sequence[Any] = [None] * len(a)
  if leaf.order is not None:
    orders = leaf.order.array.reshape(len(a), m)
  return [Stored(*v).pair() for v in zip(a, b, orders, strict=True)]


def on_host(leaf: Any) -> Any:
  """A `LowRank` as the dense kernel, multiplied out where nothing is compiled.

  Args:
    leaf: with its own A and no `c`; what is no `LowRank` stays as it is.
  """
  if not isinstance(leaf, LowRank):
    return leaf
  if leaf.b is None:
    # Narrower heads, which are padded.
    held = dataclasses.replace(leaf, a=np.asarray(leaf.opened().a), box=None)
    return np.asarray(held.dense())
  pairs = stored_pairs(leaf.opened())
  shape = leaf.layout.group_shape + leaf.layout.matrix_shape
  w = np.stack([pair.a @ pair.b for pair in pairs]).reshape(shape)
  return leaf.layout.from_matrices(w).astype(leaf.dtype)


def on_host_tree(tree: Any) -> Any:
  """A tree with all its `LowRank` leaves `on_host`; none has a `c`."""
  named, treedef = paths.flatten(tree, is_low_rank)
  held = {p: on_host(v) for p, v in with_left(named).items()}
  return paths.unflatten(treedef, held)


def multiplied_out(
  w: np.ndarray, constant: np.ndarray | None, layout: Layout, kernel: Any
) -> Any:
  """Matrices in a kernel's place, for programs that know no ranks.

  Args:
    w: (groups, d, m).
    constant: (groups, m) that the product adds, or None.
    layout: of the kernel.
    kernel: the dense kernel, whose dtype and place they have.

  Returns:
    An array like the kernel; with a constant a `LowRank`, W before or behind
    the identity, that of the smaller side.
  """
  groups = layout.group_shape
  if constant is None:
    w = w.reshape(groups + layout.matrix_shape)
    return place_like(layout.from_matrices(w), kernel)
  eye = np.broadcast_to(np.eye(n := layout.full_rank), (len(w), n, n))
  a, b = (eye, w) if layout.is_wide else (w, eye)
  shapes = (
    groups + layout.input_shape + (n,),
    groups + (n,) + layout.output_shape,
    groups + layout.output_shape,
  )
  a, b, c = (
    v.astype(kernel.dtype).reshape(shape)
    for v, shape in zip((a, b, constant), shapes, strict=True)
  )
  return place(LowRank(a, b, c, layout), kernel)


def give_back(
  named: dict[str, Any],
  path: str,
  bias: str | None,
  leaf: LowRank,
  constant: np.ndarray,
  scale: float = 1.0,
) -> dict[str, Any]:
  """A leaf whose product adds a constant: in its bias, or in `LowRank.c`.

  Args:
    named: the parameters, the dense kernel and its bias among them.
    path: of the kernel.
    bias: path of the kernel's own bias; None where there is none.
    leaf: the kernel's factors, on the host.
    constant: one number for each output of each member.
    scale: what it is multiplied with on its way to the bias.

  Returns:
    The leaves to put in place, by path, on the devices of those that were
    there.

  Raises:
    ValueError: the parameters lack the bias, or it has another size.
  """
  if bias is None:
    shape = leaf.layout.group_shape + leaf.layout.output_shape
    c = constant.reshape(shape).astype(leaf.dtype)
    return {path: place(dataclasses.replace(leaf, c=c), named[path])}
  if bias not in named or named[bias].size != constant.size:
    raise ValueError(
      f'{path!r} had the bias {bias!r} of {constant.size} numbers when its '
      'moments were collected; these parameters do not'
    )
  old = named[bias]
  new = np.asarray(old, np.float64) + scale * constant.reshape(old.shape)
  return {path: place(leaf, named[path]), bias: place_like(new, old)}

"""The r^2 numbers that a pair of factors does not need.

A pair A B of rank r is the same map as (A M) (M^-1 B) for every invertible
M (r, r). The one that makes r columns of B an identity need not store them:
B = [I, B'] in another order. Then r (d + m) - r^2 numbers are kept, fewer than
d m at every r < min(d, m). PIFA calls it a pivoting factorization, LatentLLM a
junction matrix.

As a product, y = [z, z B'] in that order, z = x A, multiplies no more than it
stores, but moves every output once more. Where rows are many and r is not, it
takes less time to write B out and to multiply with it (`written_out`).
"""

from __future__ import annotations

from collections.abc import Sequence
import hashlib
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np

from utilized_rank.tree.layout import Layout
from utilized_rank.walk import compat

IDENTITY = 'identity'
GAUGES = (None, IDENTITY)
# Multiplications that take as long as moving an output. On two CPU cores it is
# 50 to 130 forward, and more backward (`benchmarks.gauge`). The matrix units of
# a GPU do a few hundred while its memory moves one number; not measured there.
_MOVE = 128
# No entry of B' is larger: a product then loses no more digits to rounding
# than a few additions do.
LARGEST = 2.0


class Order:
  """Where each output of a kernel is among its pivots and the others.

  Part of a tree's structure, not of its leaves: it does not train. Hashed by
  its digest, once, so that it costs a jitted call nothing.

  Attributes:
    array: (*groups, m), int32; `[z, z B'][..., array]` are the outputs.
    digest: eight characters that tell it from others.
  """

  def __init__(self, array: Any):
    array = np.array(array, np.int32)
    array.setflags(write=False)
    self.array = array
    head = str(array.shape).encode()
    self._digest = hashlib.sha256(head + array.tobytes()).digest()
    self.digest = self._digest.hex()[:8]
    self._hash = hash(self._digest)

  def __hash__(self) -> int:
    return self._hash

  def __eq__(self, other: object) -> bool:
    return isinstance(other, Order) and self._digest == other._digest

  def __repr__(self) -> str:
    return f'Order(shape={self.array.shape}, {self.digest})'


# Columns that are eliminated one by one before all behind them are.
_PANEL = 32


def check_gauge(gauge: str | None) -> None:
  """Raises ValueError for a gauge that there is not."""
  if gauge not in GAUGES:
    raise ValueError(f'unknown gauge {gauge!r}; known: {GAUGES}')


def has_identity(layout: Layout, rank: int, gauge: str | None) -> bool:
  """Whether a pair of this rank is stored with an identity block.

  At r = m the identity would be all of B; such a pair stays as it is.
  """
  return gauge == IDENTITY and rank < layout.matrix_shape[1]


def pair_cost(layout: Layout, rank: int, gauge: str | None = None) -> int:
  """Numbers in a pair: the least multiplications that a row takes, as well.

  >>> layout = Layout.of((8, 8), inputs=(0,), outputs=(1,))
  >>> pair_cost(layout, 6), pair_cost(layout, 6, 'identity')
  (96, 60)
  """
  d, m = layout.matrix_shape
  free = rank * rank if has_identity(layout, rank, gauge) else 0
  return rank * (d + m) - free


def pair_flops(layout: Layout, rank: int, gauge: str | None = None) -> int:
  """Multiplications of a row with a pair as `low_rank` runs it on many rows.

  >>> layout = Layout.of((512, 512), inputs=(0,), outputs=(1,))
  >>> [pair_flops(layout, r, 'identity') - r * 1024 for r in (128, 384)]
  [0, -147456]
  """
  d, m = layout.matrix_shape
  if _saved_by_row(rank, m) > 0:
    return rank * (d + m)
  return pair_cost(layout, rank, gauge)


@compat.moves_data  # also in a thread of its own, which has its own guard
def to_identity(
  a: np.ndarray, b: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """A B with an identity in place of part of B: [A', A' B'][:, order].

  The columns of A' are columns of A B. The pivots are those of an
  elimination, exchanged until no entry of B' is above `LARGEST`, as in a
  strong rank-revealing QR (Gu and Eisenstat 1996): the condition number of
  [I, B'] is then below sqrt(1 + 4 r (m - r)), whatever the pair's was.

  Args:
    a: (d, r), float64.
    b: (r, m), float64.

  Returns:
    A' (d, r), B' (r, m - r), and the order (m,).
  """
  r, m = b.shape
  # The rows' space alone matters, not how the pair's scale is divided.
  basis = np.linalg.qr(b.T)[0].T
  # float32 is enough to choose by: what it gets wrong is exchanged.
  pivots = _pivots(basis.T.astype(np.float32))
  share = np.linalg.solve(basis[:, pivots], basis)
  if _exchange(share, pivots):
    share = np.linalg.solve(basis[:, pivots], basis)
  by_place = np.argsort(pivots)
  pivots = pivots[by_place]
  rest = np.setdiff1d(np.arange(m), pivots)
  order = np.empty(m, np.int32)
  order[np.r_[pivots, rest]] = np.arange(m)
  return a @ b[:, pivots], share[by_place][:, rest], order


def widen(a: Any, b: Any, rank: int) -> tuple[Any, Any]:
  """The same pair, in the same order, at a higher rank r.

  The first of the outputs that are no pivots become pivots: for stacks of
  kernels, whose ranks differ but whose factors have one shape.

  Args:
    a: A, (*groups, d, k).
    b: B', (*groups, k, m - k).
    rank: r, from k to below m.

  Returns:
    A (*groups, d, r) and B' (*groups, r, m - r).
  """
  array = np if isinstance(a, np.ndarray) else jnp
  more = rank - a.shape[-1]
  moved, rest = b[..., :more], b[..., more:]
  zeros = array.zeros((*rest.shape[:-2], more, rest.shape[-1]), b.dtype)
  return (
    array.concatenate([a, a @ moved], -1),
    array.concatenate([rest, zeros], -2),
  )


def _pivots(rows: np.ndarray) -> np.ndarray:
  """The rows that an elimination of (m, r), r <= m, takes as pivots, in order.

  LAPACK's own is not in numpy, and JAX compiles it for every shape anew.
  """
  left, (m, r) = rows.copy(), rows.shape
  order = np.arange(m)
  for start in range(0, r, _PANEL):
    end = min(start + _PANEL, r)
    for k in range(start, end):
      best = k + int(np.argmax(np.abs(left[k:, k])))
      for array in (left, order):
        array[[k, best]] = array[[best, k]]
      if left[k, k] != 0:
        left[k + 1 :, k] /= left[k, k]
        under, right = left[k + 1 :, k], left[k, k + 1 : end]
        left[k + 1 :, k + 1 : end] -= np.outer(under, right)
    lower = np.tril(left[start:end, start:end], -1) + np.eye(end - start)
    top = np.linalg.solve(lower, left[start:end, end:])
    left[start:end, end:] = top
    left[end:, end:] -= left[end:, start:end] @ left[start:end, end:]
  return order[:r]


def _exchange(share: np.ndarray, pivots: np.ndarray) -> bool:
  """Exchanges pivots, in place, for columns that they stand for too strongly.

  Every exchange multiplies the determinant of the pivots by more than
  `LARGEST`, so there are few.
  """
  exchanged = False
  while True:
    i, j = np.unravel_index(np.argmax(np.abs(share)), share.shape)
    if abs(share[i, j]) <= LARGEST:
      return exchanged
    column = share[:, j].copy()
    column[i] -= 1
    share -= np.outer(column / share[i, j], share[i])
    pivots[i] = j
    exchanged = True


def pays_written_out(rows: int, rank: int, outputs: int) -> bool:
  """Whether a product with `written_out` takes less time than one with B'.

  It moves r (m outputs) numbers of the factor in place of `rows`, and
  multiplies r^2 more a row. Of a symbolic number of rows it must be so for
  every number; else B' is kept, which is never much slower on few rows.
  """
  return compat.surely(
    lambda: rank * _MOVE * outputs < rows * _saved_by_row(rank, outputs)
  )


def _saved_by_row(rank: int, outputs: int) -> int:
  """Moving a row's outputs, in multiplications, less those it has more."""
  return _MOVE * outputs - rank * rank


def written_out(b: Any, order: Any, outputs: Sequence[int]) -> Any:
  """B whole: [I, B'][:, order].

  Args:
    b: B', (*groups, r, m - r).
    order: (*groups, m), int32.
    outputs: the output axes' sizes, m in all.

  Returns:
    (*groups, r, *outputs). Where types say how arrays are spread, the first of
    these axes is spread as B' is, if it divides.
  """

  def whole(b, order):
    rank, order = len(b), order[None]
    # Looked up in B' itself: an array of both would be one more to write.
    at = jnp.maximum(order[0] - rank, 0)
    others = b.at[:, at].get(mode='promise_in_bounds')
    block = jnp.arange(rank)[:, None] == order
    return jnp.where(order < rank, block.astype(b.dtype), others)

  def write(b, order):
    found = _over(whole, order.ndim - 1)(b, order)
    return found.reshape(*found.shape[:-1], *outputs)

  b, order = jnp.asarray(b), jnp.asarray(order)
  if not compat.has_explicit_axes(b):
    return write(b, order)
  # JAX does not say how the result of a lookup is spread.
  sharding = jax.typeof(b).sharding
  *lead, last = sharding.spec
  names = last if isinstance(last, tuple) else (last,) if last else ()
  if outputs[0] % math.prod(sharding.mesh.shape[n] for n in names):
    last = None
  spec = PartitionSpec(*lead, last, *[None] * (len(outputs) - 1))
  return jax.sharding.auto_axes(write, out_sharding=spec)(b, order)


def join(z: Any, rest: Any, order: Any, axis: int) -> Any:
  """[z, z B'] in the outputs' order, along an axis after the groups.

  Args:
    z: (*groups, ..., r, ...).
    rest: z B', (*groups, ..., m - r, ...).
    order: (*groups, m), int32.
    axis: where r is.
  """
  groups = order.ndim - 1
  both = jnp.concatenate([z, rest], axis)
  take = lambda v, at: v.at[(slice(None),) * (axis - groups) + (at,)].get(
    unique_indices=True, mode='promise_in_bounds'
  )
  return _over(take, groups)(both, order)


def part(x: Any, order: Any, rank: int) -> tuple[Any, Any]:
  """Undoes `join` for the last axis of x: (*groups, ..., m) in two."""
  groups = order.ndim - 1
  there = jnp.argsort(order, axis=-1)
  take = lambda v, at: v.at[..., at].get(
    unique_indices=True, mode='promise_in_bounds'
  )
  sorted_ = _over(take, groups)(x, there)
  return sorted_[..., :rank], sorted_[..., rank:]


def _over(fn: Any, groups: int) -> Any:
  for _ in range(groups):
    fn = jax.vmap(fn)
  return fn


def saves(layout: Layout, rank: int, gauge: str | None = None) -> bool:
  """Whether a pair of this rank has fewer parameters than the kernel."""
  return pair_cost(layout, rank, gauge) < math.prod(layout.matrix_shape)

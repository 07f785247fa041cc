"""Gram matrices on the device: sums of x x^T over rows.

Sums over data are taken in float32 (float64 where the data is) at the highest
matmul precision, whatever the activations' dtype: a bfloat16 sum stops growing
after a few hundred additions, and a TPU multiplies float32 in bfloat16 passes
unless told otherwise.

A Gram matrix is symmetric: little more than half of it is multiplied, and kept.
The columns are cut into blocks, and of each block of rows of C there is what
stands on and right of the diagonal, a panel: with four, 5/8 of all products and
of the memory. `whole` mirrors the rest where it is read. Time over that of the
full product and sum, on two CPU cores in float32 (`python -m benchmarks.gram`;
on a noisy machine, the same program a tenth apart):

  d = 256,  n = 1576:  2 panels 1.01, 4 panels 1.08, 8 panels 1.26
  d = 768,  n = 1576:  2 panels 0.97, 4 panels 0.83, 8 panels 0.97
  d = 3072, n = 1576:  2 panels 0.81, 4 panels 0.66, 8 panels 0.68
  d = 3072, n = 200:   2 panels 0.76, 4 panels 0.65, 8 panels 0.65

XLA's own `symmetric_product` costs the full product and more on the CPU (0.9 to
1.6, 3 for few rows) and takes no precision elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np

from utilized_rank.products.tiles import Tiles
from utilized_rank.walk import compat

_PANELS = 4
# Below this width panels are too thin for a matrix unit.
_LEAST_WIDTH = 512

# Of a symmetric (*groups, d, d): rows a to b of the columns from a on, for each
# block of columns (a, b); (*groups, b - a, d - a) each.
Panels = tuple[Any, ...]
Edges = Sequence[tuple[int, int]]
# How the rows are read: so many blocks of all kernels' rows, or each kernel's.
Blocks = int | Tiles


def gram(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Sums over the rows of `x`: s = sum x and C = sum x x^T.

  Args:
    x: (*groups, n, d), any real dtype.

  Returns:
    s of shape (*groups, d) and C of shape (*groups, d, d), float32, or
    float64 for float64 rows.

  >>> s, c = gram(jnp.array([[1.0, 2.0], [3.0, 4.0]]))
  >>> s.tolist(), c.tolist()
  ([4.0, 6.0], [[10.0, 14.0], [14.0, 20.0]])
  """
  total, second = _panels(x, _edges_of_gram(*x.shape[-2:]))
  return total, whole(second)


def panels(x: jax.Array) -> tuple[jax.Array, Panels]:
  """`gram`, with C as panels."""
  return _panels(x, _edges(x.shape[-1]))


def _panels(x: jax.Array, edges: Edges) -> tuple[jax.Array, Panels]:
  dtype = accumulator_dtype(x.dtype)
  if not jnp.issubdtype(x.dtype, jnp.floating):
    x = x.astype(dtype)
  total = jnp.sum(x, axis=-2, dtype=dtype)
  return total, tuple(
    jnp.einsum(
      '...nd,...ne->...de',
      x[..., a:b],
      x[..., a:],
      precision=jax.lax.Precision.HIGHEST,
      preferred_element_type=dtype,
    )
    for a, b in edges
  )


def whole(second: Panels) -> Any:
  """The symmetric matrix of panels: numpy arrays make one, jax arrays too.

  A product's own two triangles are not summed in one order, and so differ in
  rounding. Of numpy's squares on the diagonal the lower one is taken for both,
  since what reads rows for columns wants them exactly symmetric.

  >>> full = np.arange(9.0).reshape(3, 3) + np.arange(9.0).reshape(3, 3).T
  >>> bool((whole((full[:2], full[2:, 2:])) == full).all())
  True
  """
  d = second[0].shape[-1]
  starts = [d - panel.shape[-1] for panel in second]
  if all(isinstance(panel, np.ndarray) for panel in second):
    full = np.empty((*second[0].shape[:-2], d, d), second[0].dtype)
    for a, panel in zip(starts, second, strict=True):
      b = a + panel.shape[-2]
      square, rest = panel[..., : b - a], panel[..., b - a :]
      full[..., a:b, a:b] = np.tril(square)
      full[..., a:b, a:b] += np.swapaxes(np.tril(square, -1), -1, -2)
      full[..., a:b, b:] = rest
      full[..., b:, a:b] = np.swapaxes(rest, -1, -2)
    return full
  if len(second) == 1:
    return second[0]
  rows = []
  for i, (a, panel) in enumerate(zip(starts, second, strict=True)):
    b = a + panel.shape[-2]
    mirrored = [
      jnp.swapaxes(other[..., a - start : b - start], -1, -2)
      for start, other in zip(starts[:i], second[:i], strict=True)
    ]
    rows.append(jnp.concatenate([*mirrored, panel], axis=-1))
  return jnp.concatenate(rows, axis=-2)


def panels_of(second: Any) -> Panels:
  """The panels of a symmetric (*groups, d, d)."""
  return tuple(second[..., a:b, a:] for a, b in _edges(second.shape[-1]))


def trace(second: Panels) -> jax.Array:
  """That of the matrix that panels are of, (*groups,)."""
  # The square on the diagonal leads each panel.
  squares = [jnp.diagonal(p, axis1=-2, axis2=-1) for p in second]
  return jnp.concatenate(squares, axis=-1).sum(-1)


def panel_shapes(d: int) -> list[tuple[int, int]]:
  """Of the panels of a (d, d) matrix.

  >>> panel_shapes(64), panel_shapes(1024)[2:]
  ([(64, 64)], [(256, 512), (256, 256)])
  """
  return [(b - a, d - a) for a, b in _edges(d)]


def panel_entries(d: int) -> int:
  """Numbers that panels of a (d, d) matrix hold.

  >>> panel_entries(64) / 64**2, panel_entries(1024) / 1024**2
  (1.0, 0.625)
  """
  return sum(a * b for a, b in panel_shapes(d))


def _edges(d: int) -> Edges:
  """Where the columns are cut; by width alone, so that batches of any number
  of rows add up."""
  if d < _LEAST_WIDTH:
    return [(0, d)]
  width = -(-d // (8 * _PANELS)) * 8
  return [(a, min(a + width, d)) for a in range(0, d, width)]


def _edges_of_gram(n: int, d: int) -> Edges:
  """The same where the whole matrix is wanted: of few rows, mirroring takes
  longer than the products that it saves (2 x the time at n = 200, d = 3072)."""
  return [(0, d)] if n < d // 4 else _edges(d)


def panel_flops(n: int, d: int) -> int:
  """FLOPs of `panels` on (n, d) rows; the least possible is n d (d + 1).

  >>> panel_flops(100, 64), panel_flops(4096, 1024) / (4096 * 1024 * 1025)
  (819200, 1.248780487804878)
  """
  return 2 * n * panel_entries(d)


def sharded_panels(
  features: Callable[[jax.Array, Any], jax.Array], x: jax.Array, blocks: Blocks
) -> tuple[jax.Array, Panels]:
  """`panels` of all rows, the sums replicated where types carry shardings.

  With `AxisType.Explicit` meshes JAX refuses to sum over a sharded axis unless
  it is told how the result is sharded. No derivative goes through the sums.

  Args:
    features: `features(x, i)` reads the rows (*groups, n, d) of the i-th
      block of `x`.
    x: what a product reads.
    blocks: number of blocks; only one block's rows exist at a time. With
      `Tiles` a block is (start, stop), and its sums are one kernel's.
  """
  return over_blocks(lambda i, x: panels(features(x, i)), x, blocks)


def sharded_total(
  features: Callable[[jax.Array, Any], jax.Array], x: jax.Array, blocks: Blocks
) -> tuple[jax.Array]:
  """s = sum x alone, as `sharded_panels` has it."""

  def total(i, x):
    rows = features(x, i)
    return (jnp.sum(rows, axis=-2, dtype=accumulator_dtype(rows.dtype)),)

  return over_blocks(total, x, blocks)


def coupled_panels(
  rows: Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, jax.Array]],
  x: jax.Array,
  g: jax.Array,
  blocks: Blocks,
) -> tuple[jax.Array, Panels, Panels]:
  """Sums over rows x and g of |g|^2 x, |g|^2 x x^T and |x|^2 g g^T.

  Args:
    rows: `rows(x, g, i)` reads the i-th block of both, (*groups, n, d) and
      (*groups, n, m), row by row.
    x: what a product reads.
    g: an array like its output.
    blocks: as in `sharded_panels`.

  Returns:
    (*groups, 1, d), and panels of (*groups, d, d) and (*groups, m, m).
  """

  def read(i, both):
    x, g = (v.astype(accumulator_dtype(v.dtype)) for v in rows(*both, i))
    by_g, by_x = (
      jnp.sum(jnp.square(v), axis=-1, keepdims=True) for v in (g, x)
    )
    total = jnp.sum(by_g * x, axis=-2, keepdims=True)
    return total, panels(by_g**0.5 * x)[1], panels(by_x**0.5 * g)[1]

  return over_blocks(read, (x, g), blocks)


def row_counts(
  features: Callable[[jax.Array, Any], jax.Array],
  shape: Sequence[int],
  keep: Any,
  tiles: Tiles,
) -> jax.Array:
  """How many rows each kernel has, (*groups,).

  Args:
    features: as in `sharded_panels`.
    shape: of what a product reads.
    keep: which of it counts, broadcastable to it; None: all.
    tiles: whose rows are whose.
  """
  if keep is None:
    return tiles.rows_of()
  ones = jnp.broadcast_to(keep, shape).astype(jnp.int32)
  real = lambda tile, x: features(x, tile)[:, 0].sum(dtype=jnp.int32)
  return over_blocks(real, ones, tiles)


def over_blocks(read: Callable[[Any, jax.Array], Any], x: Any, blocks: Blocks):
  """The sum of `read(i, x)` over blocks i, replicated, without derivative.

  Over `Tiles`, (*groups, ...): the sums of each kernel's tiles.
  """
  x = jax.lax.stop_gradient(x)

  def sums(x):
    if isinstance(blocks, Tiles):
      return _over_tiles(lambda tile: read(tile, x), blocks)
    add = lambda i, so_far: jax.tree.map(jnp.add, so_far, read(i, x))
    return jax.lax.fori_loop(1, blocks, add, read(0, x))

  if not any(map(compat.has_explicit_axes, jax.tree.leaves(x))):
    return sums(x)
  return jax.sharding.auto_axes(sums, out_sharding=PartitionSpec())(x)


def _over_tiles(read: Callable[[Any], Any], tiles: Tiles):
  at = lambda i: (tiles.start[i], tiles.stop[i])

  def empty(found):
    return jnp.zeros((math.prod(tiles.groups), *found.shape), found.dtype)

  def add(i, so_far):
    put = lambda total, found: total.at[tiles.member[i]].add(found)
    return jax.tree.map(put, so_far, read(at(i)))

  first = read(at(0))
  # Added to what was read, so as to differ along the same mesh axes.
  start = jax.tree.map(
    lambda found: empty(found).at[tiles.member[0]].add(found), first
  )
  found = jax.lax.fori_loop(1, len(tiles), add, start)
  return jax.tree.map(lambda v: v.reshape(*tiles.groups, *v.shape[1:]), found)


def accumulator_dtype(dtype: Any) -> Any:
  """float64 for float64, float32 for everything else."""
  return (
    jnp.promote_types(jnp.float32, dtype)
    if jnp.issubdtype(dtype, jnp.floating)
    else jnp.float32
  )

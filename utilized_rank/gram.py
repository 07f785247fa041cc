"""Gram matrices on the device: sums of x x^T over rows.

Sums over data are taken in float32 (float64 where the data is) at the highest
matmul precision, whatever the activations' dtype: a bfloat16 sum stops growing
after a few hundred additions, and a TPU multiplies float32 in bfloat16 passes
unless told otherwise.

A Gram matrix is symmetric, so half of its products are enough. The columns are
cut into blocks and only the upper triangle of blocks is multiplied, then
mirrored. On two CPU cores in float32, CPU time over that of the full product
(a prototype on a loaded machine; `python -m benchmarks.gram` measures again):

  d = 768,  n = 1576:  2 blocks 0.83, 4 blocks 0.74, 6 blocks 0.79
  d = 3072, n = 1576:  3 blocks 0.88, 4 blocks 0.69, 6 blocks 0.83
  d = 3072, n = 200:   4 blocks 2.0 (mirroring and copies cost more than they
                       save); d = 256: 4 blocks 1.2

XLA's own `symmetric_product` costs the full product and more on the CPU (1.0 to
1.2, 3 for few rows) and takes no precision elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from utilized_rank import compat

# Blocks of columns: the products are (_BLOCKS + 1) / (2 _BLOCKS) of all.
_BLOCKS = 4
# Below this width the blocks are too thin for a matrix unit.
_LEAST_WIDTH = 512


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
  dtype = accumulator_dtype(x.dtype)
  if not jnp.issubdtype(x.dtype, jnp.floating):
    x = x.astype(dtype)
  total = jnp.sum(x, axis=-2, dtype=dtype)
  edges = _edges(*x.shape[-2:])
  columns = [x[..., a:b] for a, b in edges]
  if len(edges) == 1:
    return total, _product(x, x, dtype)
  d = x.shape[-1]
  second = jnp.zeros((*x.shape[:-2], d, d), dtype)
  for i, (a, b) in enumerate(edges):
    for j, (c, e) in enumerate(edges[i:], i):
      block = _product(columns[i], columns[j], dtype)
      second = second.at[..., a:b, c:e].set(block)
      if j > i:
        second = second.at[..., c:e, a:b].set(jnp.swapaxes(block, -1, -2))
  return total, second


def _edges(n: int, d: int) -> list[tuple[int, int]]:
  """Where the columns of (n, d) are cut."""
  # With fewer rows the products are small beside the (d, d) results.
  if d < _LEAST_WIDTH or n < d // 4:
    return [(0, d)]
  width = -(-d // (8 * _BLOCKS)) * 8
  return [(a, min(a + width, d)) for a in range(0, d, width)]


def _product(x: jax.Array, y: jax.Array, dtype: Any) -> jax.Array:
  return jnp.einsum(
    '...nd,...ne->...de',
    x,
    y,
    precision=jax.lax.Precision.HIGHEST,
    preferred_element_type=dtype,
  )


def gram_flops(n: int, d: int) -> int:
  """FLOPs of `gram` on (n, d) rows; the least possible is n d (d + 1).

  >>> gram_flops(100, 64), gram_flops(4096, 1024) / (4096 * 1024 * 1025)
  (819200, 1.248780487804878)
  """
  widths = [b - a for a, b in _edges(n, d)]
  return n * (d * d + sum(w * w for w in widths))


def sharded_gram(
  features: Callable[[jax.Array, Any], jax.Array], x: jax.Array, blocks: int
) -> tuple[jax.Array, jax.Array]:
  """`gram` of all rows, the sums replicated where types carry shardings.

  With `AxisType.Explicit` meshes JAX refuses to sum over a sharded axis unless
  it is told how the result is sharded. No derivative goes through the sums.

  Args:
    features: `features(x, i)` reads the rows (*groups, n, d) of the i-th
      block of `x`.
    x: what a product reads.
    blocks: number of blocks; only one block's rows exist at a time.
  """
  return _over_blocks(lambda i, x: gram(features(x, i)), x, blocks)


def sharded_total(
  features: Callable[[jax.Array, Any], jax.Array], x: jax.Array, blocks: int
) -> tuple[jax.Array]:
  """s = sum x alone, as `sharded_gram` has it."""

  def total(i, x):
    rows = features(x, i)
    return (jnp.sum(rows, axis=-2, dtype=accumulator_dtype(rows.dtype)),)

  return _over_blocks(total, x, blocks)


def _over_blocks(read: Callable[[Any, jax.Array], Any], x: Any, blocks: int):
  """The sum of `read(i, x)` over blocks i, replicated, without derivative."""
  x = jax.lax.stop_gradient(x)

  def sums(x):
    add = lambda i, so_far: jax.tree.map(jnp.add, so_far, read(i, x))
    return jax.lax.fori_loop(1, blocks, add, read(0, x))

  if not compat.has_explicit_axes(x):
    return sums(x)
  return jax.sharding.auto_axes(sums, out_sharding=PartitionSpec())(x)


def accumulator_dtype(dtype: Any) -> Any:
  """float64 for float64, float32 for everything else."""
  return (
    jnp.promote_types(jnp.float32, dtype)
    if jnp.issubdtype(dtype, jnp.floating)
    else jnp.float32
  )

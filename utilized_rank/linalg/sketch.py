"""Sketches of second moments that are too wide to be summed whole.

Of C = sum x x^T (d, d) two things are summed in its place: its product with a
fixed matrix of random signs, Y = C Omega = sum x (x^T Omega) (d, l), and its
diagonal. Both are plain sums: they add up over batches, devices and data sets.
`nystrom` makes of them what C is taken for.

Time over that of the sums of C is about 4 l / 1.25 d, memory l / 0.6 d.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from utilized_rank.linalg import gram


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sketch:
  """Sums over rows x, in place of the panels of C.

  Attributes:
    sums: Y = C Omega, and behind its columns the diagonal of C.
      # shape=(*groups, d, l + 1), dtype=float32
  """

  sums: Any

  @property
  def columns(self) -> int:
    """l."""
    return self.sums.shape[-1] - 1

  @property
  def range(self) -> Any:
    """Y (*groups, d, l)."""
    return self.sums[..., :-1]

  @property
  def diagonal(self) -> Any:
    """That of C, (*groups, d)."""
    return self.sums[..., -1]


def saves(d: int, columns: int) -> bool:
  """Whether a sketch is smaller than what is kept of C.

  >>> saves(2048, 512), saves(512, 512)
  (True, False)
  """
  return d * (columns + 1) < gram.panel_entries(d)


def sketch(x: jax.Array, columns: int) -> tuple[jax.Array, Sketch]:
  """Sums over the rows of `x`: s = sum x, and the sketch of C.

  Args:
    x: (*groups, n, d), any real dtype.
    columns: l.

  Returns:
    s (*groups, d) and the sketch, float32, or float64 for float64 rows.

  >>> s, c = sketch(jnp.array([[1.0, 2.0], [3.0, 4.0]]), 1)
  >>> s.tolist(), c.diagonal.tolist(), c.range.shape
  ([4.0, 6.0], [10.0, 20.0], (2, 1))
  """
  dtype = gram.accumulator_dtype(x.dtype)
  x = x.astype(dtype)
  product = functools.partial(
    jnp.einsum,
    precision=jax.lax.Precision.HIGHEST,
    preferred_element_type=dtype,
  )
  omega = _unpacked(jnp.asarray(_bits(x.shape[-1], columns)), columns, jnp)
  z = product('...nd,dl->...nl', x, omega.astype(dtype))
  y = product('...nd,...nl->...dl', x, z)
  diagonal = jnp.sum(x * x, axis=-2)
  return jnp.sum(x, axis=-2), Sketch(
    jnp.concatenate([y, diagonal[..., None]], axis=-1)
  )


def sharded_sketch(
  features: Callable[[jax.Array, Any], jax.Array],
  x: jax.Array,
  blocks: gram.Blocks,
  columns: int,
) -> tuple[jax.Array, Sketch]:
  """`sketch` of all rows, as `gram.sharded_panels` has them."""
  return gram.over_blocks(
    lambda i, x: sketch(features(x, i), columns), x, blocks
  )


def flops(n: int, d: int, columns: int) -> int:
  """FLOPs of `sketch` on (n, d) rows."""
  return 4 * n * d * columns + 2 * n * d


def signs(d: int, columns: int) -> np.ndarray:
  """Omega (d, l), float64, its entries 1 and -1; the same everywhere, always.

  NumPy promises that the numbers of its bit generators do not change, which
  JAX does not of its own.

  >>> signs(3, 2).shape, float(abs(signs(3, 2)).min())
  ((3, 2), 1.0)
  """
  return _unpacked(_bits(d, columns), columns, np).astype(np.float64)


def _bits(d: int, columns: int) -> np.ndarray:
  """Those of Omega, eight in a byte: what a compiled program holds of it."""
  width = -(-columns // 8)
  raw = np.random.Philox(key=0).random_raw(-(-d * width // 8))
  return raw.astype('<u8').view(np.uint8)[: d * width].reshape(d, width)


def _unpacked(bits: Any, columns: int, of: Any) -> Any:
  """1 and -1 as int8; `of` is the module whose arrays they are."""
  return 1 - 2 * of.unpackbits(bits, axis=-1)[:, :columns].astype(of.int8)

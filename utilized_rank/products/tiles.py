"""Rows of which each belongs to one of a group of kernels, read in tiles.

How many rows a kernel has is data. So the rows, those of one kernel behind
those of another, are cut into tiles of one kernel's rows each: as many as there
can be, those left over being empty. What is read is little more than the rows
themselves, where a mask for each kernel reads all rows for each.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Rows of a tile: enough for a matrix unit, and not many more than a kernel has.
_LEAST, _MOST = 32, 256


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tiles:
  """Where each tile is among the rows, and whose rows it has.

  Attributes:
    start: its first row.  # shape=(t,), dtype=int32
    stop: behind its last one.  # shape=(t,), dtype=int32
    member: its kernel among `groups`, flattened.  # shape=(t,), dtype=int32
    groups: sizes of the axes that the kernels make.
  """

  start: Any
  stop: Any
  member: Any
  groups: tuple[int, ...] = dataclasses.field(metadata=dict(static=True))

  def __len__(self) -> int:
    return self.start.shape[0]

  def rows_of(self) -> jax.Array:
    """How many rows each kernel has, (*groups,)."""
    counts = jnp.zeros(int(np.prod(self.groups)), jnp.int32)
    return (
      counts.at[self.member].add(self.stop - self.start).reshape(self.groups)
    )


def rows_of_tile(rows: int, segments: int) -> int:
  """How many rows a tile has at most.

  >>> rows_of_tile(4096, 8), rows_of_tile(4096, 64), rows_of_tile(20, 8)
  (256, 64, 20)
  """
  return min(max(rows // max(segments, 1), _LEAST), _MOST, rows)


def tiles_of(
  start: Any,
  stop: Any,
  member: np.ndarray,
  groups: tuple[int, ...],
  rows: int,
) -> Tiles:
  """Cuts segments of rows, each of one kernel, into tiles.

  Args:
    start: the segments' first rows, (s,); segments do not overlap.
    stop: behind their last ones, (s,).
    member: the kernel of each.
    groups: as in `Tiles`.
    rows: how many rows there are in all.

  >>> tiles = tiles_of(
  ...     jnp.array([0, 40]), jnp.array([40, 50]), np.array([0, 1]), (2,), 64)
  >>> tiles.start.tolist(), tiles.stop.tolist(), tiles.rows_of().tolist()
  ([0, 32, 40, 0], [32, 40, 50, 0], [40, 10])
  """
  size = rows_of_tile(rows, len(member))
  most = rows // size + len(member) if size else 1
  start, stop = start.astype(jnp.int32), stop.astype(jnp.int32)
  last = jnp.cumsum(-((start - stop) // max(size, 1)))
  number = jnp.arange(most, dtype=jnp.int32)
  segment = jnp.searchsorted(last, number, side='right')
  is_real = segment < len(member)
  segment = jnp.minimum(segment, len(member) - 1)
  before = jnp.concatenate([jnp.zeros(1, last.dtype), last[:-1]])
  begin = start[segment] + (number - before[segment]) * size
  end = jnp.minimum(begin + size, stop[segment])
  return Tiles(
    jnp.where(is_real, begin, 0).astype(jnp.int32),
    jnp.where(is_real, end, 0).astype(jnp.int32),
    jnp.asarray(member, jnp.int32)[segment],
    groups,
  )


def read(rows: Any, start: Any, stop: Any, size: int) -> Any:
  """One tile of rows (n, d): (size, d), zeros in place of what is not in it."""
  first = jnp.minimum(start, rows.shape[0] - size)
  tile = jax.lax.dynamic_slice_in_dim(rows, first, size)
  at = first + jnp.arange(size, dtype=jnp.int32)
  inside = (at >= start) & (at < stop)
  return jnp.where(inside[:, None], tile, jnp.zeros((), tile.dtype))

"""Position embeddings: their module, their start, and their resizing."""

from __future__ import annotations

from collections.abc import Sequence
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from utilized_rank.host.extras import extra

with extra('models'):
  import flax.linen as nn

Array = jax.Array


class PositionEmbedding(nn.Module):
  """Adds a learned embedding to every position of `(B, N, D)`.

  Attributes:
    grid: rows and columns of patches; what comes before them is a token.
  """

  grid: tuple[int, int]

  @nn.compact
  def __call__(self, x: Array) -> Array:
    def init(key: Array, shape: tuple[int, ...]) -> Array:
      table = _sincos(self.grid, shape[-1])
      return jnp.pad(table, ((shape[1] - len(table), 0), (0, 0)))[None]

    table = self.param('pos_embedding', init, (1, *x.shape[1:]))
    return x + table.astype(x.dtype)


def _sincos(grid: tuple[int, int], width: int) -> Array:
  """Sines and cosines of row and column, `(rows * columns, width)`.

  The published recipe starts from noise of size 0.02. On little data that
  leaves the first layers blind to position for long, which on the digits
  cost about a point of accuracy.
  """
  # Wavelengths from 6 to 600 patches.
  frequency = 100.0 ** -jnp.linspace(0, 1, width // 4, endpoint=False)
  row, column = jnp.indices(grid).reshape(2, -1, 1) * frequency
  waves = [jnp.sin(row), jnp.cos(row), jnp.sin(column), jnp.cos(column)]
  return jnp.pad(jnp.concatenate(waves, axis=-1), ((0, 0), (0, width % 4)))


def square_grid(
  positions: int, before: Sequence[int] = (0, 1)
) -> tuple[tuple[int, int], int] | None:
  """The square grid of a table's rows and the rows before it, or None.

  Args:
    positions: rows of the table.
    before: how many rows may come before the grid.

  Raises:
    ValueError: two grids fit.

  >>> square_grid(197), square_grid(196), square_grid(200)
  (((14, 14), 1), ((14, 14), 0), None)
  """
  fitting = [
    ((side, side), tokens)
    for tokens in before
    if positions > tokens
    and (side := math.isqrt(positions - tokens)) ** 2 == positions - tokens
  ]
  if len(fitting) > 1:
    raise ValueError(
      f'{positions} positions are {fitting[0][0]} patches behind '
      f'{fitting[0][1]} tokens or {fitting[1][0]} behind {fitting[1][1]}.'
    )
  return fitting[0] if fitting else None


def resize_positions(
  table: Any, grid: tuple[int, int], method: str = 'timm'
) -> np.ndarray:
  """A table of position embeddings for another grid of patches.

  Args:
    table: `(1, N, D)` of a square grid, with or without one token in front,
      which stays as it is.
    grid: rows and columns that are wanted.
    method: whose result is wanted: `'timm'` (bicubic with antialiasing), `'hf'`
      (bicubic without; also DINO's and MAE's) or `'big_vision'` (bilinear,
      corners aligned).

  Returns:
    `(1, N', D)` float32.

  Raises:
    ValueError: the rows of the table are no square grid, or there is no such
      method.

  >>> resize_positions(np.ones((1, 17, 2)), (2, 3)).shape
  (1, 7, 2)
  """
  if method not in _WEIGHTS:
    raise ValueError(f'method={method!r}; it is one of {sorted(_WEIGHTS)}.')
  table = np.asarray(table, np.float32)
  found = square_grid(table.shape[1])
  if found is None:
    raise ValueError(
      f'a table of {table.shape[1]} positions is no square grid with at most '
      'one token in front, so it cannot be resized.'
    )
  (old, _), tokens = found
  rows, columns = (_WEIGHTS[method](old, new) for new in grid)
  patches = table[0, tokens:].reshape(old, old, -1)
  patches = np.einsum('ri,cj,ijd->rcd', rows, columns, patches, optimize=True)
  flat = patches.reshape(1, -1, table.shape[-1]).astype(np.float32)
  return np.concatenate([table[:, :tokens], flat], axis=1)


def _keys(x: np.ndarray, a: float) -> np.ndarray:
  """The cubic convolution kernel (Keys, 1981)."""
  x = np.abs(x)
  near = (a + 2) * x**3 - (a + 3) * x**2 + 1
  far = a * (x**3 - 5 * x**2 + 8 * x - 4)
  return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def _antialiased(old: int, new: int) -> np.ndarray:
  # The kernel is as wide as an output pixel; weights that fall outside are
  # left out and the others normalised. PyTorch takes a = -1/2 here.
  scale = max(old / new, 1.0)
  centers = (np.arange(new) + 0.5) * old / new - 0.5
  weights = _keys((np.arange(old) - centers[:, None]) / scale, -0.5)
  return weights / weights.sum(axis=1, keepdims=True)


def _bicubic(old: int, new: int) -> np.ndarray:
  # What falls outside reads the edge. PyTorch takes a = -3/4 here.
  centers = (np.arange(new) + 0.5) * old / new - 0.5
  taps = np.floor(centers)[:, None].astype(int) + np.arange(-1, 3)
  weights = np.zeros((new, old))
  values = _keys(taps - centers[:, None], -0.75)
  np.add.at(weights, (np.arange(new)[:, None], taps.clip(0, old - 1)), values)
  return weights


def _bilinear(old: int, new: int) -> np.ndarray:
  centers = np.linspace(0, old - 1, new)
  return np.maximum(1 - np.abs(np.arange(old) - centers[:, None]), 0)


_WEIGHTS = {'timm': _antialiased, 'hf': _bicubic, 'big_vision': _bilinear}

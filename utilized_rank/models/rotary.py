"""Rotary positions (Su et al., https://arxiv.org/abs/2104.09864)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Rotation:
  """How fast each pair of features turns with the position.

  Every published way to stretch a context (linear, YaRN, Llama 3) is a choice
  of these numbers.

  Attributes:
    rates: radians a position, one for each pair; features behind the pairs
      stay as they are.
    scale: of what is turned; YaRN's attention factor.
  """

  rates: tuple[float, ...]
  scale: float = 1.0

  @classmethod
  def plain(cls, theta: float, width: int) -> Rotation:
    """The rates of the first publication, for `width` features.

    >>> Rotation.plain(1e4, 4).rates
    (1.0, 0.01)
    """
    exponents = np.arange(0, width, 2) / width
    return cls(tuple(float(r) for r in theta**-exponents))

  def angles(self, positions: Array) -> Array:
    """`(..., pairs)` radians for positions `(...)`."""
    return positions[..., None] * jnp.asarray(self.rates, jnp.float32)


def rotate(
  x: Array, angles: Array, *, interleaved: bool, scale: float = 1.0
) -> Array:
  """Turns the pairs of `(B, T, H, D)` by their angles.

  Args:
    x: queries or keys.
    angles: (T, pairs), at most D / 2 pairs; the other features stay.
    interleaved: pairs are neighbours (Llama's own files), not the two halves
      (Hugging Face). The same function for permuted kernels.
    scale: of the features that are turned.

  Returns:
    The same shape and dtype.

  >>> angles = Rotation.plain(1e4, 2).angles(jnp.arange(2))
  >>> turned = rotate(jnp.ones((1, 2, 1, 2)), angles, interleaved=True)
  >>> expected = [np.cos(1) - np.sin(1), np.sin(1) + np.cos(1)]
  >>> np.allclose(turned[0, 1, 0], expected)
  True
  """
  half = angles.shape[-1]
  cos = (scale * jnp.cos(angles)).astype(x.dtype)[:, None]
  sin = (scale * jnp.sin(angles)).astype(x.dtype)[:, None]
  x, rest = x[..., : 2 * half], x[..., 2 * half :]
  pairs = (*x.shape[:-1], half, 2) if interleaved else (*x.shape[:-1], 2, half)
  axis = -1 if interleaved else -2
  a, b = jnp.moveaxis(x.reshape(pairs), axis, 0)
  turned = jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=axis)
  turned = turned.reshape(x.shape)
  return jnp.concatenate([turned, rest], -1) if rest.shape[-1] else turned


@dataclasses.dataclass(frozen=True)
class GridRotation:
  """Rotary positions of patches: half of the pairs by row, half by column.

  Attributes:
    rates: radians a unit of a coordinate, one for each pair of an axis.
    centered: coordinates go from -1 to 1 over each axis, as in DINOv3
      (https://arxiv.org/abs/2508.10104), not from 0 by patches, as in EVA-02
      (https://arxiv.org/abs/2303.11331).
    reference: side of the grid whose coordinates the patches have, or None for
      their own.
    interleaved: see `rotate`.
  """

  rates: tuple[float, ...]
  centered: bool = False
  reference: int | None = None
  interleaved: bool = False

  def angles(self, grid: tuple[int, int]) -> Array:
    """`(rows * columns, pairs)` radians.

    >>> GridRotation((1.0,), centered=True).angles((1, 2)).tolist()
    [[0.0, -0.5], [0.0, 0.5]]
    """
    rates = np.asarray(self.rates)
    axes = []
    for place, size in zip(np.indices(grid), grid, strict=True):
      at = place.astype(np.float64)
      if self.centered:
        at = (2 * at + 1) / size - 1
      elif self.reference is not None:
        at = at * self.reference / size
      axes.append(at.reshape(-1, 1) * rates)
    return jnp.asarray(np.concatenate(axes, axis=1), jnp.float32)

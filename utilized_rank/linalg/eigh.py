"""Eigendecompositions on the host.

Decompositions of the finished sums are done once per kernel, in float64 with
LAPACK on the host whatever the backend: the small eigenvalues decide the ranks
at 99.9 % energy, and the accelerators' solvers are made for float32, slow to
compile at these sizes and known to return NaN in silence (jax-ml/jax#1628,
#32641). JAX's own CPU solver calls the same LAPACK, and takes the same time in
float64. What comes back is looked at, and tried again in another way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

# Eigenvalues below this share of the largest are rounding of a float32 sum.
EIGENVALUE_FLOOR = float(np.finfo(np.float32).eps)


def eigh(matrix: Any) -> tuple[np.ndarray, np.ndarray]:
  """Eigenvalues, descending, and eigenvectors of PSD matrices, in float64.

  Args:
    matrix: (*groups, d, d), symmetric up to rounding.

  Returns:
    Values (*groups, d), those that are rounding noise set to zero, and the
    vectors in the columns of (*groups, d, d).

  Raises:
    FloatingPointError: the matrix holds NaN or infinity.
  """
  matrix = np.asarray(matrix, np.float64)
  if not np.all(np.isfinite(matrix)):
    raise FloatingPointError(
      f'a {matrix.shape} moment holds NaN or infinite numbers'
    )
  values, vectors = symmetric_eigh(matrix)
  values, vectors = values[..., ::-1], vectors[..., ::-1]
  floor = EIGENVALUE_FLOOR * np.maximum(values[..., :1], 0)
  return np.where(values > floor, values, 0.0), vectors


def eigenvalues(matrix: np.ndarray) -> np.ndarray:
  """Eigenvalues of a symmetric matrix, ascending, checked; no vectors.

  A third of the time of a decomposition.

  Raises:
    FloatingPointError: no way gave finite numbers.
  """
  symmetric = (matrix + matrix.T) / 2
  (values,) = _first_finite(
    'eigenvalues',
    symmetric,
    lambda: (np.linalg.eigvalsh(symmetric, 'L'),),
    lambda: (np.linalg.eigvalsh(symmetric, 'U'),),
    lambda: (_eigh_by_svd(symmetric)[0],),
  )
  return values


def spectrum(matrix: np.ndarray) -> np.ndarray:
  """The values that `eigh` gives of one matrix, without the vectors.

  Raises:
    FloatingPointError: the matrix holds NaN or infinity.
  """
  if not np.all(np.isfinite(matrix)):
    raise FloatingPointError(
      f'a {matrix.shape} moment holds NaN or infinite numbers'
    )
  values = eigenvalues(matrix)[::-1]
  floor = EIGENVALUE_FLOOR * max(values[0], 0)
  return np.where(values > floor, values, 0.0)


def symmetric_eigh(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Eigenvalues, ascending, and eigenvectors of symmetric matrices, checked.

  LAPACK may fail to converge, or return NaN without saying so, for one triangle
  and not for the other (jax-ml/jax#32641); singular vectors, which are the
  eigenvectors where no eigenvalue is negative, come from another algorithm.

  Args:
    matrix: (*groups, d, d) float64, symmetric up to rounding.

  Raises:
    FloatingPointError: no way gave finite numbers.
  """
  symmetric = (matrix + np.swapaxes(matrix, -1, -2)) / 2
  return _first_finite(
    'eigendecomposition',
    symmetric,
    lambda: np.linalg.eigh(symmetric, 'L'),
    lambda: np.linalg.eigh(symmetric, 'U'),
    lambda: _eigh_by_svd(symmetric),
  )


def svd(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Thin singular value decomposition of a float64 matrix, checked.

  Raises:
    FloatingPointError: neither the matrix nor its transpose gave finite
      numbers.
  """
  transposed = lambda u, sigma, v: (v.T, sigma, u.T)
  return _first_finite(
    'singular value decomposition',
    matrix,
    lambda: np.linalg.svd(matrix, full_matrices=False),
    lambda: transposed(*np.linalg.svd(matrix.T, full_matrices=False)),
  )


def solve_least(w: np.ndarray, y: np.ndarray) -> np.ndarray:
  """The smallest x of those for which w x is nearest to y.

  From the Gram matrix of w's smaller side, several times faster than an SVD of
  a long w; singular values below 1e-7 of the largest count as none.

  Args:
    w: (d, m), float64.
    y: (d, n), float64.

  Returns:
    x (m, n).
  """
  wide = w.shape[0] < w.shape[1]
  values, vectors = symmetric_eigh(w @ w.T if wide else w.T @ w)
  seen = values > 1e-14 * values[-1]
  inverse = lambda v: (
    vectors[:, seen] @ ((vectors[:, seen].T @ v) / values[seen, None])
  )
  return w.T @ inverse(y) if wide else inverse(w.T @ y)


def _eigh_by_svd(symmetric: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  vectors, _, _ = np.linalg.svd(symmetric)
  values = np.sum(vectors * (symmetric @ vectors), axis=-2)
  order = np.argsort(values, axis=-1)
  return (
    np.take_along_axis(values, order, -1),
    np.take_along_axis(vectors, order[..., None, :], -1),
  )


def _first_finite(what: str, matrix: np.ndarray, *ways: Callable[[], Any]):
  for way in ways:
    try:
      parts = way()
    except np.linalg.LinAlgError:
      continue
    if all(np.all(np.isfinite(part)) for part in parts):
      return parts
  raise FloatingPointError(
    f'no {what} of a {matrix.shape} matrix with numbers up to '
    f'{np.abs(matrix).max():.3g} converged'
  )

"""Eigendecompositions on the host.

Decompositions of the finished sums are done once per kernel, in float64 with
LAPACK: the small eigenvalues decide the ranks at 99.9 % energy, and the
accelerators' solvers are float32, slow to compile at these sizes and known to
return NaN in silence (jax-ml/jax#1628, #32641).
"""

from __future__ import annotations

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
  symmetric = (matrix + np.swapaxes(matrix, -1, -2)) / 2
  values, vectors = np.linalg.eigh(symmetric)
  values, vectors = values[..., ::-1], vectors[..., ::-1]
  floor = EIGENVALUE_FLOOR * np.maximum(values[..., :1], 0)
  return np.where(values > floor, values, 0.0), vectors

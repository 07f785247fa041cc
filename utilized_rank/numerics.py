"""Gram matrices on the device, eigendecompositions on the host.

Sums over data are taken in float32 (float64 where the data is) at the highest
matmul precision, whatever the activations' dtype: a bfloat16 sum stops growing
after a few hundred additions, and a TPU multiplies float32 in bfloat16 passes
unless told otherwise.

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

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np

from utilized_rank import compat

# Eigenvalues below this share of the largest are rounding of a float32 sum.
EIGENVALUE_FLOOR = float(np.finfo(np.float32).eps)


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
  second = jnp.einsum(
    '...nd,...ne->...de',
    x,
    x,
    precision=jax.lax.Precision.HIGHEST,
    preferred_element_type=dtype,
  )
  return jnp.sum(x, axis=-2, dtype=dtype), second


def sharded_gram(
  features: Callable[[jax.Array], jax.Array], x: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """`gram(features(x))`, the sums replicated where types carry shardings.

  With `AxisType.Explicit` meshes JAX refuses to sum over a sharded axis unless
  it is told how the result is sharded. No derivative goes through the sums.
  """
  x = jax.lax.stop_gradient(x)
  if not compat.has_explicit_axes(x):
    return gram(features(x))
  sums = lambda x: gram(features(x))
  return jax.sharding.auto_axes(sums, out_sharding=PartitionSpec())(x)


def accumulator_dtype(dtype: Any) -> Any:
  """float64 for float64, float32 for everything else."""
  return (
    jnp.promote_types(jnp.float32, dtype)
    if jnp.issubdtype(dtype, jnp.floating)
    else jnp.float32
  )


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

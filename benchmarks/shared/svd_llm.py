"""SVD-LLM's factors, written from the paper; shares no code with ours.

X. Wang, Y. Zheng, Z. Wan, M. Zhang, "SVD-LLM: Truncation-aware Singular Value
Decomposition for Large Language Model Compression", arXiv 2403.07378. Rows are
inputs here, y = x W, where the paper has columns.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class Whitening(NamedTuple):
  """S = L L^T + what was added to its diagonal, which is 0 or a little."""

  factor: np.ndarray
  jitter: float


def whitening(second: np.ndarray) -> Whitening:
  """L of the sum of x x^T, (d, d), by Cholesky in float64.

  Where S is not positive definite, as with fewer rows than features, it has no
  such factor: the paper's code adds what the least eigenvalue lacks and 1e-6.
  """
  s = np.asarray(second, np.float64)
  try:
    return Whitening(np.linalg.cholesky(s), 0.0)
  except np.linalg.LinAlgError:
    jitter = float(1e-6 - np.linalg.eigvalsh(s)[0])
  while True:
    try:
      factor = np.linalg.cholesky(s + jitter * np.eye(len(s)))
      return Whitening(factor, jitter)
    except np.linalg.LinAlgError:  # 1e-6 is below the rounding of large sums
      jitter *= 10


def factors(
  w: np.ndarray, white: Whitening, rank: int, dtype: Any = np.float64
) -> tuple[np.ndarray, np.ndarray]:
  """A (d, r) and B (r, m) by the SVD of L^T W, the singular values in both.

  Args:
    w: (d, m).
    white: of the sums of its inputs.
    rank: r.
    dtype: of the SVD and of what follows; the paper's code has float32.
  """
  root = white.factor.T.astype(dtype)
  u, s, v = np.linalg.svd(root @ np.asarray(w, dtype), full_matrices=False)
  half = np.sqrt(s[:rank])
  return np.linalg.solve(root, u[:, :rank] * half), half[:, None] * v[:rank]


def error(w: Any, other: Any, second: Any) -> float:
  """tr((W - W')^T S (W - W')): the squared error at the outputs, summed."""
  rest = np.asarray(w, np.float64) - np.asarray(other, np.float64)
  return float(np.sum(rest * (np.asarray(second, np.float64) @ rest)))

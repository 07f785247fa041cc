"""Slow, obvious float64 numpy twins of what the library computes.

They share no code with it, on purpose.
"""

import numpy as np


def second_moment(rows):
  """Mean of the outer products of rows (n, d), one row at a time."""
  total = np.zeros((rows.shape[1], rows.shape[1]))
  for row in np.asarray(rows, np.float64):
    total += np.outer(row, row)
  return total / len(rows)


def rank_at(matrix, energy):
  """Smallest number of eigenvalues that hold `energy` of their sum."""
  values = sorted(np.linalg.eigvalsh(matrix), reverse=True)
  total, kept = sum(values), 0.0
  for k, value in enumerate(values, 1):
    kept += value
    if kept >= energy * total:
      return k
  return len(values)


def projector(matrix, rank):
  """Orthogonal projector on the leading eigenvectors."""
  _, vectors = np.linalg.eigh(matrix)
  lead = vectors[:, vectors.shape[1] - rank :]
  return lead @ lead.T


def squared_error(x, w, approximation, constant=0.0):
  """Mean over rows of |x W - x W' - c|^2, from the rows themselves."""
  residual = x @ w - x @ approximation - constant
  return np.mean(np.sum(residual**2, axis=1))


def row_fisher(x, g):
  """sum_j E[(dL/dW_ij)^2]: inputs (B, T, d), output gradients (B, T, m)."""
  total = np.zeros(x.shape[2])
  for rows, grads in zip(np.asarray(x, np.float64), np.asarray(g, np.float64)):
    gradient = sum(np.outer(a, b) for a, b in zip(rows, grads))
    total += np.sum(gradient**2, axis=1)
  return total / len(x)


def weighted_rows(w, weights, rank):
  """Rank-r W' that minimises sum_i weights_i |w_i - w'_i|^2.

  By the eigenvectors of W^T diag(weights) W: no singular values, no division.
  """
  return w @ projector(w.T @ (weights[:, None] * w), rank)


def whitened(w, s, rank):
  """Rank-r W' of least tr((W - W')^T S (W - W')): SVD-LLM's Cholesky form."""
  root = np.linalg.cholesky(s).T
  u, sigma, v = np.linalg.svd(root @ w)
  return np.linalg.solve(root, (u[:, :rank] * sigma[:rank]) @ v[:rank])


def correlated_rows(rng, n, d, decay=0.8, mean=0.0):
  """Rows with a geometric spectrum, a random basis and a mean."""
  basis, _ = np.linalg.qr(rng.normal(size=(d, d)))
  scale = decay ** np.arange(d)
  return (rng.normal(size=(n, d)) * scale) @ basis + mean

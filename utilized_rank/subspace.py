"""The subspaces where data and weights interact, in the paper's notation.

Garg, Koguchi, Verma, Ulbricht, *Revealing the Utilized Rank of Subspaces of
Learning in Neural Networks*, https://arxiv.org/abs/2407.04797.

A kernel is W (d, m); its inputs are rows x; S (d, d) is their second moment,
T = W^T S W (m, m) that of its outputs (without bias). Everything here is
float64 numpy on one matrix.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from utilized_rank import numerics

# Directions without data are given this share of the trace of S,
# so that among factors equal on the data the one closest to W is taken, and a
# full-rank factorization gives W back. It moves no error by more than that
# share of the trace.
_FLOOR = 1e-9


class Basis(NamedTuple):
  """Eigenvalues, descending, and the eigenvectors in columns."""

  values: np.ndarray
  vectors: np.ndarray


class Factors(NamedTuple):
  """W' = a b, with a (d, r) and b (r, m)."""

  a: np.ndarray
  b: np.ndarray


def energy(values: np.ndarray) -> np.ndarray:
  """Share of the spectrum in its first k values, for k = 1 ... d.

  >>> energy(np.array([3.0, 1.0])).tolist()
  [0.75, 1.0]
  """
  total = values.sum()
  return np.cumsum(values) / total if total > 0 else np.zeros(len(values))


def energy_rank(values: np.ndarray, share: float) -> int:
  """Smallest k whose first k eigenvalues hold `share` of the spectrum.

  0 for a spectrum of zeros (an input that is never anything but zero).

  >>> energy_rank(np.array([3.0, 0.9, 0.1]), 0.95)
  2
  """
  if not values.sum() > 0:
    return 0
  # Nearer to 1 than this, float32 sums do not resolve the energy.
  share = min(share, 1 - numerics.EIGENVALUE_FLOOR)
  return int(np.argmax(energy(values) >= share)) + 1


def input_basis(s: np.ndarray) -> Basis:
  """Eigenbasis of S."""
  return Basis(*numerics.eigh(s))


def output_basis(w: np.ndarray, s: np.ndarray, of_s: Basis | None) -> Basis:
  """Leading eigenbasis of T = W^T S W, min(d, m) directions of it.

  Works on the smaller side: T itself where m <= d, else the singular vectors
  of S^(1/2) W, for which `of_s`, the eigenbasis of S, is used.

  Returns:
    values (min(d, m),) and vectors (m, min(d, m)), orthonormal columns.
  """
  d, m = w.shape
  # A moment of zeros still needs a positive floor: then W alone decides.
  floor = _FLOOR * (np.trace(s) or 1.0)
  if m <= d:
    t = w.T @ (s @ w)
    _, vectors = np.linalg.eigh((t + t.T) / 2 + floor * (w.T @ w))
    vectors = vectors[:, ::-1]
    values = np.sum(vectors * (t @ vectors), axis=0)
  else:
    basis = input_basis(s) if of_s is None else of_s
    turned = basis.vectors.T @ w
    root = np.sqrt(np.maximum(basis.values, floor))
    _, _, right = np.linalg.svd(root[:, None] * turned, full_matrices=False)
    vectors = right.T
    values = basis.values @ (turned @ vectors) ** 2
  # The floor chose the directions; the values are the data's own.
  return Basis(np.maximum(values, 0), vectors)


def measured_output_basis(w: np.ndarray, t: np.ndarray) -> Basis:
  """As `output_basis`, from a T (m, m) that was measured itself."""
  # Outputs lie in the row space of W; there, W decides where no data does.
  rows, _ = np.linalg.qr(w.T)
  inner, turned = rows.T @ t @ rows, w @ rows
  floor = _FLOOR * (np.trace(t) or 1.0) / (np.sum(w * w) or 1.0)
  _, vectors = np.linalg.eigh((inner + inner.T) / 2 + floor * turned.T @ turned)
  vectors = rows @ vectors[:, ::-1]
  values = np.sum(vectors * (t @ vectors), axis=0)
  return Basis(np.maximum(values, 0), vectors)


def project(w: np.ndarray, v: np.ndarray, u: np.ndarray) -> np.ndarray:
  """The paper's W' = P_S W P_T; v (d, k_S) and u (m, k_T) span the two."""
  return v @ (v.T @ w @ u) @ u.T


def utilized_factors(w: np.ndarray, v: np.ndarray, u: np.ndarray) -> Factors:
  """W' = P_S W P_T as a pair of rank min(k_S, k_T), with no SVD."""
  core = v.T @ w @ u
  if u.shape[1] <= v.shape[1]:
    return Factors(v @ core, u.T)
  return Factors(v, core @ u.T)


def output_factors(w: np.ndarray, u: np.ndarray) -> Factors:
  """W U U^T: the least output error of any W' of each rank.

  `u` is (m, R), the vectors of `output_basis`. Truncate to any rank. DRONE
  (Chen et al., NeurIPS 2021), SVD-LLM, AFM and BALF reach the same optimum by
  other decompositions. The error left is the sum of the discarded eigenvalues.
  """
  return Factors(w @ u, u.T)


def weight_factors(w: np.ndarray) -> Factors:
  """SVD of W, blind to data: the baseline. Truncate to any rank."""
  left, sigma, right = np.linalg.svd(w, full_matrices=False)
  return Factors(left * sigma, right)


def scaled_factors(w: np.ndarray, scale: np.ndarray) -> Factors:
  """SVD of D W with D = diag(scale), mapped back: activation-scaled SVD.

  `scale` (d,) is the root mean square of each input feature, as in the RMS
  variant of ASVD (Yuan et al., 2023). Truncate to any rank.
  """
  # A feature that is never on keeps a small weight, so that D is invertible.
  scale = np.maximum(scale, 1e-6 * (scale.max() or 1.0))
  left, sigma, right = np.linalg.svd(scale[:, None] * w, full_matrices=False)
  return Factors((left * sigma) / scale[:, None], right)


def loss_factors(
  w: np.ndarray,
  s: np.ndarray,
  g: np.ndarray,
  damping: float,
  of_s: Basis | None,
) -> Factors:
  """The W' of each rank that minimises tr((W - W')^T S (W - W') G).

  G (m, m) is the second moment of the loss's gradient at the outputs, with
  `damping` times the mean of its diagonal added. With G = R R^T the optimum is
  W R U U^T R^-1, U the eigenvectors of R^T W^T S W R: a Kronecker-factored
  Fisher (GFWSVD; IO-SVD). Truncate to any rank.
  """
  m = len(g)
  damped = g + (damping * np.trace(g) / m or 1.0) * np.eye(m)
  values, vectors = np.linalg.eigh((damped + damped.T) / 2)
  root = np.sqrt(np.maximum(values, np.finfo(np.float64).eps * values[-1]))
  turned = (w @ vectors) * root
  basis = output_basis(turned, s, of_s)
  return Factors(
    turned @ basis.vectors, (basis.vectors / root[:, None]).T @ vectors.T
  )


def balanced(factors: Factors) -> Factors:
  """The same product with a^T a = b b^T = diag(sigma).

  Neither factor then has the other's scale: what trains the pair with one
  learning rate, and rounds it in low precision, treats both alike.
  """
  q_a, r_a = np.linalg.qr(factors.a)
  q_b, r_b = np.linalg.qr(factors.b.T)
  left, sigma, right = np.linalg.svd(r_a @ r_b.T)
  root = np.sqrt(sigma)
  return Factors(q_a @ (left * root), (root[:, None] * right) @ q_b.T)


def tails(factors: Factors, s: np.ndarray, g: np.ndarray | None) -> np.ndarray:
  """tr(D^T S D G) for D = what each truncation leaves out; G = I if None.

  Returns:
    (R + 1,): entry r is the error of rank r, that of rank R being 0.
  """
  cross = factors.a.T @ s @ factors.a
  right = factors.b if g is None else factors.b @ g
  pairs = cross * (right @ factors.b.T)
  # Sum of pairs[r:, r:], for every r.
  tail = np.cumsum(np.cumsum(pairs[::-1, ::-1], axis=0), axis=1)
  tail = np.diagonal(tail)[::-1]
  return np.append(np.maximum(tail, 0.0), 0.0)


def output_error(difference: np.ndarray, s: np.ndarray) -> float:
  """E|x D|^2 = tr(D^T S D) for D = W - W'."""
  return float(np.sum(difference * (s @ difference)))

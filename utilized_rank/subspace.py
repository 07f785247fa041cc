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
  """W U U^T: the least output error of any W' of this rank.

  `u` is (m, r), the leading part of `output_basis`. DRONE (Chen et al.,
  NeurIPS 2021), SVD-LLM, AFM and BALF reach the same optimum by other
  decompositions. The error left is the sum of the discarded eigenvalues.
  """
  return Factors(w @ u, u.T)


def weight_factors(w: np.ndarray, rank: int) -> Factors:
  """Truncated SVD of W, blind to data: the baseline."""
  left, sigma, right = np.linalg.svd(w, full_matrices=False)
  return Factors(left[:, :rank] * sigma[:rank], right[:rank])


def output_error(difference: np.ndarray, s: np.ndarray) -> float:
  """E|x D|^2 = tr(D^T S D) for D = W - W'."""
  return float(np.sum(difference * (s @ difference)))

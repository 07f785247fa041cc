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

from utilized_rank.linalg import eigh

# Directions without data are given this share of the trace of S,
# so that among factors equal on the data the one closest to W is taken, and a
# full-rank factorization gives W back. It moves no error by more than that
# share of the trace.
_FLOOR = 1e-9


class Basis(NamedTuple):
  """Eigenvalues, descending, and the eigenvectors in columns."""

  values: np.ndarray
  vectors: np.ndarray


def energy(values: np.ndarray) -> np.ndarray:
  """Share of the spectrum in its first k values, for k = 1 ... d.

  >>> energy(np.array([3.0, 1.0])).tolist()
  [0.75, 1.0]
  """
  total = values.sum()
  return np.cumsum(values) / total if total > 0 else np.zeros(len(values))


def check_energy(energy: float) -> float:
  """Raises ValueError unless `energy` is in (0, 1]."""
  if not 0 < energy <= 1:
    raise ValueError(f'energy is a share in (0, 1], got {energy!r}')
  return energy


def energy_rank(values: np.ndarray, share: float) -> int:
  """Smallest k whose first k eigenvalues hold `share` of the spectrum.

  0 for a spectrum of zeros (an input that is never anything but zero).

  >>> energy_rank(np.array([3.0, 0.9, 0.1]), 0.95)
  2
  """
  if not values.sum() > 0:
    return 0
  # Nearer to 1 than this, float32 sums do not resolve the energy.
  share = min(share, 1 - eigh.EIGENVALUE_FLOOR)
  return int(np.argmax(energy(values) >= share)) + 1


def input_basis(s: np.ndarray) -> Basis:
  """Eigenbasis of S."""
  return Basis(*eigh.eigh(s))


def output_basis(
  w: np.ndarray,
  s: np.ndarray,
  of_s: Basis | None,
  t: np.ndarray | None = None,
  most: int | None = None,
) -> Basis:
  """Leading eigenbasis of T = W^T S W, min(d, m) directions of it.

  Works on the smaller side: T itself where m <= d, else the singular vectors
  of S^(1/2) W, for which `of_s`, the eigenbasis of S, is used. `t` is T where
  it is known already.

  Returns:
    values (min(d, m),) and vectors (m, min(d, m)), orthonormal columns; no
    more than the first `most` of the vectors. Of a T that is rounding in some
    directions the values there are T's own, below zero too: they add up to
    its trace.
  """
  d, m = w.shape
  floor = floor_of(np.trace(s))
  if m <= d:
    t = w.T @ (s @ w) if t is None else t
    return _basis_of_outputs(t, w, floor, most)
  basis = input_basis(s) if of_s is None else of_s
  turned = basis.vectors.T @ w
  root = np.sqrt(np.maximum(basis.values, floor))
  _, _, right = eigh.svd(root[:, None] * turned)
  vectors = right.T
  # The floor chose the directions; the values are the data's own.
  values = basis.values @ (turned @ vectors) ** 2
  return Basis(values, vectors[:, :most])


def measured_output_basis(
  w: np.ndarray, t: np.ndarray, most: int | None = None
) -> Basis:
  """As `output_basis`, from a T (m, m) that was measured itself."""
  # Where no data does, W decides.
  floor = floor_of(np.trace(t)) / (np.sum(w * w) or 1.0)
  d, m = w.shape
  if m <= d:
    return _basis_of_outputs(t, w, floor, most)
  rows, _ = np.linalg.qr(w.T)  # outputs lie in the row space of W
  found = _basis_of_outputs(rows.T @ t @ rows, w @ rows, floor, most)
  return Basis(found.values, rows @ found.vectors)


def _basis_of_outputs(
  t: np.ndarray, w: np.ndarray, floor: float, most: int | None
) -> Basis:
  """Eigenbasis of T; where no data does, floor W^T W chooses directions.

  It moves no eigenvalue by more than its own largest, which floor |W|^2 bounds:
  directions with more data than that are left as they are.
  """
  values, vectors = eigh.symmetric_eigh(t)
  values, vectors = values[::-1], vectors[:, ::-1]
  first = int(np.sum(values > floor * np.sum(w * w)))
  if first < (len(values) if most is None else most):
    turned = w @ vectors[:, first:]
    _, turn = eigh.symmetric_eigh(
      np.diag(np.maximum(values[first:], 0)) + floor * (turned.T @ turned)
    )
    turn = turn[:, ::-1]
    # The floor chose the directions; the values are the data's own.
    vectors = np.hstack([vectors[:, :first], vectors[:, first:] @ turn])
    values = np.append(values[:first], values[first:] @ turn**2)
  return Basis(values, vectors[:, :most])


def project(w: np.ndarray, v: np.ndarray, u: np.ndarray) -> np.ndarray:
  """The paper's W' = P_S W P_T; v (d, k_S) and u (m, k_T) span the two."""
  return v @ (v.T @ w @ u) @ u.T


def is_full(of_s: Basis) -> bool:
  """Whether data have every direction of S, so that no floor is needed."""
  return bool(np.all(of_s.values > floor_of(of_s.values.sum())))


def floor_of(trace: float) -> float:
  """See `_FLOOR`. A moment of zeros still needs one: then W alone decides."""
  return _FLOOR * (trace if trace > 0 else 1.0)


def projected_error(
  w: np.ndarray, of_s: Basis, k_s: int, u: np.ndarray
) -> float:
  """E|x (W - P_S W P_T)|^2; P_S of the first k_S directions, P_T of u (m, k_T).

  The directions of S that are kept lose what P_T leaves out, the others all
  they carry.
  """
  turned = of_s.vectors.T @ w
  energies = np.sum(turned**2, axis=1)
  kept = energies[:k_s] - np.sum((turned[:k_s] @ u) ** 2, axis=1)
  energies[:k_s] = np.maximum(kept, 0)
  return float(of_s.values @ energies)


def output_error(difference: np.ndarray, s: np.ndarray) -> float:
  """E|x D|^2 = tr(D^T S D) for D = W - W'."""
  return float(np.sum(difference * (s @ difference)))

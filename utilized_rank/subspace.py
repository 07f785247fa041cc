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
# Cosines below this are of orthogonal rows: factors are stored in float32,
# which is far coarser.
_ORTHOGONAL = 1e-11


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
    more than the first `most` of the vectors.
  """
  d, m = w.shape
  floor = _floor(np.trace(s))
  if m <= d:
    t = w.T @ (s @ w) if t is None else t
    return _basis_of_outputs(t, w, floor, most)
  basis = input_basis(s) if of_s is None else of_s
  turned = basis.vectors.T @ w
  root = np.sqrt(np.maximum(basis.values, floor))
  _, _, right = numerics.svd(root[:, None] * turned)
  vectors = right.T
  # The floor chose the directions; the values are the data's own.
  values = basis.values @ (turned @ vectors) ** 2
  return Basis(np.maximum(values, 0), vectors[:, :most])


def measured_output_basis(
  w: np.ndarray, t: np.ndarray, most: int | None = None
) -> Basis:
  """As `output_basis`, from a T (m, m) that was measured itself."""
  # Where no data does, W decides.
  floor = _FLOOR * (np.trace(t) or 1.0) / (np.sum(w * w) or 1.0)
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
  values, vectors = numerics.symmetric_eigh(t)
  values, vectors = np.maximum(values[::-1], 0), vectors[:, ::-1]
  first = int(np.sum(values > floor * np.sum(w * w)))
  if first < (len(values) if most is None else most):
    turned = w @ vectors[:, first:]
    _, turn = numerics.symmetric_eigh(
      np.diag(values[first:]) + floor * (turned.T @ turned)
    )
    turn = turn[:, ::-1]
    # The floor chose the directions; the values are the data's own.
    vectors = np.hstack([vectors[:, :first], vectors[:, first:] @ turn])
    values = np.append(values[:first], values[first:] @ turn**2)
  return Basis(values, vectors[:, :most])


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
  left, sigma, right = numerics.svd(w)
  return Factors(left * sigma, right)


def scaled_factors(w: np.ndarray, scale: np.ndarray) -> Factors:
  """SVD of D W with D = diag(scale), mapped back.

  `scale` (d,) is the root mean square of each input feature in the RMS
  variant of ASVD (Yuan et al., 2023), the root of the row's Fisher information
  in FWSVD (Hsu et al., 2022). Truncate to any rank.
  """
  # A feature that is never on keeps a small weight, so that D is invertible.
  scale = np.maximum(scale, 1e-6 * (scale.max() or 1.0))
  left, sigma, right = numerics.svd(scale[:, None] * w)
  return Factors((left * sigma) / scale[:, None], right)


def loss_factors(
  w: np.ndarray,
  s: np.ndarray,
  g: np.ndarray,
  damping: float,
  t: np.ndarray,
) -> tuple[Factors, np.ndarray]:
  """The W' of each rank that minimises tr((W - W')^T S (W - W') G).

  G (m, m) is the second moment of the loss's gradient at the outputs, with
  `damping` times the mean of its diagonal added. With G = R R^T the optimum is
  W R U U^T R^-1, U the eigenvectors of R^T W^T S W R: a Kronecker-factored
  Fisher (GFWSVD; IO-SVD). For d > m; truncate to any rank. `t` is T = W^T S W.

  Returns:
    The factors, and a^T S a of them, see `tails`.
  """
  shift = _damping(g, damping)
  values, vectors = numerics.symmetric_eigh(g + shift * np.eye(len(g)))
  root = np.sqrt(np.maximum(values, np.finfo(np.float64).eps * values[-1]))
  turned = (w @ vectors) * root
  t = root[:, None] * (vectors.T @ t @ vectors) * root
  u = output_basis(turned, s, None, t).vectors
  factors = Factors(turned @ u, (u / root[:, None]).T @ vectors.T)
  return factors, u.T @ t @ u


def input_side_factors(
  w: np.ndarray, of_s: Basis, g: np.ndarray | None, damping: float
) -> Factors:
  """The same optimum as `loss_factors` (`output_factors` where g is None),
  worked out on (d, d) matrices: for d <= m.

  S^(1/2) W R has the left singular vectors Q, the eigenvectors of
  S^(1/2) W G W^T S^(1/2), and W' = S^(-1/2) Q Q^T S^(1/2) W: no root of G is
  needed, and kernels that share an input share the eigenvectors of S. Where S
  `is_full`, a^T S a is the identity.
  """
  turned = of_s.vectors.T @ w
  inner = turned @ turned.T
  if g is not None:
    inner = (turned @ g) @ turned.T + _damping(g, damping) * inner
  root = np.sqrt(np.maximum(of_s.values, _floor(of_s.values.sum())))
  _, q = numerics.symmetric_eigh(root[:, None] * inner * root)
  q = q[:, ::-1]
  return Factors(
    of_s.vectors @ (q / root[:, None]), (q * root[:, None]).T @ turned
  )


def input_side_pair(
  w: np.ndarray, s: np.ndarray, rank: int
) -> tuple[Factors, float, float]:
  """`output_factors` of one rank, worked out on (d, d) matrices: for d < m.

  With S = F F^T and Q the eigenvectors of F^T W W^T F, W' = F^-T Q Q^T F^T W.

  Returns:
    The pair; its error E|x (W - W')|^2; and E|x W|^2.
  """
  root, floor = _root(s)
  values, q = numerics.symmetric_eigh(root.T @ (w @ w.T) @ root)
  values, q = np.maximum(values[::-1], 0), q[:, ::-1][:, :rank]
  a, b = np.linalg.solve(root.T, q), (root @ q).T @ w
  # W' = W P with an orthogonal P: |W - W'|^2 = |W|^2 - |W'|^2, and b b^T holds
  # the eigenvalues. What the floor added to S is no error on the data.
  size = np.sum(w * w)
  added = floor * (size - values[:rank] @ np.sum(a * a, axis=0))
  error = float(values[rank:].sum() - added)
  energy = float(values.sum() - floor * size)
  if error < np.finfo(np.float64).eps * len(values) * values.sum():
    error = 0.0
  return Factors(a, b), error, energy


def _root(s: np.ndarray) -> tuple[np.ndarray, float]:
  """F with F F^T = S + floor I, and the floor.

  By Cholesky, in a seventh of an eigendecomposition's time, unless rounding of
  float32 sums has left S with eigenvalues below minus the floor.
  """
  floor = _floor(np.trace(s))
  try:
    return np.linalg.cholesky(s + floor * np.eye(len(s))), floor
  except np.linalg.LinAlgError:
    values, vectors = numerics.eigh(s)
    return vectors * np.sqrt(values + floor), floor


def is_full(of_s: Basis) -> bool:
  """Whether data have every direction of S, so that no floor is needed."""
  return bool(np.all(of_s.values > _floor(of_s.values.sum())))


def _damping(g: np.ndarray, damping: float) -> float:
  """What is added to the diagonal of G; a G of zeros counts as the identity."""
  trace = float(np.trace(g))
  return damping * trace / len(g) if trace > 0 else 1.0


def _floor(trace: float) -> float:
  """See `_FLOOR`. A moment of zeros still needs one: then W alone decides."""
  return _FLOOR * (trace if trace > 0 else 1.0)


def balanced(factors: Factors) -> Factors:
  """The same product with a^T a = b b^T = diag(sigma).

  Neither factor then has the other's scale: what trains the pair with one
  learning rate, and rounds it in low precision, treats both alike. The Gram
  matrix of what stands before orthonormal rows tells sigma, several times
  faster than an SVD; of those below 1e-8 of the largest, which no float32
  holds, it tells no more than that. The product is the same whatever it tells.
  """
  left, q_b = _before_orthogonal_rows(factors)
  squares, turn = numerics.symmetric_eigh(left.T @ left)
  squares, turn = squares[::-1], turn[:, ::-1]
  least = np.finfo(np.float64).eps * len(turn) * max(squares[0], 0.0)
  root = np.maximum(squares, least) ** 0.25
  inverse = np.divide(1.0, root, out=np.zeros_like(root), where=root > 0)
  return Factors(left @ (turn * inverse), (turn * root).T @ q_b)


def _before_orthogonal_rows(factors: Factors) -> Factors:
  """The same product with orthonormal rows behind.

  Rows that are orthogonal already, as those of most methods are, need but
  their lengths, a fraction of a QR decomposition's time.
  """
  a, b = factors
  gram = b @ b.T
  lengths = np.sqrt(np.diagonal(gram))
  if np.all(lengths > 0):
    cosines = gram / np.outer(lengths, lengths)
    np.fill_diagonal(cosines, 0.0)
    if np.abs(cosines).max() < _ORTHOGONAL:
      return Factors(a * lengths, b / lengths[:, None])
  q, r = np.linalg.qr(b.T)
  return Factors(a @ r.T, q.T)


def tails(
  cross: np.ndarray, b: np.ndarray, *weights: np.ndarray | None
) -> list[np.ndarray]:
  """tr(D^T S D G) for D = what each truncation leaves out; G = I if None.

  Args:
    cross: a^T S a (R, R) of the factors, or its diagonal (R,) where it has
      nothing else.
    b: (R, m).
    *weights: each G (m, m).

  Returns:
    For each G (R + 1,): entry r is the error of rank r, that of rank R being 0.
  """
  found = []
  for g in weights:
    weighed = b if g is None else b @ g
    if cross.ndim == 1:
      tail = np.cumsum((cross * np.sum(weighed * b, axis=1))[::-1])[::-1]
    else:
      pairs = cross * (weighed @ b.T)
      # Sum of pairs[r:, r:], for every r.
      tail = np.cumsum(np.cumsum(pairs[::-1, ::-1], axis=0), axis=1)
      tail = np.diagonal(tail)[::-1]
    found.append(np.append(np.maximum(tail, 0.0), 0.0))
  return found


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

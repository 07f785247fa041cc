"""From the subspaces to pairs of factors, in the paper's notation."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from utilized_rank.linalg import eigh
from utilized_rank.linalg.subspace import Basis
from utilized_rank.linalg.subspace import floor_of
from utilized_rank.linalg.subspace import output_basis

# Cosines below this are of orthogonal rows: factors are stored in float32,
# which is far coarser.
_ORTHOGONAL = 1e-11


class Pair(NamedTuple):
  """W' = a b, with a (d, r) and b (r, m)."""

  a: np.ndarray
  b: np.ndarray


def utilized_factors(w: np.ndarray, v: np.ndarray, u: np.ndarray) -> Pair:
  """W' = P_S W P_T as a pair of rank min(k_S, k_T), with no SVD."""
  core = v.T @ w @ u
  if u.shape[1] <= v.shape[1]:
    return Pair(v @ core, u.T)
  return Pair(v, core @ u.T)


def output_factors(w: np.ndarray, u: np.ndarray) -> Pair:
  """W U U^T: the least output error of any W' of each rank.

  `u` is (m, R), the vectors of `output_basis`. Truncate to any rank. DRONE
  (Chen et al., NeurIPS 2021), SVD-LLM, AFM and BALF reach the same optimum by
  other decompositions. The error left is the sum of the discarded eigenvalues.
  """
  return Pair(w @ u, u.T)


def weight_factors(w: np.ndarray) -> Pair:
  """SVD of W, blind to data: the baseline. Truncate to any rank."""
  left, sigma, right = eigh.svd(w)
  return Pair(left * sigma, right)


def scaled_factors(w: np.ndarray, scale: np.ndarray) -> Pair:
  """SVD of D W with D = diag(scale), mapped back.

  `scale` (d,) is the root mean square of each input feature in the RMS
  variant of ASVD (Yuan et al., 2023), the root of the row's Fisher information
  in FWSVD (Hsu et al., 2022). Truncate to any rank.
  """
  # A feature that is never on keeps a small weight, so that D is invertible.
  scale = np.maximum(scale, 1e-6 * (scale.max() or 1.0))
  left, sigma, right = eigh.svd(scale[:, None] * w)
  return Pair((left * sigma) / scale[:, None], right)


def loss_factors(
  w: np.ndarray,
  s: np.ndarray,
  g: np.ndarray,
  damping: float,
  t: np.ndarray,
) -> tuple[Pair, np.ndarray]:
  """The W' of each rank that minimises tr((W - W')^T S (W - W') G).

  G (m, m) is the second moment of the loss's gradient at the outputs, with
  `damping` times the mean of its diagonal added. With G = R R^T the optimum is
  W R U U^T R^-1, U the eigenvectors of R^T W^T S W R: a Kronecker-factored
  Fisher (GFWSVD; IO-SVD). For d > m; truncate to any rank. `t` is T = W^T S W.

  Returns:
    The factors, and a^T S a of them, see `tails`.
  """
  shift = _damping(g, damping)
  values, vectors = eigh.symmetric_eigh(g + shift * np.eye(len(g)))
  root = np.sqrt(np.maximum(values, np.finfo(np.float64).eps * values[-1]))
  turned = (w @ vectors) * root
  t = root[:, None] * (vectors.T @ t @ vectors) * root
  u = output_basis(turned, s, None, t).vectors
  factors = Pair(turned @ u, (u / root[:, None]).T @ vectors.T)
  return factors, u.T @ t @ u


def input_side_factors(
  w: np.ndarray, of_s: Basis, g: np.ndarray | None, damping: float
) -> Pair:
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
  root = np.sqrt(np.maximum(of_s.values, floor_of(of_s.values.sum())))
  _, q = eigh.symmetric_eigh(root[:, None] * inner * root)
  q = q[:, ::-1]
  return Pair(
    of_s.vectors @ (q / root[:, None]), (q * root[:, None]).T @ turned
  )


def rooted_factors(
  w: np.ndarray, root: np.ndarray, g: np.ndarray | None, damping: float
) -> Pair:
  """`input_side_factors` for S = F F^T with an F that is inverted.

  Q are the eigenvectors of F^T W G W^T F, and W' = F^-T Q Q^T F^T W: where S
  shares its F with no other kernel, one decomposition less.
  """
  inner = w @ w.T
  if g is not None:
    inner = (w @ g) @ w.T + _damping(g, damping) * inner
  _, q = eigh.symmetric_eigh(root.T @ inner @ root)
  q = q[:, ::-1]
  return Pair(np.linalg.solve(root.T, q), (root @ q).T @ w)


def input_side_pair(
  w: np.ndarray, s: np.ndarray, rank: int
) -> tuple[Pair, float, float]:
  """`output_factors` of one rank, worked out on (d, d) matrices: for d < m.

  With S = F F^T and Q the eigenvectors of F^T W W^T F, W' = F^-T Q Q^T F^T W.

  Returns:
    The pair; its error E|x (W - W')|^2; and E|x W|^2.
  """
  root, added = _root(s)
  values, q = eigh.symmetric_eigh(root.T @ (w @ w.T) @ root)
  values, q = np.maximum(values[::-1], 0), q[:, ::-1][:, :rank]
  a, b = np.linalg.solve(root.T, q), (root @ q).T @ w
  # What F F^T has and S has not is no error on the data.
  error = values[rank:].sum() - added(w - a @ b)
  energy = values.sum() - added(w)
  least = np.finfo(np.float64).eps * len(values) * values.sum()
  error, energy = (float(v) if v > least else 0.0 for v in (error, energy))
  return Pair(a, b), error, energy


def reduced(w: np.ndarray, s: np.ndarray) -> np.ndarray:
  """A (d, d) matrix of the eigenvalues that T = W^T S W has: for d < m.

  F^T W W^T F of the F of `_root`; its floor moves none by more than 1e-9 of
  tr(S) |W|^2. Zeros where all of it is the floor's: no output has any data.
  """
  root, added = _root(s)
  t = root.T @ (w @ w.T) @ root
  total = float(np.trace(t))
  energy = total - added(w)
  return t if energy > np.finfo(np.float64).eps * len(t) * total else 0 * t


def _root(
  s: np.ndarray,
) -> tuple[np.ndarray, Callable[[np.ndarray], float]]:
  """F with F F^T = S + E for a small E, and tr(D^T E D) for any D.

  By Cholesky with E = floor I, in a seventh of an eigendecomposition's time,
  unless rounding of float32 sums has left S with eigenvalues below minus the
  floor. They, and all that such sums do not resolve, are then taken for zero.
  """
  # The trace, unless S is rounding alone.
  floor = floor_of(max(np.trace(s), np.abs(s).max()))
  try:
    root = np.linalg.cholesky(s + floor * np.eye(len(s)))
  except np.linalg.LinAlgError:
    values, vectors = eigh.eigh(s)
    own = np.sum(vectors * (s @ vectors), axis=0)
    more = values + floor - own
    return vectors * np.sqrt(values + floor), lambda difference: float(
      more @ np.sum((vectors.T @ difference) ** 2, axis=1)
    )
  return root, lambda difference: floor * float(np.sum(difference**2))


def _damping(g: np.ndarray, damping: float) -> float:
  """What is added to the diagonal of G; a G of zeros counts as the identity."""
  trace = float(np.trace(g))
  return damping * trace / len(g) if trace > 0 else 1.0


def balanced(factors: Pair) -> Pair:
  """The same product with a^T a = b b^T = diag(sigma).

  Neither factor then has the other's scale: what trains the pair with one
  learning rate, and rounds it in low precision, treats both alike. The Gram
  matrix of what stands before orthonormal rows tells sigma, several times
  faster than an SVD; of those below 1e-8 of the largest, which no float32
  holds, it tells no more than that. The product is the same whatever it tells.
  """
  left, q_b = _before_orthogonal_rows(factors)
  squares, turn = eigh.symmetric_eigh(left.T @ left)
  squares, turn = squares[::-1], turn[:, ::-1]
  least = np.finfo(np.float64).eps * len(turn) * max(squares[0], 0.0)
  root = np.maximum(squares, least) ** 0.25
  inverse = np.divide(1.0, root, out=np.zeros_like(root), where=root > 0)
  return Pair(left @ (turn * inverse), (turn * root).T @ q_b)


def _before_orthogonal_rows(factors: Pair) -> Pair:
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
      return Pair(a * lengths, b / lengths[:, None])
  q, r = np.linalg.qr(b.T)
  return Pair(a @ r.T, q.T)


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

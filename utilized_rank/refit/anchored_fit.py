"""A kernel that reads an already compressed network, fitted to the dense one.

Rows x are what the kernel reads in the dense network, xhat what it reads
behind compressed layers; H = E[xhat xhat^T], K = E[xhat x^T], about the means
or not. Of all W' of rank r the one that minimises

  E|(x W - xhat W') R|^2 + lam |(W - W') R|_F^2,  G = R R^T,

is, by completing the square with A = H + lam I and W* = A^-1 (K + lam I) W, the
one that minimises tr(R^T (W* - W')^T A (W* - W') R): a member of the family in
`subspace`, for another kernel and another moment. With xhat = x and lam = 0
they are W and S themselves, and as lam grows A tends to a multiple of I and W*
to W, so that the truncated SVD of W comes out.

The anchored regression is that of AA-SVD (arXiv 2604.02119, objective 4) with a
ridge towards W in place of one towards zero, and a two-sided metric.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from utilized_rank.linalg import best_pairs
from utilized_rank.linalg import eigh
from utilized_rank.linalg import subspace
from utilized_rank.linalg.best_pairs import Pair
from utilized_rank.linalg.overflow import not_finite
from utilized_rank.linalg.subspace import Basis
from utilized_rank.refit.readings import PairSums

# From this ridge on H + lam I is tried as it is: mostly it is regular whatever
# float32 sums have rounded off.
_REGULAR = 1e-3


class Inputs(NamedTuple):
  """Moments of what one matrix reads in the two networks.

  Attributes:
    h: H (d, d).
    k: K (d, d), its rows those of xhat.
    mean: E x (d,).
    mean_hat: E xhat (d,).
    basis: eigenbasis of H, if it is known; what is rounding of its sums is
      zero.
  """

  h: np.ndarray
  k: np.ndarray
  mean: np.ndarray
  mean_hat: np.ndarray
  basis: Basis | None = None


class Target(NamedTuple):
  """What a rank-r W' is to be near to, and in which metric.

  Attributes:
    w: W* (d, m), the best W' of any rank.
    metric: A = H + lam I (d, d).
    basis: eigenbasis of A; None where A is regular and has a root.
  """

  w: np.ndarray
  metric: np.ndarray
  basis: Basis | None


def inputs(
  sums: Sequence[tuple[PairSums, int]], centered: bool, path: str
) -> Inputs:
  """Moments of a matrix's inputs, about the means if it is centred.

  Args:
    sums: sums over the rows of each product that reads the matrix, and the
      matrix's place among their groups.
    centered: take H and K about the means.
    path: of a kernel that reads them.

  Raises:
    FloatingPointError: the sums are not finite.
  """
  of = lambda field: np.sum(
    [np.asarray(getattr(s, field)[g], np.float64) for s, g in sums], axis=0
  )
  n = max(sum(int(s.count) for s, _ in sums), 1)
  mean, mean_hat = of('total') / n, of('total_hat') / n
  h, k = of('second_hat') / n, of('cross') / n
  if not (np.all(np.isfinite(h)) and np.all(np.isfinite(k))):
    wrong = not_finite(np.append(mean, mean_hat))
    raise FloatingPointError(f'what {path!r} reads {wrong}')
  if centered:
    h = h - np.outer(mean_hat, mean_hat)
    k = k - np.outer(mean_hat, mean)
  return Inputs(h, k, mean, mean_hat)


def target(w: np.ndarray, of: Inputs, ridge: float) -> Target:
  """W* = (H + lam I)^-1 (K + lam I) W, with lam = ridge tr(H) / d.

  Args:
    w: (d, m).
    of: moments of its inputs.
    ridge: not negative. In directions without data W* is W, also at 0.
  """
  d = len(w)
  lam = ridge * np.trace(of.h) / d
  metric = of.h + lam * np.eye(d)
  if ridge >= _REGULAR and lam > 0 and _is_above(metric, lam / 2):
    # A fifth of an eigendecomposition's time.
    return Target(np.linalg.solve(metric, of.k @ w + lam * w), metric, None)
  values, vectors = of.basis or Basis(*eigh.eigh(of.h))
  turned = vectors.T @ w
  seen = values > 0
  fitted = vectors[:, seen].T @ (of.k @ w) + lam * turned[seen]
  turned[seen] = fitted / (values[seen] + lam)[:, None]
  return Target(vectors @ turned, metric, Basis(values + lam, vectors))


def _is_above(metric: np.ndarray, least: float) -> bool:
  """Whether all eigenvalues are.

  About large means, and of many features (lam is a share of the mean of them),
  rounding may leave H with eigenvalues below -lam.
  """
  try:
    np.linalg.cholesky(metric - least * np.eye(len(metric)))
  except np.linalg.LinAlgError:
    return False
  return True


def factors(of: Target, gradient: np.ndarray | None, damping: float) -> Pair:
  """The best W' of each rank. Truncate to any.

  Args:
    of: the target.
    gradient: G (m, m), damped as in `best_pairs.loss_factors`; None for I.
    damping: share of the mean of G's diagonal that is added to it.
  """
  d, m = of.w.shape
  if d <= m and of.basis is None:
    root = np.linalg.cholesky(of.metric)
    return best_pairs.rooted_factors(of.w, root, gradient, damping)
  if d <= m:
    assert of.basis is not None
    return best_pairs.input_side_factors(of.w, of.basis, gradient, damping)
  if gradient is not None:
    t = of.w.T @ of.metric @ of.w
    return best_pairs.loss_factors(of.w, of.metric, gradient, damping, t)[0]
  best = subspace.output_basis(of.w, of.metric, None)
  return best_pairs.output_factors(of.w, best.vectors)

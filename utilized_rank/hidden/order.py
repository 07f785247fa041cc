"""Hidden units in the order in which they are kept, and what all others cost.

h is what the second kernel W2 reads, C its second moment (about the mean, where
a bias can take what the mean loses), and A = W2 G W2^T: changing h by e costs
e A e^T. Units that go are read from those that stay, h_D ~ h_I M with
M = (C_II + lam I)^-1 C_ID, so what is left is R = C_DD - C_DI M, and it costs
tr(A_DD R). That is one Cholesky decomposition, read unit after unit; its
pivots are chosen so that each takes away the most of tr(A R).

A unit is one feature, or, behind a convolution, one for each place in the
window: they go together.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from utilized_rank.linalg import eigh

# lam, as a share of the mean of C's diagonal. Far below what few rows leave
# uncertain, and mostly far above the rounding of sums in float32.
RIDGE = 1e-6
# Features of the pivots between two updates of the whole matrices.
_PANEL = 64


class Refit(NamedTuple):
  """What the second kernel becomes.

  Attributes:
    kept: (k,) units, ascending.
    w: (d, m), W2 with zeros at the units that go.
    constant: (m,), what the means of those units gave to the output.
  """

  kept: np.ndarray
  w: np.ndarray
  constant: np.ndarray


def ridged(second: np.ndarray) -> tuple[np.ndarray, float]:
  """C + lam I, and lam."""
  scale = float(np.trace(second)) / len(second)
  ridge = RIDGE * max(scale, np.finfo(np.float64).tiny)
  return second + ridge * np.eye(len(second)), ridge


def resolved(second: np.ndarray) -> np.ndarray:
  """C without negative eigenvalues that lam does not make up for.

  Of features with large means, or one far above the others, float32 sums round
  off more than lam. What they do not resolve is then taken for zero.

  >>> resolved(np.diag([1.0, -1e-3])).tolist()
  [[1.0, 0.0], [0.0, 0.0]]
  """
  regular, ridge = ridged(second)
  try:
    np.linalg.cholesky(regular - ridge / 2 * np.eye(len(second)))
  except np.linalg.LinAlgError:
    values, vectors = eigh.eigh(second)
    return (vectors * values) @ vectors.T
  return second


def pivots(second: np.ndarray, cost: np.ndarray, size: int = 1) -> np.ndarray:
  """All units, each the one that takes away the most of tr(A R).

  The greedy choice is exact. Whole matrices are changed once for many pivots,
  and lose the rows of those, so that most of the work is matrix products.

  Args:
    second: C, (d, d), a unit's features side by side.
    cost: A, (d, d).
    size: features of a unit.

  Returns:
    (d / size,) units.

  >>> pivots(np.diag([1.0, 2.0, 4.0]), np.diag([9.0, 1.0, 1.0])).tolist()
  [0, 2, 1]
  """
  left = np.arange(len(second) // size)
  residual, _ = ridged(second)
  gain = residual @ cost @ residual
  order: list[int] = []
  while len(left):
    panel = _Panel(residual, gain, size)
    for _ in range(min(len(left), max(1, _PANEL // size))):
      order.append(int(left[panel.pick()]))
    residual, gain = panel.rest()
    left = left[panel.alive]
  return np.array(order, int)


class _Panel:
  """Some pivots, of which the whole matrices have not been told.

  R is `residual` - U U^T and R A R is `gain` - U V^T - V U^T, of which the
  blocks on the diagonal are kept up to date.
  """

  def __init__(self, residual: np.ndarray, gain: np.ndarray, size: int):
    self._residual, self._gain, self._size = residual, gain, size
    self._u = np.zeros((len(residual), 0))
    self._v = np.zeros((len(residual), 0))
    self._own = _diagonal(residual, size)
    self._gains = _diagonal(gain, size)
    self.alive = np.ones(len(self._own), bool)

  def pick(self) -> int:
    """The next pivot's place among the units that were left."""
    size = self._size
    gains = np.full(len(self._own), -np.inf)
    own, its = self._own[self.alive], self._gains[self.alive]
    its = its / own if size == 1 else np.linalg.solve(own, its)
    gains[self.alive] = np.trace(its, axis1=1, axis2=2)
    unit = int(np.argmax(gains))
    self.alive[unit] = False
    at = slice(unit * size, unit * size + size)
    u, v = self._u, self._v
    r = self._residual[:, at] - u @ u[at].T
    k = self._gain[:, at] - u @ v[at].T - v @ u[at].T
    whiten = np.linalg.inv(np.linalg.cholesky(r[at])).T
    r, k = r @ whiten, k @ whiten
    k = k - r @ (whiten.T @ k[at]) / 2
    self._u, self._v = np.hstack([u, r]), np.hstack([v, k])
    mine, its = r.reshape(-1, size, size), k.reshape(-1, size, size)
    both = mine @ its.transpose(0, 2, 1)
    self._own = self._own - mine @ mine.transpose(0, 2, 1)
    self._gains = self._gains - both - both.transpose(0, 2, 1)
    return unit

  def rest(self) -> tuple[np.ndarray, np.ndarray]:
    """R and R A R of the units that are left."""
    rows = np.repeat(self.alive, self._size)
    u, v = self._u[rows], self._v[rows]
    both = u @ v.T
    pick = np.ix_(rows, rows)
    return (
      self._residual[pick] - u @ u.T,
      self._gain[pick] - both - both.T,
    )


def _diagonal(matrix: np.ndarray, size: int) -> np.ndarray:
  """(d / size, size, size)."""
  n = len(matrix) // size
  blocks = matrix.reshape(n, size, n, size)
  return blocks[np.arange(n), :, np.arange(n)]


def damages(
  second: np.ndarray, cost: np.ndarray, order: np.ndarray, size: int = 1
) -> np.ndarray:
  """tr(A R) with the first k units of an order, for every k.

  Args:
    second: C, (d, d).
    cost: A, (d, d).
    order: (d / size,) units.
    size: features of a unit.

  Returns:
    (d / size + 1,), falling; 0 with all of them.

  >>> order = np.array([0, 1])
  >>> damages(np.eye(2), np.diag([3.0, 1.0]), order).round(5).tolist()
  [4.0, 1.0, 0.0]
  """
  rows = _features(order, size)
  pick = np.ix_(rows, rows)
  regular, ridge = ridged(second)
  lower = np.linalg.cholesky(regular[pick])
  taken = np.einsum('ij,ij->j', lower, cost[pick] @ lower)
  own = ridge * np.diagonal(cost)[rows]
  left = np.append(np.cumsum((taken - own)[::-1])[::-1], 0.0)[::size]
  return np.minimum.accumulate(np.maximum(left, 0.0))


def _features(units: np.ndarray, size: int) -> np.ndarray:
  return (units[:, None] * size + np.arange(size)).ravel()


def refit(
  second: np.ndarray, mean: np.ndarray, w: np.ndarray, kept: np.ndarray, size=1
) -> Refit:
  """W2 for the units that stay, so that they stand for the others too.

  Args:
    second: C, (d, d), about the mean or not.
    mean: (d,), what C is about; zeros if it is not.
    w: W2, (d, m).
    kept: units that stay.
    size: features of a unit.
  """
  kept = np.sort(kept)
  gone = np.setdiff1d(np.arange(len(w) // size), kept)
  stay, go = _features(kept, size), _features(gone, size)
  regular, _ = ridged(second)
  read = np.linalg.solve(regular[np.ix_(stay, stay)], second[np.ix_(stay, go)])
  new = np.zeros_like(w)
  new[stay] = w[stay] + read @ w[go]
  constant = (mean[go] - mean[stay] @ read) @ w[go]
  return Refit(kept, new, constant)

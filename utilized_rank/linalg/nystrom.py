"""What a second moment is taken for of which there is a sketch.

With Y = C Omega, the Nystrom approximation is C^ = Y (Omega^T Y)^+ Y^T: of all
that is known, the largest that C is certain to have. Nothing in it exceeds C
(C - C^ is positive semidefinite), and C^ = C where C has a rank of no more than
l. The diagonal of C is summed too, so that what C^ leaves out has a trace that
is known: delta = tr C - tr C^. No direction, and no sum of directions, has more
than delta beside what C^ says; that is the bound on every error here, from the
data themselves, with no constant and no probability in it.

In computing, delta is spread evenly over the directions that C^ knows nothing
of. The trace is then that of C, and none of them is thought to be without data.

Sources: Gittens and Mahoney, JMLR 2016; Tropp, Yurtsever, Udell and Cevher,
*Fixed-rank approximation of a positive-semidefinite matrix from streaming
data*, NeurIPS 2017, https://arxiv.org/abs/1706.05736.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from utilized_rank.linalg import eigh
from utilized_rank.linalg import subspace
from utilized_rank.linalg.sketch import signs


@dataclasses.dataclass(frozen=True)
class Nystrom:
  """S, as far as a sketch knows it, in float64.

  Attributes:
    values: eigenvalues of the approximation, (k,), descending, k <= l.
    vectors: their eigenvectors, (d, k).
    trace: that of S itself.
  """

  values: np.ndarray
  vectors: np.ndarray
  trace: float

  @property
  def unseen(self) -> float:
    """delta, the trace of what the approximation leaves out of S."""
    return max(self.trace - float(self.values.sum()), 0.0)

  @property
  def rest(self) -> float:
    """The eigenvalue that every other direction is given."""
    d, k = self.vectors.shape
    return self.unseen / (d - k) if d > k else 0.0

  def times(self, w: np.ndarray) -> np.ndarray:
    """S w (d, m), without a (d, d) matrix."""
    known = (self.values - self.rest)[:, None] * (self.vectors.T @ w)
    return self.vectors @ known + self.rest * w

  def matrix(self) -> np.ndarray:
    """S (d, d)."""
    root = self.vectors * (self.values - self.rest)
    matrix = root @ self.vectors.T
    matrix.flat[:: len(matrix) + 1] += self.rest
    return matrix

  def basis(self) -> subspace.Basis:
    """Eigenbasis of S, all d directions of it."""
    d, k = self.vectors.shape
    if not k:
      return subspace.Basis(np.full(d, self.rest), np.eye(d))
    others = np.linalg.qr(self.vectors, mode='complete')[0][:, k:]
    values = np.append(self.values, np.full(d - k, self.rest))
    vectors = np.hstack([self.vectors, others])
    if self.values[-1] >= self.rest:
      return subspace.Basis(values, vectors)
    order = np.argsort(-values, kind='stable')
    return subspace.Basis(values[order], vectors[:, order])

  def energy_ranks(self, share: float) -> tuple[int, int]:
    """(least, most) that k_S can be at this energy; S itself has it between.

    The first k eigenvalues of S hold no less than those of the approximation,
    and no more than delta beside them. Behind them the k-th best of the other
    directions have at least their average.
    """
    d, k = self.vectors.shape
    if not self.trace > 0:
      return 0, 0
    share = min(share, 1 - eigh.EIGENVALUE_FLOOR)
    known = np.cumsum(np.append(self.values, np.full(d - k, self.rest)))
    reached = lambda sums: int(np.searchsorted(sums, share * self.trace)) + 1
    above = np.cumsum(self.values) + self.unseen
    least = max(1, min(reached(above), d))
    return least, max(least, min(reached(known), d))


def nystrom(
  sketch: np.ndarray, count: int, mean: np.ndarray | None = None
) -> Nystrom:
  """S = C / n, or about a mean, of a sketch of C.

  Args:
    sketch: `Sketch.sums` of one matrix, (d, l + 1).
    count: n.
    mean: mu (d,), for the spectrum about it: (C - n mu mu^T) Omega is known
      as C Omega is, so that this is a sketch as good.
  """
  sketch = np.asarray(sketch, np.float64) / count
  y, diagonal = sketch[:, :-1], sketch[:, -1]
  d, columns = y.shape
  omega = signs(d, columns)
  if mean is not None:
    y = y - np.outer(mean, mean @ omega)
    diagonal = diagonal - mean**2
  trace = max(float(diagonal.sum()), 0.0)
  values, q = eigh.symmetric_eigh(omega.T @ y)
  # Directions of Omega that float32 sums do not resolve are left unseen.
  kept = values > 10 * columns * eigh.EIGENVALUE_FLOOR * abs(values).max()
  root = y @ (q[:, kept] / np.sqrt(values[kept]))
  vectors, sigma, _ = np.linalg.svd(root, full_matrices=False)
  return Nystrom(sigma**2, vectors, trace)

"""What was measured of one layer."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import functools

import numpy as np

from utilized_rank.factorization.kernels import member_name


@dataclasses.dataclass(frozen=True)
class LayerReport:
  """Utilization of one kernel, or of one member of a stack of kernels.

  Attributes:
    path: path of the leaf in the parameter tree, keys joined by `/`.
    index: place in the leaf's group axes (scan steps, experts); `()` for a
      leaf that holds one kernel.
    d_in: input features of the kernel seen as a matrix (d).
    d_out: output features of the kernel seen as a matrix (m).
    count: rows (samples x positions) that the moments were taken over.
    energy: share of the spectrum that `k_in` and `k_out` keep.
    k_in: k_S, directions of the input moment S that hold `energy`; None of a
      kernel that was measured from the output side, whose S is not known.
    k_out: k_T, directions of the output moment T that hold `energy`.
    spectrum_in: eigenvalues of S, shape (d_in,), descending; (0,) if S is not
      known.
    spectrum_out: eigenvalues of T, shape (d_out,), descending.
    projected: `error_projected`, or what makes it.
    error_bound: the same share for the best factor pair of the same rank.
    number: in which pass over the batches it was measured, from 0.
    columns: of the sketch that S was measured by; 0 if it was measured whole.
      k_in is then the most that k_S can be; all else that is of S or T is what
      the sketch takes them for, `nystrom`.
    k_in_least: the least that k_S can be; None without a sketch.
    unseen: share of tr S that the sketch does not see; no directions hold more
      than that beside what is said here. 0 without a sketch.
    dependence: how far a row's input and its gradient are from independent,
      in [0, 1], which the method 'loss' takes them for and 'coupled' does not;
      None without moments of both together (`collect(coupled=True)`).
  """

  path: str
  index: tuple[int, ...]
  d_in: int
  d_out: int
  count: int
  energy: float
  k_in: int | None
  k_out: int
  spectrum_in: np.ndarray
  spectrum_out: np.ndarray
  projected: Callable[[], float | None] | float | None
  error_bound: float
  number: int = 0
  columns: int = 0
  k_in_least: int | None = None
  unseen: float = 0.0
  dependence: float | None = None

  @functools.cached_property
  def error_projected(self) -> float | None:
    """Share of the output energy that the paper's W' = P_S W P_T loses,
    E|x(W - W')|^2 / E|xW|^2; None if S is not known. It needs the eigenvectors
    of S and T, which take longer than all else here: made when asked for."""
    return self.projected() if callable(self.projected) else self.projected

  @property
  def side(self) -> str:
    """'input', 'output' or 'sketch': what was measured."""
    if self.k_in is None:
      return 'output'
    return 'sketch' if self.columns else 'input'

  @property
  def name(self) -> str:
    """Path, with the place in the stack in brackets where there is one."""
    return member_name(self.path, self.index)

  @property
  def rank(self) -> int:
    """r = min(k_S, k_T), the utilized rank; without k_S no less than it."""
    return utilized(self.k_in, self.k_out)

  @property
  def full_rank(self) -> int:
    return min(self.d_in, self.d_out)

  @property
  def rows_per_feature(self) -> float:
    """N over the features that were measured; below 4 moments are noisy."""
    return self.count / (self.d_out if self.k_in is None else self.d_in)

  @property
  def utilization(self) -> float:
    """r / min(d, m), in [0, 1]."""
    return self.rank / self.full_rank


def utilized(k_in: int | None, k_out: int) -> int:
  """r = min(k_S, k_T); k_T where k_S is not known."""
  return k_out if k_in is None else min(k_in, k_out)

"""Eigenbases of kernels' inputs, made once and when called for."""

from __future__ import annotations

from collections.abc import Callable
import threading

import numpy as np

from utilized_rank.linalg import eigh
from utilized_rank.linalg import subspace
from utilized_rank.linalg.nystrom import Nystrom


class InputBasis:
  """The eigenbasis of a moment, made when first called for, by one thread.

  Attributes:
    mean: mu (d,).
    second: makes S (d, d).
    sketched: makes what S is taken for, where there is a sketch of it.
  """

  def __init__(
    self,
    mean: np.ndarray,
    second: Callable[[], np.ndarray],
    sketched: Callable[[], Nystrom] | None = None,
  ):
    self.mean, self.second, self._lock = mean, second, threading.Lock()
    self.sketched = sketched
    self._basis: subspace.Basis | None = None
    self._values: np.ndarray | None = None

  def values(self) -> np.ndarray:
    """The eigenvalues alone, in a third of the time of the vectors."""
    if self.sketched is not None:
      return self().values
    with self._lock:
      if self._basis is not None:
        return self._basis.values
      if self._values is None:
        self._values = eigh.spectrum(self.second())
      return self._values

  def __call__(self) -> subspace.Basis:
    with self._lock:
      if self._basis is None:
        self._basis = (
          subspace.input_basis(self.second())
          if self.sketched is None
          else self.sketched().basis()
        )
      return self._basis

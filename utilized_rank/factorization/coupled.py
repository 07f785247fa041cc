"""Rows whose input and gradient belong together.

What a change D of a kernel costs is tr of D^T x x^T D g g^T over rows: of
F = E[x x^T (x) g g^T], which the method 'loss' takes for S (x) G, as if a row's
x said nothing of its g. One step of power iteration from there towards the
nearest Kronecker product gives E[|g|^2 x x^T] and E[|x|^2 g g^T], the partial
traces of F, which know more of it.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from utilized_rank.factorization.input_basis import InputBasis
from utilized_rank.factorization.kernels import Kernel
from utilized_rank.factorization.kernels import Weighed


def coupled(kernel: Kernel) -> Kernel:
  """A kernel with F's partial traces in place of S and G.

  G is divided by F's trace, so that their Kronecker product has it. Where S is
  centred, x is taken about its mean mu, which a constant gives back:
  E[|g|^2 (x - mu) (x - mu)^T].

  Raises:
    ValueError: the moments have no such sums.
  """
  (total, second, gradient), own = _weighed(kernel)
  gradient = gradient / (float(np.trace(second)) or 1.0)
  if kernel.centered:
    mean, size = kernel.mean, float(np.trace(own))
    both = np.outer(mean, total)
    second = second + size * np.outer(mean, mean) - both - both.T
  return dataclasses.replace(
    kernel,
    _second=lambda: second,
    _gradient=lambda: gradient,
    _in_basis=InputBasis(kernel.mean, lambda: second),
    coupled=None,
  )


def dependence(kernel: Kernel) -> float:
  """How far a row's input and gradient are from independent, in [0, 1].

  One minus the cosine between S (x) G and the Kronecker product of F's partial
  traces: 0 where x says nothing of |g| nor g of |x|.
  """
  (_, second, gradient), g = _weighed(kernel)
  s = kernel.second
  if kernel.centered:
    s = s + np.outer(kernel.mean, kernel.mean)
  same = _cosine(s, second) * _cosine(g, gradient)
  return float(np.clip(1 - same, 0.0, 1.0))


def _weighed(kernel: Kernel) -> tuple[Weighed, np.ndarray]:
  """The weighed moments, and G."""
  g = kernel.gradient
  if kernel.coupled is None or g is None:
    raise ValueError(
      f'the moments of {kernel.path!r} have no sums of inputs and gradients '
      'together; collect them with loss= and coupled=True'
    )
  return kernel.coupled(), g


def _cosine(one: np.ndarray, other: np.ndarray) -> float:
  """Of two matrices; 1 where one of them is zero."""
  size = np.linalg.norm(one) * np.linalg.norm(other)
  return float(np.sum(one * other) / size) if size > 0 else 1.0

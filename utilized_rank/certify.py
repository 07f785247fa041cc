"""Factors are believed when the error they leave is the one predicted."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from utilized_rank import numerics
from utilized_rank.kernels import Kernel
from utilized_rank.subspace import Factors

# Rounding errors are as good as independent, and each at most eps/2 of its
# value: taken for the standard deviation (it is less), their sums stay within a
# small multiple of theirs.
_DEVIATIONS = 4.0


def check(
  kernel: Kernel,
  stored: Factors,
  predicted: float,
  dtype: Any,
  weighted: bool,
  energy: float,
) -> None:
  """Raises unless stored factors leave the error that was predicted.

  Measured is tr(D^T S D G) of D = W - a b. Rounding a and b to their dtype
  moves its square root by no more than the same norm of what it adds to a b
  (the triangle inequality), and that is known from the sizes of a and b. Apart
  from it the two may differ by what float32 sums resolve of the whole energy.

  Args:
    kernel: the kernel with its moments.
    stored: the pair as it is in the tree, in float64.
    predicted: tr(D^T S D G) as the method's theory has it.
    dtype: what the factors are stored in.
    weighted: whether G is the gradient moment; the identity otherwise.
    energy: tr(W^T S W G), or what else float32 sums blur a share of.

  Raises:
    FloatingPointError: they differ; names the kernel, its rank and both.
  """
  s = kernel.second
  g = kernel.gradient if weighted else None
  times_g = lambda rows: rows if g is None else rows @ g
  form = lambda left, right: float(np.sum(left * right))
  difference = kernel.w - stored.a @ stored.b
  measured = form(s @ difference, times_g(difference))
  error_a, error_b = (_rounding(v, dtype) for v in stored)
  columns = np.ones(kernel.w.shape[1]) if g is None else np.diagonal(g)
  noise = form(
    np.diagonal(s) @ error_a**2, np.sum(times_g(stored.b) * stored.b, axis=1)
  ) + form(np.sum((s @ stored.a) * stored.a, axis=0), error_b**2 @ columns)
  noise = _DEVIATIONS * np.sqrt(max(noise, 0.0))
  tolerance = (
    noise * (2 * np.sqrt(max(predicted, 0.0)) + noise)
    + numerics.EIGENVALUE_FLOOR * energy
  )
  # Written so that NaN fails.
  if not abs(max(measured, 0.0) - predicted) <= tolerance:
    raise FloatingPointError(
      f'the rank-{stored.a.shape[1]} factors of {kernel.name!r} leave an error '
      f'of {measured:.6g} where {predicted:.6g} was predicted (tolerance '
      f'{tolerance:.2g}): they are wrong, or not of these parameters and '
      'moments'
    )


def _rounding(values: np.ndarray, dtype: Any) -> np.ndarray:
  info = jnp.finfo(dtype)
  return (float(info.eps) * np.abs(values) + float(info.smallest_subnormal)) / 2

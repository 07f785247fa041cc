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
  g = kernel.gradient if weighted else None
  if kernel.from_outputs:
    # S is not known, but a b reads x as W does: D = W (I - Q), W Q = a b.
    s, q = kernel.out_second, numerics.solve_least(kernel.w, stored.a)
    difference = np.eye(len(q)) - q @ stored.b
  else:
    s, difference = kernel.second, kernel.w - stored.a @ stored.b
  measured = _form(s @ difference, _times(difference, g))
  tolerance = numerics.EIGENVALUE_FLOOR * energy
  off = abs(max(measured, 0.0) - predicted)
  if not off <= tolerance:  # rounding is looked at where it is needed
    if kernel.from_outputs:
      noise = _DEVIATIONS * float(jnp.finfo(dtype).eps * np.sqrt(energy))
    else:
      noise = _noise(stored, s, g, dtype)
    tolerance += noise * (2 * np.sqrt(max(predicted, 0.0)) + noise)
  # Written so that NaN fails.
  if not off <= tolerance:
    raise FloatingPointError(
      f'the rank-{stored.a.shape[1]} factors of {kernel.name!r} leave an error '
      f'of {measured:.6g} where {predicted:.6g} was predicted (tolerance '
      f'{tolerance:.2g}): they are wrong, or not of these parameters and '
      'moments'
    )


def mean_energy(kernel: Kernel, weighted: bool) -> float:
  """What the mean input adds to tr(W^T S W G) of a centred S."""
  row = (kernel.mean @ kernel.w)[None]
  return _form(row, _times(row, kernel.gradient if weighted else None))


def _noise(
  stored: Factors, s: np.ndarray, g: np.ndarray | None, dtype: Any
) -> float:
  """The root of tr(N^T S N G) for N = what rounding the factors added to a b.

  N = E_a b + a E_b to first order, of independent errors.
  """
  a, b = stored
  error_a, error_b = (_rounding(v, dtype) ** 2 for v in stored)
  columns = np.ones(b.shape[1]) if g is None else np.diagonal(g)
  of_a = _form(np.diagonal(s) @ error_a, np.sum(_times(b, g) * b, axis=1))
  of_b = _form(np.sum((s @ a) * a, axis=0), error_b @ columns)
  return _DEVIATIONS * float(np.sqrt(max(of_a + of_b, 0.0)))


def _form(left: np.ndarray, right: np.ndarray) -> float:
  return float(np.sum(left * right))


def _times(rows: np.ndarray, g: np.ndarray | None) -> np.ndarray:
  return rows if g is None else rows @ g


def _rounding(values: np.ndarray, dtype: Any) -> np.ndarray:
  info = jnp.finfo(dtype)
  return (float(info.eps) * np.abs(values) + float(info.smallest_subnormal)) / 2

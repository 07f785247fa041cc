"""Pairs are believed when the error they leave is the one predicted.

Both are of one S, as float32 sums hold it, below zero where it is rounding:
however little of S a kernel sees, and however much of it a mean holds, they
differ by the rounding of the factors and by that of float64 alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
import itertools
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from utilized_rank.factorization.kernels import Kernel
from utilized_rank.linalg import eigh
from utilized_rank.linalg.best_pairs import Pair

# Rounding errors are as good as independent, and each at most eps/2 of its
# value: taken for the standard deviation (it is less), their sums stay within a
# small multiple of theirs.
_DEVIATIONS = 4.0


def check(
  kernel: Kernel,
  stored: Pair,
  predicted: float,
  dtype: Any,
  weighted: bool,
  energy: float,
) -> None:
  """Raises unless stored factors leave the error that was predicted.

  Args:
    kernel: the kernel with its moments.
    stored: the pair as it is in the tree, in float64.
    predicted: tr(D^T S D G) as the method's theory has it.
    dtype: what the factors are stored in.
    weighted: whether G is the gradient moment; the identity otherwise.
    energy: tr(W^T S W G); where the prediction takes what float32 sums do not
      resolve for zero, the energy that this is a share of.

  Raises:
    FloatingPointError: they differ; names the kernel, its rank and both.
  """
  g = kernel.gradient if weighted else None
  if not kernel.from_outputs:
    check_in(
      kernel.name,
      Metric(kernel.w, kernel.second, g),
      stored,
      predicted,
      dtype,
      energy,
    )
    return
  # S is not known, but a b reads x as W does: D = W (I - Q b), W Q = a.
  w, t = kernel.w, kernel.out_second
  q = _inputs(w, stored, dtype)
  difference = np.eye(len(q)) - q @ stored.b
  measured = _form(t @ difference, _times(difference, g))

  def slack() -> Iterator[float]:
    back = eigh.solve_least(w, np.eye(len(w)))  # x = y W^+, where W tells x
    seen = back @ w
    # Outputs where W itself is rounding, or not at all: no Q leads there.
    unseen = 2 * abs(np.trace(t) - _form(t @ seen, seen))
    metric = Metric(w, back.T @ t @ back, g)
    for rounding in _rounding_of(metric, stored, predicted, dtype):
      yield rounding + unseen

  size = _size(t) * len(w)
  _compare(kernel.name, stored, measured, predicted, energy, size, slack())


def _inputs(w: np.ndarray, stored: Pair, dtype: Any) -> np.ndarray:
  """Q (m, r) with W Q = a, up to what rounding added to a.

  Where rows of outputs are projected, Q is the pseudo-inverse of b, several
  times cheaper than a least-squares solution, and is looked at.
  """
  a, b = stored
  q = eigh.solve_least(b, np.eye(len(b)))
  left = np.linalg.norm(a - w @ q)
  if left <= _DEVIATIONS * float(jnp.finfo(dtype).eps) * np.linalg.norm(a):
    return q
  return eigh.solve_least(w, a)


class Metric(NamedTuple):
  """tr((W - W')^T S (W - W') G), of a W' that is to be near to W.

  Attributes:
    w: W (d, m).
    s: S (d, d).
    g: G (m, m); None for the identity.
  """

  w: np.ndarray
  s: np.ndarray
  g: np.ndarray | None


def check_in(
  name: str,
  metric: Metric,
  stored: Pair,
  predicted: float,
  dtype: Any,
  energy: float,
) -> None:
  """`check` in any metric, `name` being what the error calls the kernel."""
  w, s, g = metric
  difference = w - stored.a @ stored.b
  # Without G the product is symmetric, and takes half of the time of S D.
  measured = _form(s, _times(difference, g) @ difference.T)
  size = _size(s) * _form(w, w) * (1.0 if g is None else _size(g))
  slack = _rounding_of(metric, stored, predicted, dtype)
  _compare(name, stored, measured, predicted, energy, size, slack)


def check_product(name: str, meant: Pair, pair: Pair, dtype: Any) -> None:
  """Raises unless a pair, stored in `dtype`, has the product of another.

  Args:
    name: what the error calls the kernel.
    meant: factors of the product that is meant.
    pair: factors of the same shapes, in float64.
    dtype: what they are to be stored in.

  Raises:
    FloatingPointError: the products differ by more than rounding.
  """
  stored = Pair(*(f.astype(dtype).astype(np.float64) for f in pair))
  product = meant.a @ meant.b
  metric = Metric(product, np.eye(len(product)), None)
  check_in(name, metric, stored, 0.0, dtype, _form(product, product))


def _compare(
  name: str,
  stored: Pair,
  measured: float,
  predicted: float,
  energy: float,
  size: float,
  slack: Iterable[float],
) -> None:
  """Raises unless measured is what was predicted.

  Measured is tr(D^T S D G) of D = W - a b. Apart from the rounding of a and b,
  of which `slack` has bounds, the next one looked at where the last is not
  enough, the two may differ by what float32 sums resolve of the whole energy,
  and by what float64 does of `size`, which no error is above: tr(S) |W|^2
  tr(G), by and large.
  """
  a, b = stored
  double = float(np.finfo(np.float64).eps) * _DEVIATIONS * (len(a) + b.shape[1])
  # Traces of what is rounding alone may be below zero.
  tolerance = eigh.EIGENVALUE_FLOOR * max(energy, 0.0) + double * size
  off = abs(max(measured, 0.0) - predicted)
  allowed = tolerance
  for more in itertools.chain([0.0], slack):
    allowed = tolerance + more
    if off <= allowed:  # NaN is not
      return
  raise FloatingPointError(
    f'the rank-{a.shape[1]} factors of {name!r} leave an error '
    f'of {measured:.6g} where {predicted:.6g} was predicted (tolerance '
    f'{allowed:.2g}): they are wrong, or not of these parameters and moments'
  )


def _rounding_of(
  metric: Metric, stored: Pair, predicted: float, dtype: Any
) -> Iterator[float]:
  """By how much rounding a and b to their dtype moves tr(D^T S D G).

  It moves the square root by no more than the same norm of what it adds to a b
  (the triangle inequality), and that is known from the sizes of a and b. Where
  rounding of sums has put S or G below zero that is no norm: the second bound
  is in that of |S| and |G|, which takes their eigendecompositions.
  """
  w, s, g = metric
  added = _noise(stored, s, g, dtype)
  yield added * (2 * np.sqrt(max(predicted, 0.0)) + added)
  s, g = _absolute(s), None if g is None else _absolute(g)
  difference = w - stored.a @ stored.b
  left = _form(s @ difference, _times(difference, g))
  added = _noise(stored, s, g, dtype)
  yield added * (2 * np.sqrt(max(left, 0.0)) + added)


def _absolute(symmetric: np.ndarray) -> np.ndarray:
  """The matrix with the absolute values of its eigenvalues."""
  values, vectors = eigh.symmetric_eigh(symmetric)
  return (vectors * np.abs(values)) @ vectors.T


def _noise(
  stored: Pair, s: np.ndarray, g: np.ndarray | None, dtype: Any
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


def _size(moment: np.ndarray) -> float:
  """The trace, unless it is rounding alone."""
  return max(float(np.trace(moment)), float(np.abs(moment).max()))


def _form(left: np.ndarray, right: np.ndarray) -> float:
  return float(np.sum(left * right))


def _times(rows: np.ndarray, g: np.ndarray | None) -> np.ndarray:
  return rows if g is None else rows @ g


def _rounding(values: np.ndarray, dtype: Any) -> np.ndarray:
  info = jnp.finfo(dtype)
  return (float(info.eps) * np.abs(values) + float(info.smallest_subnormal)) / 2

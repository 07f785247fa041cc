"""The ways to factorize one kernel, for every rank at once.

A method gives factors a (d, R) and b (R, m) whose leading r columns and rows
are its W' of rank r. What each truncation leaves out is measured in one of two
metrics: output energy, or nats of loss.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from utilized_rank import subspace
from utilized_rank.kernels import Kernel
from utilized_rank.subspace import Factors

METRICS = ('loss', 'output', 'relative')
DAMPING = 0.01


def needs_gradients(path: str) -> ValueError:
  """The error for a kernel without gradient moments."""
  return ValueError(
    f'the moments of {path!r} have no gradients; collect them with loss='
  )


def _loss(kernel: Kernel, damping: float) -> Factors:
  if kernel.gradient is None:
    raise needs_gradients(kernel.path)
  wide = kernel.w.shape[1] > kernel.w.shape[0]
  return subspace.loss_factors(
    kernel.w,
    kernel.second,
    kernel.gradient,
    damping,
    kernel.in_basis if wide else None,
  )


def _fisher_rows(kernel: Kernel) -> Factors:
  if kernel.row_fisher is None:
    raise ValueError(
      f'the moments of {kernel.path!r} have no squared gradients of rows; '
      'collect them with loss= and fisher_rows=True'
    )
  return subspace.scaled_factors(kernel.w, np.sqrt(kernel.row_fisher))


_METHODS: dict[str, Callable[[Kernel, float], Factors]] = {
  'weight': lambda k, damping: subspace.weight_factors(k.w),
  'scaled': lambda k, damping: subspace.scaled_factors(
    k.w, np.sqrt(np.maximum(np.diagonal(k.second), 0))
  ),
  'fisher_rows': lambda k, damping: _fisher_rows(k),
  'output': lambda k, damping: subspace.output_factors(
    k.w, k.out_basis.vectors
  ),
  'loss': _loss,
}
# Its W' of one rank is no truncation of that of another.
UTILIZED = 'utilized'
METHODS = (*_METHODS, UTILIZED)
# Their optimum takes spectra about the mean when the mean is given back.
CENTERED = ('output', 'loss')
# They need moments that were collected with a loss.
OF_LOSS = ('fisher_rows', 'loss')


def check_method(method: str, known: tuple[str, ...] = METHODS) -> None:
  """Raises ValueError for a method that there is not."""
  if method not in known:
    raise ValueError(f'unknown method {method!r}; known: {sorted(known)}')


def family(kernel: Kernel, method: str, damping: float = DAMPING) -> Factors:
  """Factors of full rank, to be truncated to any rank.

  Args:
    kernel: the kernel with its moments.
    method: 'weight', 'scaled', 'fisher_rows', 'output' or 'loss'.
    damping: share of the mean of G's diagonal that is added to it.
  """
  check_method(method, tuple(_METHODS))
  return _METHODS[method](kernel, damping)


def truncate(factors: Factors, rank: int) -> Factors:
  return Factors(factors.a[:, :rank], factors.b[:rank])


def damages(kernel: Kernel, factors: Factors, metric: str) -> np.ndarray:
  """What each rank costs.

  Args:
    kernel: the kernel with its moments.
    factors: a family of the kernel.
    metric: 'loss', nats per example in the Kronecker-factored quadratic
      approximation; 'output', E|x (W - W')|^2; 'relative', the share of
      E|x W|^2.

  Returns:
    (R + 1,): entry r is the damage of rank r.
  """
  if metric == 'loss':
    if kernel.gradient is None:
      raise needs_gradients(kernel.path)
    tails = subspace.tails(factors, kernel.second, kernel.gradient)
    return tails * (kernel.rows_per_example / 2)
  tails = subspace.tails(factors, kernel.second, None)
  if metric == 'relative':
    total = subspace.output_error(kernel.w, kernel.second)
    return tails / total if total > 0 else np.zeros_like(tails)
  return tails


def utilized(kernel: Kernel, rank: int) -> Factors:
  """The paper's P_S W P_T at the highest shared energy of this rank."""
  bases = kernel.in_basis, kernel.out_basis
  energies = [subspace.energy(b.values)[rank - 1] for b in bases]
  shared = max(energies)
  if not shared > 0:  # no data: nothing to project on
    return truncate(subspace.weight_factors(kernel.w), rank)
  sides = []
  for basis, at_rank in zip(bases, energies, strict=True):
    # The side that reaches the energy at this rank sets the rank.
    k = (
      rank
      if at_rank == shared
      else max(rank, subspace.energy_rank(basis.values, shared))
    )
    sides.append(basis.vectors[:, :k])
  return subspace.utilized_factors(kernel.w, *sides)

"""The ways to factorize one kernel, for every rank at once.

A method gives factors a (d, R) and b (R, m) whose leading r columns and rows
are its W' of rank r. What each truncation leaves out is measured in one of two
metrics: output energy, or nats of loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from utilized_rank.factorization.coupled import coupled
from utilized_rank.factorization.kernels import Kernel
from utilized_rank.linalg import best_pairs
from utilized_rank.linalg import subspace
from utilized_rank.linalg.best_pairs import Pair

METRICS = ('loss', 'output', 'relative', 'geometric')
DAMPING = 0.01


def needs_gradients(path: str) -> ValueError:
  """The error for a kernel without gradient moments."""
  return ValueError(
    f'the moments of {path!r} have no gradients; collect them with loss='
  )


class Family(NamedTuple):
  """One kernel factorized at every rank.

  Attributes:
    factors: a (d, R) and b (R, m); the leading r columns and rows are the pair
      of rank r. None where only the damages were kept.
    damages: metric -> (R + 1,), what the pair of each rank costs: 'output',
      E|x (W - W')|^2; 'relative', that as a share of E|x W|^2; 'loss', nats
      per example in the Kronecker-factored quadratic approximation (where
      there are gradients); 'geometric', the geometric mean of the last two.
  """

  factors: Pair | None
  damages: dict[str, np.ndarray]


# Pair, and a^T S a of them as `best_pairs.tails` takes it.
Solution = tuple[Pair, np.ndarray]


def _solution(kernel: Kernel, factors: Pair) -> Solution:
  """For factors that know nothing of S, worked out on the smaller side."""
  d, m = kernel.w.shape
  if d > m or kernel.from_outputs:  # b is orthogonal and a = W b^T
    return factors, factors.b @ kernel.out_second @ factors.b.T
  return factors, factors.a.T @ kernel.second @ factors.a


def _weight(kernel: Kernel, damping: float) -> Solution:
  del damping
  return _solution(kernel, best_pairs.weight_factors(kernel.w))


def _scaled(kernel: Kernel, damping: float) -> Solution:
  del damping
  scale = np.sqrt(np.maximum(np.diagonal(kernel.second), 0))
  return _solution(kernel, best_pairs.scaled_factors(kernel.w, scale))


def _fisher_rows(kernel: Kernel, damping: float) -> Solution:
  del damping
  if kernel.row_fisher is None:
    raise ValueError(
      f'the moments of {kernel.path!r} have no squared gradients of rows; '
      'collect them with loss= and fisher_rows=True'
    )
  scale = np.sqrt(kernel.row_fisher)
  return _solution(kernel, best_pairs.scaled_factors(kernel.w, scale))


def _output(kernel: Kernel, damping: float) -> Solution:
  del damping
  d, m = kernel.w.shape
  if d < m and not kernel.from_outputs:
    return _input_side(kernel, None, 0.0)
  values, vectors = kernel.leading_outputs(None)
  return best_pairs.output_factors(kernel.w, vectors), values


def _loss(kernel: Kernel, damping: float) -> Solution:
  gradient = kernel.gradient
  if gradient is None:
    raise needs_gradients(kernel.path)
  d, m = kernel.w.shape
  if d > m:
    return best_pairs.loss_factors(
      kernel.w, kernel.second, gradient, damping, kernel.out_second
    )
  return _input_side(kernel, gradient, damping)


def _input_side(
  kernel: Kernel, gradient: np.ndarray | None, damping: float
) -> Solution:
  factors = best_pairs.input_side_factors(
    kernel.w, kernel.in_basis, gradient, damping
  )
  if subspace.is_full(kernel.in_basis):
    return factors, np.ones(len(factors.b))
  return _solution(kernel, factors)


_METHODS: dict[str, Callable[[Kernel, float], Solution]] = {
  'weight': _weight,
  'scaled': _scaled,
  'fisher_rows': _fisher_rows,
  'output': _output,
  'loss': _loss,
}
# Its W' of one rank is no truncation of that of another.
UTILIZED = 'utilized'
FAMILIES = (*_METHODS, 'coupled')
METHODS = (*FAMILIES, UTILIZED)
# Their optimum takes spectra about the mean when the mean is given back.
CENTERED = ('output', 'loss', 'coupled')
# They need moments that were collected with a loss.
OF_LOSS = ('fisher_rows', 'loss', 'coupled')
# Kernels that share a left factor have no form of theirs in common.
ALONE = (UTILIZED, 'coupled')


def check_method(method: str, known: tuple[str, ...] = METHODS) -> None:
  """Raises ValueError for a method that there is not."""
  if method not in known:
    raise ValueError(f'unknown method {method!r}; known: {sorted(known)}')


def family(kernel: Kernel, method: str, damping: float = DAMPING) -> Family:
  """Pair of full rank, to be truncated to any rank, and what each costs.

  Args:
    kernel: the kernel with its moments.
    method: 'weight', 'scaled', 'fisher_rows', 'output', 'loss' or 'coupled'.
    damping: share of the mean of G's diagonal that is added to it.
  """
  if method == 'coupled':
    return _coupled_family(kernel, damping)
  factors, cross = solve(kernel, method, damping)
  return Family(factors, costs(kernel, cross, factors.b))


def _coupled_family(kernel: Kernel, damping: float) -> Family:
  """The loss is what the weighed moments say; what else there is, S says."""
  together = coupled(kernel)
  factors, cross = _loss(together, damping)
  known = costs(kernel, factors.a.T @ kernel.second @ factors.a, factors.b)
  known['loss'] = costs(together, cross, factors.b)['loss']
  known['geometric'] = np.sqrt(known['loss'] * known['relative'])
  return Family(factors, known)


def solve(kernel: Kernel, method: str, damping: float) -> Solution:
  check_method(method, tuple(_METHODS))
  return _METHODS[method](kernel, damping)


def costs(
  kernel: Kernel, cross: np.ndarray, b: np.ndarray
) -> dict[str, np.ndarray]:
  """`Family.damages` of factors a and b, whatever made them; a^T S a given."""
  gradient = kernel.gradient
  weights = (None,) if gradient is None else (None, gradient)
  output, *loss = best_pairs.tails(cross, b, *weights)
  total = output[0]
  damages = {
    'output': output,
    'relative': output / total if total > 0 else np.zeros_like(output),
  }
  if loss:
    damages['loss'] = loss[0] * (kernel.rows_per_example / 2)
    damages['geometric'] = np.sqrt(damages['loss'] * damages['relative'])
  return damages


def output(kernel: Kernel, rank: int) -> tuple[Pair, float, float]:
  """The method 'output' at one rank, without what other ranks need.

  Returns:
    The pair; its error E|x (W - W')|^2; and E|x W|^2.
  """
  d, m = kernel.w.shape
  if d < m and not kernel.from_outputs:
    return best_pairs.input_side_pair(kernel.w, kernel.second, rank)
  values, vectors = kernel.leading_outputs(rank)
  left, energy = (max(float(v.sum()), 0.0) for v in (values[rank:], values))
  return best_pairs.output_factors(kernel.w, vectors), left, energy


def truncate(family: Family, rank: int) -> Pair:
  if family.factors is None:
    raise ValueError('these families were made with keep_factors=False')
  a, b = family.factors
  return Pair(a[:, :rank], b[:rank])


def damages(path: str, family: Family, metric: str) -> np.ndarray:
  """`family.damages[metric]`, or an error that names the kernel."""
  if metric not in family.damages:
    raise needs_gradients(path)
  return family.damages[metric]


def utilized(kernel: Kernel, rank: int) -> tuple[Pair, float, float]:
  """The paper's P_S W P_T at the highest shared energy of this rank.

  Returns:
    The pair; its error E|x (W - W')|^2; and the largest energy that W could
    have, which bounds what is lost with the eigenvalues taken for zero.
  """
  of_s, of_t = bases = kernel.in_basis, kernel.out_basis
  energies = [subspace.energy(b.values)[rank - 1] for b in bases]
  shared = max(energies)
  if not shared > 0:  # no data: nothing to project on
    a, b = best_pairs.weight_factors(kernel.w)
    return Pair(a[:, :rank], b[:rank]), 0.0, 0.0
  # The side that reaches the energy at this rank sets the rank.
  k_s, k_t = (
    rank
    if at_rank == shared
    else max(rank, subspace.energy_rank(basis.values, shared))
    for basis, at_rank in zip(bases, energies, strict=True)
  )
  v, u = of_s.vectors[:, :k_s], of_t.vectors[:, :k_t]
  # With what the basis takes for zero: certificates measure in S itself.
  values = np.sum(of_s.vectors * (kernel.second @ of_s.vectors), axis=0)
  own = subspace.Basis(values, of_s.vectors)
  error = subspace.projected_error(kernel.w, own, k_s, u)
  return (
    best_pairs.utilized_factors(kernel.w, v, u),
    max(error, 0.0),
    float(of_s.values[0] * np.sum(kernel.w**2)),
  )

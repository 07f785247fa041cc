"""From moments to the utilization of every layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import functools
import threading
from typing import Any
import warnings

import numpy as np

from utilized_rank.factorization.coupled import dependence
from utilized_rank.factorization.kernels import Kernel
from utilized_rank.factorization.kernels import kernels
from utilized_rank.host import threads
from utilized_rank.host.progress import track
from utilized_rank.linalg import subspace
from utilized_rank.linalg.subspace import check_energy
from utilized_rank.moments.moments import Moments
from utilized_rank.report.layer import LayerReport
from utilized_rank.report.layer import utilized
from utilized_rank.report.report import Report


def measure(
  params: Any,
  moments: Moments,
  *,
  energy: float = 0.99,
  centered: bool = False,
  progress: bool = True,
) -> Report:
  """Measures each kernel's utilized rank.

  Args:
    params: dense parameters.
    moments: moments of their kernels.
    energy: share of each spectrum to keep, in (0, 1].
    centered: take the spectra about the mean; the paper's re-implementation
      does not, and a large mean then dominates the energy.
    progress: show a progress bar.

  Returns:
    A `Report` with k_S, k_T, r, utilization and spectra per layer. Of kernels
    that were measured from the output side k_S is not known, and r is k_T,
    which it cannot exceed. It says which share of the parameters the kernels
    hold, and what else there is.

  Raises:
    ValueError: the energy is outside (0, 1], or the moments are not of these
      parameters.

  >>> import jax.numpy as jnp, utilized_rank as ur
  >>> params = {'w': jnp.eye(4)}
  >>> x = jnp.tile(jnp.eye(4)[:1], (16, 1))
  >>> _, moments = ur.capture(lambda p, x: x @ p['w'])(params, x)
  >>> measure(params, moments)['w'].utilization
  0.25

  Source: arXiv 2407.04797.
  """
  check_energy(energy)
  every = _every(params, moments, centered)
  later = _Projected(params, moments, centered, energy)
  # A kernel that waits is no more than W in float64.
  layers = threads.ordered_map(
    lambda kernel: _layer(kernel, energy, moments, later),
    every,
    ahead=threads.FAR,
  )
  if progress:
    total = sum(moments[path].layout.num_groups for path in moments)
    layers = track(layers, total=total, desc='measure', unit='kernel')
  return Report(list(layers), energy, centered, moments.coverage)


def _layer(
  kernel: Kernel, energy: float, moments: Moments, later: _Projected
) -> LayerReport:
  d, m = kernel.w.shape
  t = kernel.out_spectrum()
  k_out = subspace.energy_rank(t, energy)
  total = float(t.sum())
  k_in, spectrum_in = None, np.zeros(0)
  least, unseen = None, 0.0
  projected: Callable[[], float | None] | None = None
  if not kernel.from_outputs:
    spectrum_in = kernel.in_spectrum
    k_in = subspace.energy_rank(spectrum_in, energy)
    if kernel.sketched is not None:
      known = kernel.sketched()
      least, k_in = known.energy_ranks(energy)
      unseen = known.unseen / known.trace if known.trace > 0 else 0.0
    projected = functools.partial(later.of, kernel.name)
  rank = utilized(k_in, k_out)
  spectrum_out = np.zeros(m)
  spectrum_out[: len(t)] = t
  return LayerReport(
    kernel.path,
    kernel.index,
    d,
    m,
    kernel.count,
    energy,
    k_in,
    k_out,
    spectrum_in,
    spectrum_out,
    projected,
    float(t[rank:].sum()) / total if total > 0 else 0.0,
    moments[kernel.path].entry.number,
    moments[kernel.path].entry.columns,
    least,
    unseen,
    None if kernel.coupled is None else dependence(kernel),
  )


class _Projected:
  """`LayerReport.error_projected` of all kernels: made when first asked for."""

  def __init__(
    self, params: Any, moments: Moments, centered: bool, energy: float
  ):
    self._params, self._moments = params, moments
    self._centered, self._energy = centered, energy
    self._lock = threading.Lock()
    self._found: dict[str, float | None] = {}

  def of(self, name: str) -> float | None:
    """That of one of them."""
    with self._lock:
      if not self._found:
        every = _every(self._params, self._moments, self._centered)
        with warnings.catch_warnings():
          warnings.simplefilter('ignore')  # `measure` has said it
          self._found = dict(
            threads.ordered_map(self._one, every, ahead=threads.FAR)
          )
      return self._found[name]

  def _one(self, kernel: Kernel) -> tuple[str, float | None]:
    if kernel.from_outputs:
      return kernel.name, None
    k_s, k_t = kernel.ranks(self._energy, self._energy)
    if kernel.sketched is not None:
      _, k_s = kernel.sketched().energy_ranks(self._energy)
    s, t = kernel.in_basis, kernel.out_basis
    total = float(t.values.sum())
    error = subspace.projected_error(kernel.w, s, k_s, t.vectors[:, :k_t])
    return kernel.name, error / total if total > 0 else 0.0


def _every(params: Any, moments: Moments, centered: bool) -> Iterator[Kernel]:
  for _, members in kernels(params, moments, centered=centered):
    yield from members

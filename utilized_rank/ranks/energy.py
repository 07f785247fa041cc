"""Ranks of the paper: what holds a share of the energy."""

from __future__ import annotations

from typing import Any

from utilized_rank.factorization.kernels import kernels
from utilized_rank.host import threads
from utilized_rank.linalg.subspace import check_energy
from utilized_rank.moments.moments import Moments
from utilized_rank.products.gauge import check_gauge
from utilized_rank.products.gauge import saves


def energy_ranks(
  params: Any,
  moments: Moments,
  *,
  energy: float = 0.99,
  centered: bool = False,
  gauge: str | None = None,
) -> dict[str, int]:
  """The utilized rank r = min(k_S, k_T) wherever it saves parameters.

  A stack of kernels (scan steps, experts) gets one rank, that of the member
  that needs most.

  Args:
    params: dense parameters.
    moments: moments of their kernels.
    energy: share of each spectrum to keep, in (0, 1].
    centered: take the spectra about the mean.
    gauge: as for `factorize`; with 'identity' every r < min(d, m) saves.

  Returns:
    Path to rank; kernels that a pair would not make smaller are absent.

  Source: arXiv 2407.04797, r = min(k_S, k_T).
  """
  check_energy(energy)
  check_gauge(gauge)
  ranks = {}
  most = threads.ordered_map(
    lambda item: (item[0], max(min(k.ranks(energy, energy)) for k in item[1])),
    kernels(params, moments, centered=centered),
    ahead=threads.FAR,
  )
  for path, rank in most:
    rank = max(rank, 1)
    if saves(moments[path].layout, rank, gauge):
      ranks[path] = rank
  return ranks

"""Ways to choose a rank for every kernel. A path that is absent stays dense."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from utilized_rank import paths
from utilized_rank import subspace
from utilized_rank.kernels import kernels
from utilized_rank.layout import Layout
from utilized_rank.moments import Moments

Ranks = Mapping[str, int]


def check_energy(energy: float) -> float:
  """Raises ValueError unless `energy` is in (0, 1]."""
  if not 0 < energy <= 1:
    raise ValueError(f'energy is a share in (0, 1], got {energy!r}')
  return energy


def saves(layout: Layout, rank: int) -> bool:
  """Whether a pair of this rank has fewer parameters, r (d + m) < d m."""
  d, m = layout.matrix_shape
  return rank * (d + m) < d * m


def energy_ranks(
    params: Any,
    moments: Moments,
    *,
    energy: float = 0.99,
    centered: bool = False,
) -> dict[str, int]:
  """The utilized rank r = min(k_S, k_T) wherever it saves parameters.

  A stack of kernels (scan steps, experts) gets one rank, that of the member
  that needs most.

  Args:
    params: dense parameters.
    moments: moments of their kernels.
    energy: share of each spectrum to keep, in (0, 1].
    centered: take the spectra about the mean.

  Returns:
    Path to rank; kernels that a pair would not make smaller are absent.

  Source: arXiv 2407.04797, r = min(k_S, k_T).
  """
  check_energy(energy)
  ranks = {}
  for path, members in kernels(params, moments, centered=centered):
    rank = max(
        min(
            subspace.energy_rank(k.in_basis.values, energy),
            subspace.energy_rank(k.out_basis.values, energy),
        )
        for k in members
    )
    rank = max(rank, 1)
    if saves(moments[path].layout, rank):
      ranks[path] = rank
  return ranks


def uniform_ranks(
    params: Any, moments: Moments, *, params_fraction: float
) -> dict[str, int]:
  """Every kernel keeps the same share of its own parameters.

  Args:
    params: dense parameters; only checked against the moments.
    moments: moments of the kernels to shrink.
    params_fraction: share of the kernels' parameters to keep, in (0, 1]; the
      pairs never have more.

  Returns:
    Path to rank r = floor(fraction d m / (d + m)), at least 1; empty for 1.

  Raises:
    ValueError: the fraction is outside (0, 1], or below what rank 1 costs.

  >>> import jax.numpy as jnp, utilized_rank as ur
  >>> w = jnp.ones((8, 8))
  >>> _, moments = ur.capture(lambda p, x: x @ p['w'])({'w': w}, w)
  >>> uniform_ranks({'w': w}, moments, params_fraction=0.5)
  {'w': 2}
  """
  if not 0 < params_fraction <= 1:
    raise ValueError(
        f'params_fraction is a share in (0, 1], got {params_fraction!r}'
    )
  if params_fraction == 1:
    return {}
  ranks = {}
  total = cost = 0
  for path in moments:
    layout = moments[path].layout
    d, m = layout.matrix_shape
    rank = max(1, int(params_fraction * d * m / (d + m)))
    total += layout.num_groups * d * m
    cost += layout.num_groups * (rank * (d + m) if rank * (d + m) < d * m
                                 else d * m)
    if saves(layout, rank):
      ranks[path] = rank
  if cost > params_fraction * total:
    raise ValueError(
        f'params_fraction={params_fraction} keeps {params_fraction * total:.0f}'
        f' of {total} parameters; rank 1 everywhere needs {cost}'
    )
  return ranks


def check_ranks(ranks: Ranks, moments: Moments) -> None:
  """Raises ValueError for a rank that its kernel cannot have."""
  for path, rank in ranks.items():
    if path not in moments:
      raise ValueError('a rank is given for ' + paths.unknown(path, moments))
    full = moments[path].layout.full_rank
    if not 1 <= rank <= full or rank != int(rank):
      raise ValueError(
          f'rank {rank!r} for {path!r}: a {moments[path].layout.matrix_shape} '
          f'kernel has ranks from 1 to {full}'
      )

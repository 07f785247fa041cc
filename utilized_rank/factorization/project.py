"""The paper's transformation of a kernel, W' = P_S W P_T."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from utilized_rank.factorization.kernels import Kernel
from utilized_rank.factorization.kernels import kernels
from utilized_rank.factorization.kernels import to_leaf
from utilized_rank.host import threads
from utilized_rank.linalg.subspace import check_energy
from utilized_rank.lowrank.leaf import is_low_rank
from utilized_rank.moments.moments import Moments
from utilized_rank.tree import paths

Energies = float | Mapping[str, float | tuple[float, float]]


def project(
  params: Any,
  moments: Moments,
  *,
  energy: Energies = 0.99,
  centered: bool = False,
) -> Any:
  """The paper's transformation W' = P_S W P_T: same tree, same shapes.

  Args:
    params: dense parameters.
    moments: moments of their kernels.
    energy: share of both spectra to keep, in (0, 1]; or a mapping from path
      to a share, or to a pair (e_S, e_T). Paths that it lacks stay as they
      are.
    centered: take the spectra about the mean.

  Returns:
    The parameters with projected kernels; the function they compute on the
    data changes by the discarded energy.

  Raises:
    ValueError: an energy is outside (0, 1], or a path has no moments.

  Source: arXiv 2407.04797, W' = P_S W P_T (rows of X act from the left).
  """
  per_path = (
    energy if isinstance(energy, Mapping) else dict.fromkeys(moments, energy)
  )
  named, treedef = paths.flatten(params, is_low_rank)

  def solve(item: tuple[str, Iterator[Kernel]]) -> tuple[str, Any]:
    path, members = item
    share = per_path[path]
    e_s, e_t = share if isinstance(share, tuple) else (share, share)
    projected = [
      k.projected(check_energy(e_s), check_energy(e_t)) for k in members
    ]
    return path, to_leaf(projected, moments[path].layout, named[path])

  for path, leaf in threads.ordered_map(
    solve,
    kernels(params, moments, centered=centered, only=per_path),
    ahead=threads.FAR,
  ):
    named[path] = leaf
  return paths.unflatten(treedef, named)

"""What every rank of every kernel costs, kept while blocks come and go."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
import contextlib
import os
from typing import Any, TypeVar
import warnings

import numpy as np

from utilized_rank.factorization import methods
from utilized_rank.factorization.decompose import Families
from utilized_rank.factorization.decompose import decompose
from utilized_rank.factorization.methods import Family
from utilized_rank.host import files
from utilized_rank.moments.moments import Entry
from utilized_rank.moments.moments import Moments
from utilized_rank.moments.moments import Sums
from utilized_rank.moments.sites import Site

METHOD = 'output'
_BETWEEN = '|'
T = TypeVar('T')


class Damages:
  """Of each block what its kernels' ranks cost, one small file for each."""

  def __init__(self, folder: str):
    self._folder = folder

  def take(
    self,
    number: int,
    leaves: Mapping[str, Any],
    moments: Moments,
    groups: Iterable[list[str]],
    compensate_mean: bool,
  ) -> None:
    """Works out and writes down those of a block.

    Args:
      number: of the block.
      leaves: dense leaves by path.
      moments: of its kernels.
      groups: the kernels, those together that are decomposed at once.
      compensate_mean: whether that will be done.
    """
    arrays: dict[str, np.ndarray] = {}
    for group in groups:
      with without_scarce():
        families = decompose(
          dict(leaves),
          moments,
          method=METHOD,
          compensate_mean=compensate_mean,
          only=group,
          keep_factors=False,
          progress=False,
        )
      for path in group:
        (family,) = families[path]
        for metric, damage in family.damages.items():
          arrays[f'{path}{_BETWEEN}{metric}'] = damage
        arrays[f'{path}{_BETWEEN}count'] = np.asarray(moments[path].count)
    os.makedirs(self._folder, exist_ok=True)
    save: Callable[..., None] = np.savez
    files.write(self._file(number), lambda file: save(file, **arrays))

  def all(
    self, sites: Mapping[str, Site], numbers: Iterable[int], centered: bool
  ) -> tuple[Moments, Families]:
    """Those of all blocks, as `budget_ranks` takes them.

    Args:
      sites: the kernels in their order.
      numbers: of the blocks that have kernels.
      centered: as `compensate_mean` of `take`.

    Returns:
      Moments that know counts and nothing else, and families of damages alone.
    """
    found: dict[str, dict[str, np.ndarray]] = {}
    for number in numbers:
      with np.load(self._file(number)) as file:
        for key in file.files:
          path, _, what = key.rpartition(_BETWEEN)
          found.setdefault(path, {})[what] = file[key]
    counts = {path: found[path].pop('count') for path in sites}
    families: dict[Any, list[Family]] = {
      path: [Family(None, found[path])] for path in sites
    }
    return (
      without_sums(sites, counts),
      Families(families, METHOD, centered, methods.DAMPING),
    )

  def _file(self, number: int) -> str:
    return os.path.join(self._folder, f'{number:06d}.npz')


def without_sums(
  sites: Mapping[str, Site], counts: Mapping[str, Any] | None = None
) -> Moments:
  """Moments that know layouts, and how many rows there were, but no sums."""
  table = tuple(
    Entry(path, site.layout, i, site.bias, site.kind)
    for i, (path, site) in enumerate(sites.items())
  )
  zero = np.zeros((), np.int32)
  count_of = lambda path: zero if counts is None else counts[path]
  return Moments(table, tuple(Sums(count_of(p), None, ()) for p in sites))


@contextlib.contextmanager
def without_scarce() -> Iterator[None]:
  """Does not say of each block that rows are few: the plan has said it."""
  with warnings.catch_warnings():
    warnings.filterwarnings('ignore', message='.* was measured on .* rows for')
    yield

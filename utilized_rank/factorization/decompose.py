"""Every kernel factorized at every rank, once, for whoever needs it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from utilized_rank.factorization import methods
from utilized_rank.factorization import shared_left
from utilized_rank.factorization.by_process import Unit
from utilized_rank.factorization.by_process import agree
from utilized_rank.factorization.by_process import each_unit
from utilized_rank.factorization.methods import Family
from utilized_rank.factorization.shared_left import Key
from utilized_rank.moments.moments import Moments
from utilized_rank.walk import compat


class Families(Mapping[Key, list[Family]]):
  """Families of the kernels of a leaf, by path; what `decompose` returns.

  A key may be a tuple of paths: those kernels have one left factor.

  A value: `budget_ranks`, `predict_loss` and `factorize` take it as
  `families=` and then decompose nothing again.

  Attributes:
    method: how the kernels were factorized.
    compensate_mean: whether that counts on the mean being compensated.
    damping: share of the mean of G's diagonal that was added to it.
  """

  def __init__(
    self,
    found: dict[Key, list[Family]],
    method: str,
    compensate_mean: bool,
    damping: float,
  ):
    self._found = found
    self.method = method
    self.compensate_mean = compensate_mean
    self.damping = damping

  def __getitem__(self, key: Key) -> list[Family]:
    if key not in self._found:
      raise KeyError(f'no family of {key!r}; there are {list(self)[:4]}')
    return self._found[key]

  def __iter__(self) -> Iterator[Key]:
    return iter(self._found)

  def __len__(self) -> int:
    return len(self._found)

  def check(
    self,
    method: str,
    compensate_mean: bool,
    damping: float,
    wanted: Iterable[Key],
  ) -> None:
    """Raises ValueError if these families answer another question."""
    ours = self.method, self.compensate_mean, self.damping
    asked = method, compensate_mean, damping
    if ours != asked:
      raise ValueError(
        'the families were made with (method, compensate_mean, damping) = '
        f'{ours}, asked for is {asked}'
      )
    for key in wanted:
      if key not in self._found:
        raise ValueError(f'no family of {key!r}; there are {list(self)[:4]}')

  @property
  def metrics(self) -> tuple[str, ...]:
    """The metrics that damages are known in, for every kernel."""
    return tuple(next(iter(self._found.values()))[0].damages)

  def damages(self, key: Key, metric: str) -> np.ndarray:
    """(R + 1,): what rank r of every kernel of a leaf costs together."""
    name = shared_left.names_of(key)[0]
    return np.sum(
      [methods.damages(name, family, metric) for family in self[key]], axis=0
    )

  def scaled(self, factors: Mapping[Key, float]) -> Families:
    """The same with the damages of each kernel times a factor.

    Args:
      factors: path to factor; other kernels keep their damages.
    """
    found = dict(self._found)
    for key, factor in factors.items():
      found[key] = [
        Family(f.factors, {k: factor * v for k, v in f.damages.items()})
        for f in self[key]
      ]
    return Families(found, self.method, self.compensate_mean, self.damping)


@compat.moves_data
def decompose(
  params: Any,
  moments: Moments,
  *,
  method: str = 'output',
  compensate_mean: bool = True,
  damping: float = methods.DAMPING,
  only: Iterable[Key] | None = None,
  keep_factors: bool = True,
  processes: bool = False,
  progress: bool = True,
) -> Families:
  """Factorizes every kernel at every rank.

  `budget_ranks` and `factorize` do so themselves; with the families in hand
  several budgets, and the factors of their ranks, cost one decomposition.

  Args:
    params: dense parameters.
    moments: moments of their kernels.
    method: as for `factorize`; all but 'utilized', whose pairs of different
      ranks are not each other's truncations.
    compensate_mean: as for `factorize`.
    damping: as for `factorize`.
    only: what to decompose; default all paths. A tuple of paths of kernels
      that read one value stands for one left factor for all of them.
    keep_factors: keep the factors, which `factorize` needs, beside what the
      ranks cost: two float64 matrices for each kernel.
    processes: share the kernels out over the processes of the job, as for
      `factorize`. The factors travel too, two float64 matrices for each
      kernel: still a small part of the time that making them takes. Without
      them (`keep_factors=False`) some kilobytes do.
    progress: show a progress bar; with `processes`, of this one's share.

  Raises:
    ValueError: an unknown method or path, moments without the gradients that
      the method needs, or processes that do not give the same arguments.

  >>> import jax.numpy as jnp, utilized_rank as ur
  >>> params = {'w': jnp.eye(8)}
  >>> x = jnp.tile(jnp.eye(8)[:2], (16, 1))
  >>> moments = ur.capture(lambda p, x: x @ p['w'])(params, x)[1]
  >>> families = decompose(params, moments, progress=False)
  >>> ranks = ur.budget_ranks(
  ...     params, moments, params_fraction=0.75, families=families)
  >>> small = ur.factorize(params, moments, ranks, families=families)
  >>> small['w'].rank  # the budget has room for more than data need, 1
  2
  """
  keys = list(moments if only is None else only)
  if processes:
    agree(
      'decompose',
      params,
      moments,
      method=method,
      compensate_mean=compensate_mean,
      damping=damping,
      only={key: place for place, key in enumerate(keys)},
      keep_factors=keep_factors,
    )
  methods.check_method(method, methods.FAMILIES)

  def make(unit: Unit) -> tuple[Key, Family]:
    key, _, group = unit
    family = shared_left.family(group, method, damping)
    return key, family if keep_factors else Family(None, family.damages)

  found: dict[Key, list[Family]] = {}
  for key, family in each_unit(
    make,
    params,
    moments,
    keys,
    centered=compensate_mean and method in methods.CENTERED,
    processes=processes,
    progress=progress,
    desc='decompose',
  ):
    found.setdefault(key, []).append(family)
  return Families(found, method, compensate_mean, damping)


def known(
  families: Families | None,
  params: Any,
  moments: Moments,
  wanted: Iterable[Key],
  method: str,
  compensate_mean: bool,
  damping: float,
  progress: bool,
) -> Families:
  """The families that were given, checked, or else made: damages alone."""
  if families is None:
    return decompose(
      params,
      moments,
      method=method,
      compensate_mean=compensate_mean,
      damping=damping,
      only=wanted,
      keep_factors=False,
      progress=progress,
    )
  families.check(method, compensate_mean, damping, wanted)
  return families

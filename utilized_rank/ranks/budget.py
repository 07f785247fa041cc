"""Ways to choose a rank for every kernel. A path that is absent stays dense."""

from __future__ import annotations

from collections.abc import Sequence
import re
from typing import Any

from utilized_rank.factorization import methods
from utilized_rank.factorization import shared_left
from utilized_rank.factorization.decompose import Families
from utilized_rank.factorization.decompose import known
from utilized_rank.moments.moments import Moments
from utilized_rank.products.gauge import check_gauge
from utilized_rank.ranks import offers
from utilized_rank.ranks.latency import LatencyTable


def budget_ranks(
  params: Any,
  moments: Moments,
  *,
  params_fraction: float | None = None,
  flops_fraction: float | None = None,
  latency_fraction: float | None = None,
  latency: LatencyTable | None = None,
  method: str | None = None,
  metric: str | None = None,
  multiple_of: int = 1,
  limits: Sequence[tuple[str, tuple[int, int]]] = (),
  compensate_mean: bool = True,
  damping: float = methods.DAMPING,
  gauge: str | None = None,
  share: bool = False,
  families: Families | None = None,
  progress: bool = True,
) -> dict[Any, int]:
  """The ranks of least predicted damage within a budget: the optimum.

  Staying dense is one of the choices of every kernel; a stack of kernels has
  one rank. The choices are a multiple-choice knapsack and are solved as such
  (`allocation.allocate`).

  Args:
    params: dense parameters.
    moments: moments of the kernels to shrink.
    params_fraction: share of the kernels' parameters to keep, in (0, 1]; or
    flops_fraction: share of the kernels' multiplications; or
    latency_fraction: share of the time that the kernels' products take; one of
      the three.
    latency: for `latency_fraction`, what `measure_latency` timed.
    method: how the kernels will be factorized; default 'loss' where the
      moments have gradients, else 'output'.
    metric: unit of damage that is added up over kernels: 'loss' in nats per
      example (the default where there are gradients), 'balanced' (the default
      else), the share of each kernel's output energy, weighed by what the
      kernel costs, and some of what uniform ranks minimise, so that no kernel
      is left with next to nothing; 'relative', that share alone, 'output',
      that energy itself, or 'geometric', the geometric mean of nats and
      share: where much is cut, nats are wrong by the most and shares are not.
    multiple_of: ranks are multiples of this, as matrix units like them (8 on
      a GPU, 128 on a TPU).
    limits: ordered `(regex, (lowest, highest))` rules over paths, full match,
      first match wins; a kernel with limits is never kept dense unless its
      highest is at least its full rank.
    compensate_mean: whether the mean will be compensated; it costs a constant
      where the function adds no bias.
    damping: as for `factorize`.
    gauge: as for `factorize`; what it saves is counted, multiplications as
      `low_rank` has them where rows are many.
    share: offer each set of kernels that read one value (q, k and v, say)
      one left factor for all of them as well.
    families: what `decompose` made of these parameters and moments, with the
      same method, `compensate_mean` and `damping`; default to do so here. With
      `share`, of those sets as well (`shared_left.sets`).
    progress: show a progress bar.

  Returns:
    Path to rank; kernels that stay dense are absent. With `share` a key may
    be a tuple of paths, as for `factorize`.

  Raises:
    ValueError: both a gauge and `share`, not one fraction, one outside
      (0, 1], a share of latency without its table, a budget that the lowest
      ranks exceed, rules that match nothing, moments without the gradients
      that the method or metric needs, or families made with other options.
  """
  fraction = one_fraction(params_fraction, flops_fraction, latency_fraction)
  if (latency_fraction is None) != (latency is None):
    raise ValueError(
      'latency_fraction= and latency= go together: a share of the time, and '
      'what measure_latency timed'
    )
  check_gauge(gauge)
  if latency is not None and (share or gauge is not None):
    raise ValueError(
      f'gauge={gauge!r}, share={share} with a latency table: pairs of their '
      'own were timed, without a gauge'
    )
  if share and gauge is not None:
    raise ValueError(
      f'gauge={gauge!r} is for kernels with factors of their own: give it, or '
      'share=True'
    )
  if multiple_of < 1:
    raise ValueError(f'multiple_of={multiple_of}: at least 1')
  has_gradients = moments.grads is not None
  method = method or ('loss' if has_gradients else 'output')
  metric = metric or ('loss' if has_gradients else 'balanced')
  if metric not in offers.METRICS:
    raise ValueError(f'unknown metric {metric!r}; known: {offers.METRICS}')
  bounds = _limits(moments, limits)
  sets = shared_left.sets(moments) if share else []
  set_of = {name: names for names in sets for name in names}
  keys = list(dict.fromkeys(set_of.get(path, path) for path in moments))
  wanted = [*moments, *sets]
  families = known(
    families,
    params,
    moments,
    wanted,
    method,
    compensate_mean,
    damping,
    progress,
  )
  terms = offers.Terms(
    moments,
    metric=metric,
    gauge=gauge,
    by_flops=flops_fraction is not None,
    latency=latency,
    compensate_mean=compensate_mean,
    multiple_of=multiple_of,
    limits=bounds,
  )
  found = [offers.offer(terms, key, families) for key in keys]
  total = sum(terms.dense_cost(key) for key in keys)
  return offers.together(offers.spend(found, int(fraction * total)))


def one_fraction(
  params_fraction: float | None,
  flops_fraction: float | None,
  latency_fraction: float | None = None,
) -> float:
  """The one that is given.

  Raises:
    ValueError: it is not one, or no share in (0, 1].
  """
  fractions = [
    f
    for f in (params_fraction, flops_fraction, latency_fraction)
    if f is not None
  ]
  if len(fractions) != 1 or not 0 < fractions[0] <= 1:
    raise ValueError(
      f'params_fraction={params_fraction}, flops_fraction={flops_fraction}, '
      f'latency_fraction={latency_fraction}: give one of them, a share in '
      '(0, 1]'
    )
  return fractions[0]


def _limits(
  moments: Moments, rules: Sequence[tuple[str, tuple[int, int]]]
) -> dict[str, tuple[int, int]]:
  found = {}
  for pattern, (low, high) in reversed(rules):
    hits = [p for p in moments if re.fullmatch(pattern, p)]
    if not hits:
      raise ValueError(
        f'the limits rule {pattern!r} matches no kernel; paths look like '
        f'{list(moments)[:3]}'
      )
    if not 1 <= low <= high:
      raise ValueError(
        f'limits {(low, high)} for {pattern!r}: 1 <= low <= high'
      )
    found.update(dict.fromkeys(hits, (low, high)))
  return found

"""Ways to choose a rank for every kernel. A path that is absent stays dense."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import re
from typing import Any

import numpy as np

from utilized_rank import allocation
from utilized_rank import methods
from utilized_rank import paths
from utilized_rank import subspace
from utilized_rank.kernels import kernels
from utilized_rank.layout import Layout
from utilized_rank.moments import Moments

# A stack of kernels has one rank, or one for each of its members.
Ranks = Mapping[str, int | tuple[int, ...]]


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
    cost += layout.num_groups * (
      rank * (d + m) if rank * (d + m) < d * m else d * m
    )
    if saves(layout, rank):
      ranks[path] = rank
  if cost > params_fraction * total:
    raise ValueError(
      f'params_fraction={params_fraction} keeps {params_fraction * total:.0f}'
      f' of {total} parameters; rank 1 everywhere needs {cost}'
    )
  return ranks


def budget_ranks(
  params: Any,
  moments: Moments,
  *,
  params_fraction: float | None = None,
  flops_fraction: float | None = None,
  method: str | None = None,
  metric: str | None = None,
  multiple_of: int = 1,
  limits: Sequence[tuple[str, tuple[int, int]]] = (),
  compensate_mean: bool = True,
  damping: float = methods.DAMPING,
) -> dict[str, int]:
  """The ranks of least predicted damage within a budget: the optimum.

  Staying dense is one of the choices of every kernel; a stack of kernels has
  one rank. The choices are a multiple-choice knapsack and are solved as such
  (`allocation.allocate`).

  Args:
    params: dense parameters.
    moments: moments of the kernels to shrink.
    params_fraction: share of the kernels' parameters to keep, in (0, 1]; or
    flops_fraction: share of the kernels' multiplications; one of the two.
    method: how the kernels will be factorized; default 'loss' where the
      moments have gradients, else 'output'.
    metric: unit of damage that is added up over kernels: 'loss' in nats per
      example (the default where there are gradients), 'relative', the share
      of each kernel's output energy (the default else), or 'output', that
      energy itself.
    multiple_of: ranks are multiples of this, as matrix units like them (8 on
      a GPU, 128 on a TPU).
    limits: ordered `(regex, (lowest, highest))` rules over paths, full match,
      first match wins; a kernel with limits is never kept dense unless its
      highest is at least its full rank.
    compensate_mean: whether the mean will be compensated; it costs a constant
      where the function adds no bias.
    damping: as for `factorize`.

  Returns:
    Path to rank; kernels that stay dense are absent.

  Raises:
    ValueError: no fraction or two, one outside (0, 1], a budget that the
      lowest ranks exceed, rules that match nothing, or moments without the
      gradients that the method or metric needs.
  """
  fractions = [f for f in (params_fraction, flops_fraction) if f is not None]
  if len(fractions) != 1 or not 0 < fractions[0] <= 1:
    raise ValueError(
      f'params_fraction={params_fraction}, flops_fraction={flops_fraction}: '
      'give one of them, a share in (0, 1]'
    )
  if multiple_of < 1:
    raise ValueError(f'multiple_of={multiple_of}: at least 1')
  has_gradients = moments.grads is not None
  method = method or ('loss' if has_gradients else 'output')
  metric = metric or ('loss' if has_gradients else 'relative')
  if metric not in methods.METRICS:
    raise ValueError(f'unknown metric {metric!r}; known: {methods.METRICS}')
  bounds = _limits(moments, limits)
  centered = compensate_mean and method in methods.CENTERED
  names, offers, ranks, total = [], [], [], 0
  for path, members in kernels(params, moments, centered=centered):
    moment = moments[path]
    layout = moment.layout
    d, m = layout.matrix_shape
    weight = 1 if flops_fraction is None else int(np.sum(moment.count))
    extra = 0
    if compensate_mean and moment.entry.bias is None and params_fraction:
      extra = m
    damage = np.sum(
      [
        methods.damages(k, methods.family(k, method, damping), metric)
        for k in members
      ],
      axis=0,
    )
    low, high = bounds.get(path, (1, layout.full_rank))
    choice = np.arange(multiple_of, layout.full_rank + 1, multiple_of)
    choice = choice[(choice >= low) & (choice <= high)]
    each = weight * (layout.num_groups if flops_fraction is None else 1)
    costs = each * (choice * (d + m) + extra)
    damage = damage[choice]
    dense = each * d * m
    total += dense
    if high >= layout.full_rank:
      # Where a pair costs as much as the kernel, the kernel is better.
      cheaper = costs < dense
      choice = np.append(choice[cheaper], 0)
      costs = np.append(costs[cheaper], dense)
      damage = np.append(damage[cheaper], 0.0)
    if not len(choice):
      raise ValueError(
        f'{path!r} has no rank that is a multiple of {multiple_of} within '
        f'its limits [{low}, {high}]'
      )
    names.append(path)
    ranks.append(choice)
    offers.append(allocation.Choices(costs.astype(np.int64), damage))
  solution = allocation.allocate(offers, int(fractions[0] * total))
  picked = {
    path: int(choice[i])
    for path, choice, i in zip(names, ranks, solution.picks, strict=True)
  }
  return {path: rank for path, rank in picked.items() if rank}


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


def predict_loss(
  params: Any,
  moments: Moments,
  ranks: Ranks,
  *,
  method: str = 'loss',
  compensate_mean: bool = True,
  damping: float = methods.DAMPING,
) -> float:
  """Predicted increase of the loss for a set of ranks, in nats per example.

  The sum over kernels of 1/2 tr(D^T S D G), times the rows of an example,
  with D = W - W': a quadratic approximation with a Kronecker-factored Fisher
  for each kernel, and no interaction between kernels.

  Args:
    params: dense parameters.
    moments: moments that were collected with a loss.
    ranks: path to rank.
    method: how the kernels are factorized.
    compensate_mean: as for `factorize`.
    damping: as for `factorize`.
  """
  check_ranks(ranks, moments)
  centered = compensate_mean and method in methods.CENTERED
  total = 0.0
  for path, members in kernels(params, moments, centered=centered, only=ranks):
    each = per_member(path, ranks[path], moments[path].layout)
    for kernel, rank in zip(members, each, strict=True):
      family = methods.family(kernel, method, damping)
      total += methods.damages(kernel, family, 'loss')[rank]
  return float(total)


def check_ranks(ranks: Ranks, moments: Mapping[str, Any]) -> None:
  """Raises ValueError for a rank that its kernel cannot have."""
  for path, given in ranks.items():
    if path not in moments:
      raise ValueError('a rank is given for ' + paths.unknown(path, moments))
    layout = moments[path].layout
    for rank in per_member(path, given, layout):
      if not 1 <= rank <= layout.full_rank or rank != int(rank):
        raise ValueError(
          f'rank {rank!r} for {path!r}: a {layout.matrix_shape} kernel has '
          f'ranks from 1 to {layout.full_rank}'
        )


def per_member(
  path: str, given: int | tuple[int, ...], layout: Layout
) -> tuple[int, ...]:
  """The rank of every matrix of a leaf, in the order of its groups."""
  if not isinstance(given, tuple):
    return (given,) * layout.num_groups
  if len(given) != layout.num_groups:
    raise ValueError(
      f'{len(given)} ranks for {path!r}, which holds {layout.num_groups} '
      'kernels: give one, or one for each'
    )
  return given

"""A run's dense parameters made smaller, as its options say."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import utilized_rank as ur
from utilized_rank import methods
from utilized_rank.compress_config import CompressConfig


def shrink(
  fn: Callable[[Any, Any], Any],
  params: Any,
  moments: ur.Moments,
  batches: Callable[[], Iterable[Any]],
  loss: Any,
  fraction: float,
  config: CompressConfig,
) -> tuple[Any, dict[str, int]]:
  """The dense tree with factors in it, and their ranks.

  Args:
    fn: `fn(params, batch) -> logits`.
    params: dense parameters.
    moments: of their kernels.
    batches: makes the calibration batches, for an allocation that tries ranks.
    loss: the one that the moments are of.
    fraction: share of the kernels' parameters to keep.
    config: the options.
  """
  if config.allocation == 'compress':
    small, report = ur.compress(
      fn,
      params,
      batches(),
      moments=moments,
      params_fraction=fraction,
      loss=loss,
      heads=config.heads,
    )
    assert report.recipe is not None
    return small, dict(report.recipe.ranks)
  ranks = _ranks(params, moments, fraction, config)
  small = ur.factorize(
    params,
    moments,
    ranks,
    method=config.method,
    compensate_mean=config.compensate_mean,
  )
  return small, ranks


def _ranks(
  params: Any, moments: ur.Moments, fraction: float, config: CompressConfig
) -> dict[str, int]:
  if config.allocation == 'uniform':
    return ur.uniform_ranks(params, moments, params_fraction=fraction)
  # The paper's form has no ranks of its own under a budget.
  method = config.method
  return ur.budget_ranks(
    params,
    moments,
    params_fraction=fraction,
    method='output' if method == methods.UTILIZED else method,
    compensate_mean=config.compensate_mean,
  )

"""The best recipe in one call."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from utilized_rank import paths
from utilized_rank.collect import collect
from utilized_rank.factorize import factorize
from utilized_rank.gradients import LossFn
from utilized_rank.ranks import budget_ranks
from utilized_rank.report import Report
from utilized_rank.report import measure


def compress(
  fn: Callable[[Any, Any], Any],
  params: Any,
  batches: Iterable[Any],
  *,
  params_fraction: float | None = None,
  flops_fraction: float | None = None,
  loss: LossFn | None = None,
  select: paths.Rules | None = None,
  multiple_of: int = 1,
  energy: float = 0.99,
  progress: bool = True,
) -> tuple[Any, Report]:
  """Collects, measures, chooses ranks and factorizes.

  With a loss, ranks and factors are those of least predicted loss; without,
  those of least error at the kernels' outputs.

  Args:
    fn: `fn(params, batch) -> outputs`.
    params: dense parameters.
    batches: calibration batches, each a pytree whose arrays lead with the
      batch axis.
    params_fraction: share of the kernels' parameters to keep, in (0, 1]; or
    flops_fraction: share of their multiplications.
    loss: `loss(outputs, batch) -> (B,)`, nats per example, such as
      `sampled_cross_entropy()`.
    select: ordered `(regex, bool)` rules over leaf paths; default all kernels.
    multiple_of: ranks are multiples of this.
    energy: share of the spectra that the report's ranks are at.
    progress: show a progress bar.

  Returns:
    The tree for `low_rank(fn)`, and the `Report` of the dense one.

  Raises:
    As `collect`, `budget_ranks` and `factorize`.

  >>> fn = lambda params, x: x @ params['w']
  >>> params = {'w': jnp.eye(8)}
  >>> x = jnp.tile(jnp.eye(8)[:2], (16, 1))
  >>> small, report = compress(
  ...     fn, params, [x], params_fraction=0.75, progress=False)
  >>> small['w'].rank, report['w'].rank  # about their mean, rows differ in one
  (1, 2)
  """
  moments = collect(
    fn, params, batches, loss=loss, select=select, progress=progress
  )
  method = 'output' if loss is None else 'loss'
  ranks = budget_ranks(
    params,
    moments,
    params_fraction=params_fraction,
    flops_fraction=flops_fraction,
    method=method,
    multiple_of=multiple_of,
  )
  report = measure(params, moments, energy=energy)
  return factorize(params, moments, ranks, method=method), report

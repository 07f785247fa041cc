"""The best recipe in one call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sized
import itertools
from typing import Any

from utilized_rank import paths
from utilized_rank.collect import check_batch
from utilized_rank.collect import collect
from utilized_rank.divergence import Divergence
from utilized_rank.divergence import squared_error
from utilized_rank.factorize import factorize
from utilized_rank.gauge import IDENTITY
from utilized_rank.gradients import LossFn
from utilized_rank.report import Report
from utilized_rank.report import measure
from utilized_rank.tune import tune_ranks


def compress(
  fn: Callable[[Any, Any], Any],
  params: Any,
  batches: Iterable[Any],
  *,
  params_fraction: float | None = None,
  flops_fraction: float | None = None,
  loss: LossFn | None = None,
  divergence: Divergence | None = None,
  select: paths.Rules | None = None,
  multiple_of: int = 1,
  gauge: str | None = IDENTITY,
  trial_examples: int = 512,
  energy: float = 0.99,
  progress: bool = True,
) -> tuple[Any, Report]:
  """Collects, measures, chooses ranks and factorizes.

  Factors of least error at the kernels' outputs and, with a loss, of least
  predicted loss are tried with the ranks that several predictions ask for;
  the best are corrected by what is seen at the outputs (`tune_ranks`).

  Args:
    fn: `fn(params, batch) -> outputs`.
    params: dense parameters.
    batches: calibration batches, each a pytree whose arrays lead with the
      batch axis.
    params_fraction: share of the kernels' parameters to keep, in (0, 1]; or
    flops_fraction: share of their multiplications.
    loss: `loss(outputs, batch) -> (B,)`, nats per example, such as
      `sampled_cross_entropy()`.
    divergence: how far outputs are from the dense ones, see `tune_ranks`;
      default the KL divergence of the loss's logits for
      `sampled_cross_entropy`, else `squared_error`.
    select: ordered `(regex, bool)` rules over leaf paths; default all kernels.
    multiple_of: ranks are multiples of this.
    gauge: as for `factorize`; None where the order of outputs that 'identity'
      restores costs more time than its r^2 multiplications.
    trial_examples: as many of the first examples are kept to try ranks on.
    energy: share of the spectra that the report's ranks are at.
    progress: show progress bars.

  Returns:
    The tree for `low_rank(fn)`, and the `Report` of the dense one.

  Raises:
    As `collect`, `tune_ranks` and `factorize`.

  >>> fn = lambda params, x: x @ params['w']
  >>> params = {'w': jnp.eye(8)}
  >>> x = jnp.tile(jnp.eye(8)[:2], (16, 1))
  >>> small, report = compress(
  ...     fn, params, [x], params_fraction=0.75, progress=False)
  >>> small['w'].rank, report['w'].rank  # about their mean, rows differ in one
  (1, 2)
  """
  rest = iter(batches)
  kept: list[Any] = []
  examples = 0
  while examples < trial_examples and (batch := next(rest, None)) is not None:
    examples += check_batch(batch, len(kept))
    kept.append(batch)
  moments = collect(
    fn,
    params,
    batches if isinstance(batches, Sized) else itertools.chain(kept, rest),
    loss=loss,
    select=select,
    progress=progress,
  )
  if divergence is None:
    divergence = getattr(loss, 'divergence', squared_error)
  ranks = tune_ranks(
    fn,
    params,
    moments,
    kept,
    divergence=divergence,
    params_fraction=params_fraction,
    flops_fraction=flops_fraction,
    multiple_of=multiple_of,
    gauge=gauge,
    progress=progress,
  )
  families = ranks.families
  small = factorize(
    params,
    moments,
    ranks,
    method=families.method,
    damping=families.damping,
    families=families,
    gauge=gauge,
    progress=progress,
  )
  return small, measure(params, moments, energy=energy)

"""What `compress` will take, from a small piece of it; `plan` with it."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import itertools
from typing import Any
import warnings

import jax

from utilized_rank.collection.one_pass import check_batch
from utilized_rank.collection.plan import Plan
from utilized_rank.collection.plan import plan as plan_collection
from utilized_rank.compression import compress as compressing
from utilized_rank.compression.problem import TRIAL_EXAMPLES
from utilized_rank.factorization.kernels import ENOUGH_ROWS
from utilized_rank.moments.capture import find_sites
from utilized_rank.moments.gradients import LossFn
from utilized_rank.report import choice
from utilized_rank.report import tables
from utilized_rank.report.choice import Stage
from utilized_rank.tree import paths


@dataclasses.dataclass(frozen=True)
class CompressPlan(Plan):
  """Cost of a collection, and of the compression that it is for.

  Attributes:
    stages: of `compress`, with predicted seconds and memory on the host.
    examples: as many as they are for.
  """

  stages: tuple[Stage, ...] = ()
  examples: int = 0

  @property
  def seconds(self) -> float:
    return sum(stage.seconds for stage in self.stages)

  @property
  def cpu_seconds(self) -> float:
    return sum(stage.cpu_seconds for stage in self.stages)

  @property
  def host_bytes(self) -> int:
    """The most that the process will hold on the host."""
    return max((stage.peak_bytes or 0 for stage in self.stages), default=0)

  def __str__(self) -> str:
    said = (
      f'compress for {self.examples:,} examples: {self.seconds:.0f} s, '
      f'{self.cpu_seconds:.0f} s of all cores, '
      f'{self.host_bytes / 2**20:,.0f} MiB'
    )
    titles, rows = choice.stage_table(self.stages)
    table = tables.text_table(titles[:4], [row[:4] for row in rows])
    return f'{super().__str__()}\n\n{said}\n{table}'


def plan(
  fn: Callable[[Any, Any], Any],
  params: Any,
  batch: Any,
  *,
  loss: LossFn | None = None,
  select: paths.Rules | None = None,
  compress: bool = False,
  examples: int = TRIAL_EXAMPLES,
  params_fraction: float = 0.5,
  **options: Any,
) -> Plan:
  """Says what `collect` will cost, and what `compress` will.

  The collection is planned without running anything, from what XLA reports for
  the compiled step (`collection.plan.plan`). A compression is timed: it is run
  with as many copies of the batch as its least factors need, again, and with
  twice as many, and the difference stands for every further batch. That takes
  about as long as compressing on few data does, and shows what compiling does.

  Args:
    fn: `fn(params, batch) -> outputs`.
    params: its parameters; without `compress` their shapes do.
    batch: one batch; without `compress` its shapes do.
    loss: as in `collect`.
    select: as in `collect`.
    compress: whether to predict what `compress` takes as well.
    examples: how many it is to be for.
    params_fraction: the share that it is to keep; it matters little.
    **options: others of `collection.plan.plan` (`mask`, `memory_limit`, ...),
      or of `compress` with it.

  Returns:
    A `Plan`; with `compress` a `CompressPlan`.

  Raises:
    ValueError: as `collect` and `compress`; shapes where there must be arrays.

  >>> import jax.numpy as jnp
  >>> fn = lambda params, x: x @ params['w']
  >>> costs = plan(fn, {'w': jnp.zeros((4, 3))}, jnp.zeros((5, 4)))
  >>> costs.sums_bytes, costs.forward_flops, costs.passes
  (84, 120, (('w',),))
  """
  if not compress:
    return plan_collection(
      fn, params, batch, loss=loss, select=select, **options
    )
  if any(
    isinstance(leaf, jax.ShapeDtypeStruct)
    for leaf in jax.tree.leaves((params, batch))
  ):
    raise ValueError(
      'plan(compress=True) runs a piece of it: give arrays, not their shapes'
    )
  costs = plan_collection(fn, params, batch, loss=loss, select=select)
  stages = _stages(
    fn,
    params,
    batch,
    examples,
    loss=loss,
    select=select,
    params_fraction=params_fraction,
    **options,
  )
  known = {f.name: getattr(costs, f.name) for f in dataclasses.fields(costs)}
  return CompressPlan(**known, stages=stages, examples=examples)


def _stages(
  fn: Callable[[Any, Any], Any],
  params: Any,
  batch: Any,
  examples: int,
  *,
  select: paths.Rules | None,
  **options: Any,
) -> tuple[Stage, ...]:
  """Every stage, for so many examples."""
  size = check_batch(batch, 0)
  every = -(-examples // size)
  trials = -(-options.get('trial_examples', TRIAL_EXAMPLES) // size)
  sites = find_sites(fn, params, batch, select=select)
  # So many batches make factors that can be fitted anew.
  piece = max(
    -(-ENOUGH_ROWS * site.matrix_shape[0] // max(site.rows, 1))
    for site in sites.values()
  )
  few = piece > every
  piece = min(piece, every)

  def run(batches: int) -> dict[str, Stage]:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')  # they are about copies of a batch
      _, report = compressing.compress(
        fn,
        params,
        list(itertools.repeat(batch, batches)),
        select=select,
        few=few,
        progress=False,
        **options,
      )
    assert report.choice is not None
    return {stage.name: stage for stage in report.choice.stages}

  cold = run(piece)
  twice = min(2 * piece, every)
  if twice == piece:
    return tuple(cold.values())
  warm, more = run(piece), run(twice)
  found = []
  for name, stage in cold.items():
    wanted = every if name == 'collect' else min(every, trials)
    times = max(wanted - piece, 0) / (twice - piece)

    def grown(start: float, small: float, large: float, times=times) -> float:
      return start + times * max(large - small, 0)

    one, two = warm.get(name, stage), more.get(name, stage)
    peak = None
    if stage.peak_bytes and one.peak_bytes and two.peak_bytes:
      peak = int(grown(stage.peak_bytes, one.peak_bytes, two.peak_bytes))
    found.append(
      Stage(
        name,
        grown(stage.seconds, one.seconds, two.seconds),
        grown(stage.cpu_seconds, one.cpu_seconds, two.cpu_seconds),
        peak,
      )
    )
  return tuple(found)

"""The utilized rank of a checkpoint that is larger than memory."""

from __future__ import annotations

from collections.abc import Iterable
import contextlib
import dataclasses
import os
import shutil
import tempfile
from typing import Any

from utilized_rank.host.progress import say
from utilized_rank.linalg.subspace import check_energy
from utilized_rank.report.layer import LayerReport
from utilized_rank.report.measure import measure
from utilized_rank.report.report import Report
from utilized_rank.streaming import phases
from utilized_rank.streaming.damages import without_scarce
from utilized_rank.streaming.ledger import Ledger
from utilized_rank.streaming.sweep import Leaves
from utilized_rank.streaming.sweep import Sweep
from utilized_rank.tree import paths


def measure_checkpoint(
  path: str | os.PathLike[str],
  batches: Iterable[Any],
  *,
  energy: float = 0.99,
  centered: bool = False,
  select: paths.Rules | None = None,
  work_dir: str | os.PathLike[str] | None = None,
  progress: bool = True,
  **options: Any,
) -> Report:
  """Measures a checkpoint block by block; one block is in memory at a time.

  As `collect` and `measure`, but for `error_projected`, which is None: it would
  need the moments again.

  Args:
    path: as for `compress_checkpoint`.
    batches: see there.
    energy: as for `measure`.
    centered: as for `measure`.
    select: as for `compress_checkpoint`.
    work_dir: for what is not finished: called again with the same arguments, a
      process that was killed goes on with the block that it was at. Removed
      when done. Default a temporary directory, which goes with the process.
    progress: show progress bars.
    **options: as for `load_checkpoint`.

  Raises:
    ValueError: as `compress_checkpoint` and `measure` do.

  >>> import utilized_rank as ur
  >>> print(ur.measure_checkpoint('llama-7b', batches))  # doctest: +SKIP
  """
  check_energy(energy)
  sweep = Sweep.of(path, batches, select, options)
  with contextlib.ExitStack() as stack:
    if work_dir is None:
      work = stack.enter_context(tempfile.TemporaryDirectory())
    else:
      work = os.fspath(work_dir)
    own = {'energy': energy, 'centered': centered, 'select': select}
    ledger = Ledger(work, phases.identity(sweep) | own)
    sweep.warn_if_scarce()
    if progress:
      say(f'{sweep.coverage}; unfinished work is in {work}')
    report = _measured(sweep, ledger, work, energy, centered, progress)
    if work_dir is not None:
      shutil.rmtree(work)
  return report


def _measured(
  sweep: Sweep,
  ledger: Ledger,
  work: str,
  energy: float,
  centered: bool,
  progress: bool,
) -> Report:
  folder = os.path.join(work, 'reports')
  os.makedirs(folder, exist_ok=True)
  file = lambda number: os.path.join(folder, f'{number:06d}.json')
  dense = phases.run_of(sweep, work, 'dense')
  sweep.streams.dense = dense
  for number in phases.rest(sweep, ledger, 'measure', [dense], progress):
    if sweep.is_needed(number):
      report = _block(sweep, number, energy, centered)
      if report is not None:
        report.save(file(number))
  found = [
    Report.load(file(number))
    for number, block in enumerate(sweep.blocks)
    if block.reads
  ]
  layers = [layer for report in found for layer in report.layers]
  return Report(layers, energy, centered, sweep.coverage)


def _block(
  sweep: Sweep, number: int, energy: float, centered: bool
) -> Report | None:
  """Measures a block, if it has kernels, and takes the run through it."""
  leaves = sweep.leaves(number)
  report = None
  if sweep.blocks[number].reads:
    report = _layers(sweep, number, leaves, energy, centered)
  if sweep.is_followed(number):
    sweep.streams.through(number, leaves, sweep.streams.dense)
  return report


def _layers(
  sweep: Sweep, number: int, leaves: Leaves, energy: float, centered: bool
) -> Report:
  moments = sweep.moments(number, leaves)
  layers: dict[str, LayerReport] = {}
  for group in sweep.inputs_of(moments):
    with without_scarce():
      report = measure(
        leaves,
        moments.only(group),
        energy=energy,
        centered=centered,
        progress=False,
      )
    layers |= {
      name: dataclasses.replace(layer, projected=None)
      for name, layer in report.items()
    }
  return Report([layers[path] for path in moments], energy, centered)

"""The blocks of a model one after the other, as far as they are not done."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
import os
from typing import Any

from utilized_rank.host import usage
from utilized_rank.host.progress import track
from utilized_rank.models.importing.files import shards
from utilized_rank.storage.recipe import versions_here
from utilized_rank.streaming.ledger import Ledger
from utilized_rank.streaming.states import States
from utilized_rank.streaming.sweep import Sweep


def run_of(sweep: Sweep, work: str, name: str) -> States:
  """A run of all batches through the model, before its first block."""
  folder = os.path.join(work, 'between', name)
  return States(folder, sweep.streams.programs, sweep.starts)


def rest(
  sweep: Sweep,
  ledger: Ledger,
  phase: str,
  runs: Sequence[States],
  progress: bool,
) -> Iterator[int]:
  """The blocks that are left of a phase.

  Each is finished when the next one is asked for; the last has no kernels.
  What was kept between blocks is removed with it.

  Args:
    sweep: the model.
    ledger: what is finished.
    phase: what is done with the blocks, in a word.
    runs: what is to stand before each block.
    progress: show a progress bar.
  """
  count = len(sweep.blocks)
  first = ledger.finished(phase)
  numbers: Iterable[int] = range(first, count)
  if progress:
    numbers = track(numbers, total=count - first, desc=phase, unit='block')
  for number in numbers:
    for run in runs:
      run.stand_before(number)
    yield number
    usage.return_freed()
    ledger.finish(phase, number + 1)
  for run in runs:
    run.remove()


def identity(sweep: Sweep) -> dict[str, Any]:
  """What decides on a job's numbers, but for the job's own arguments."""
  opened = sweep.opened
  return {
    'checkpoint': files_of(opened.path),
    'model': repr(opened.model),
    'batches': sweep.digest,
    'versions': versions_here(),
  }


def files_of(path: str) -> list[list[Any]]:
  """Names, sizes and times of a checkpoint's files."""
  found = shards.files(path) if shards.is_several(path) else [path]
  about = [os.stat(file) for file in found]
  return [
    [os.path.basename(file), stat.st_size, stat.st_mtime_ns]
    for file, stat in zip(found, about, strict=True)
  ]

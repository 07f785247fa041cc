"""A bit flipped in what a finished run left, and a run that goes on from it."""

from __future__ import annotations

import contextlib
import io
import pathlib
import shutil
from typing import Any

import numpy as np

from benchmarks.shared import launches
from utilized_rank.command import errors
from utilized_rank.experiment import pipeline
from utilized_rank.experiment.settings import STAGES

# Of each kind: where it is, and the first stage that the run does again, which
# reads it; None where all are done. Of checkpoints the newest is read.
KINDS: dict[str, tuple[str, str | None]] = {
  'checkpoints of training': ('train/4', 'train'),
  'dense parameters': ('dense', 'collect'),
  'moments': ('moments', 'measure'),
  'factors': ('factorized', 'finetune'),
  'checkpoints of fine-tuning': ('finetune/0.5/4', 'finetune'),
  'fine-tuned factors': ('finetuned', 'evaluate'),
  'utilization.json': ('utilization.json', 'report'),
  'results of stages': ('stages', None),
  'config.json': ('config.json', None),
  'report.json': ('report.json', None),
  'report.html': ('report.html', None),
}


def flip(path: pathlib.Path, rng: np.random.Generator) -> str:
  """Flips a bit of a file, or of one of a folder's files; says which."""
  paths = [path] if path.is_file() else sorted(path.rglob('*'))
  paths = [p for p in paths if p.is_file() and p.stat().st_size]
  chosen = paths[rng.integers(len(paths))]
  content = bytearray(chosen.read_bytes())
  place = int(rng.integers(8 * len(content)))
  content[place // 8] ^= 1 << place % 8
  chosen.write_bytes(content)
  return f'{chosen.relative_to(path.parent)}, bit {place}'


def forget(workdir: pathlib.Path, first: str) -> None:
  """Removes the marks of a stage and of those after it, and nothing else."""
  for stage in STAGES[STAGES.index(first) :]:
    (workdir / 'stages' / f'{stage}.json').unlink(missing_ok=True)
    shutil.rmtree(workdir / 'stages' / stage, ignore_errors=True)


def flipped(
  kind: str,
  finished: pathlib.Path,
  copy: pathlib.Path,
  config: Any,
  rng: np.random.Generator,
) -> dict[str, Any]:
  """What a run makes of one flipped bit.

  Args:
    kind: a key of `KINDS`.
    finished: the folder of a finished run.
    copy: where a copy is damaged, and gone on from.
    config: the run's.
    rng: draws the bit.

  Returns:
    The kind, the file, and the `outcome`: 'refused', 'same numbers', or what
    should not be.
  """
  where, first = KINDS[kind]
  shutil.rmtree(copy, ignore_errors=True)
  shutil.copytree(finished, copy)
  page = (copy / 'report.html').read_text()
  found = {'kind': kind, 'file': flip(copy / where, rng)}
  if first is not None:
    forget(copy, first)
  errors.prepare()  # as the command does
  said = io.StringIO()
  try:
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
      pipeline.run(config, copy)
  except ValueError as error:
    named = str(copy) in str(error) and '\n' not in str(error)
    outcome = 'refused' if named else 'refused, not saying what'
    return {**found, 'outcome': outcome, 'says': _short(error, copy)}
  except Exception as error:  # whatever it is, the command would not say it
    outcome = f'raised {type(error).__name__}'
    return {**found, 'outcome': outcome, 'says': _short(error, copy)}
  try:
    same = launches.numbers(copy) == launches.numbers(finished)
  except ValueError:  # the report is no JSON any more
    same = False
  # A page that was made again has other times in it.
  kept = where != 'report.html' or 'made again' in said.getvalue()
  kept = kept or (copy / where).read_text() == page
  outcome = 'same numbers' if same and kept else 'OTHER NUMBERS'
  return {**found, 'outcome': outcome}


def _short(error: Exception, copy: pathlib.Path) -> str:
  return str(error).replace(str(copy), 'WORKDIR')[:300]

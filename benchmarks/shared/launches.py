"""Launched runs of the smallest experiment: stopping one, and what it left."""

from __future__ import annotations

import json
import os
import pathlib
import runpy
import subprocess
import sys
import time
from typing import Any, NamedTuple

import jax

from utilized_rank.host import files

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = 'configs/digits_vit.py'
# Of `digits_vit:testing`, the smallest there is: one block, one fraction.
OVERRIDES: dict[str, Any] = {
  'model.depth': 1,
  'compress.fractions': (0.5,),
  'compress.calibration_images': 64,
  'train.steps': 4,
  'train.checkpoint_every': 2,
  'finetune.steps': 4,
  'finetune.checkpoint_every': 2,
}
TREES = ('dense', 'moments', 'factorized/0.5', 'finetuned/0.5')
_TIMES = ('seconds', 'latency_ms')
_LOOK = 0.02  # seconds between two looks at a process's clock


class Ended(NamedTuple):
  """How a process ended.

  Attributes:
    code: exit code; minus the signal's number if one ended it.
    delivered: whether the signal was sent, before it ended by itself.
    stage: the stage that it was in when it ended or was sent the signal;
      'start' before the first, 'end' once the report was written.
    err: its stderr.
    cpu_seconds: of all its threads.
  """

  code: int
  delivered: bool
  stage: str
  err: str
  cpu_seconds: float

  @property
  def last_line(self) -> str:
    return (self.err.strip().splitlines() or [''])[-1]

  @property
  def is_one_line(self) -> bool:
    """Whether the error is one line, which says what is wrong."""
    return self.last_line.startswith('error: ') and 'Traceback' not in self.err


def environment(folder: pathlib.Path) -> None:
  """Sets the environment of this process and of those that it starts.

  Compiled programs and matplotlib's fonts are kept in the folder, and XLA does
  not optimize: a run is mostly compilation.
  """
  os.environ['XLA_FLAGS'] = '--xla_backend_optimization_level=0'
  os.environ['MPLCONFIGDIR'] = str(folder / 'matplotlib')
  for name, value in (
    ('jax_platforms', 'cpu'),
    ('jax_compilation_cache_dir', str(folder / 'compiled')),
    ('jax_persistent_cache_min_compile_time_secs', 0.0),
    ('jax_persistent_cache_min_entry_size_bytes', -1),
  ):
    os.environ[name.upper()] = str(value)
    jax.config.update(name, value)  # which has read its environment already


def config(folder: pathlib.Path) -> Any:
  """The config of the runs, for this process."""
  made = runpy.run_path(str(ROOT / CONFIG))['get_config']('testing')
  made.update_from_flattened_dict(
    {**OVERRIDES, 'data.data_dir': str(folder / 'data')}
  )
  return made


class Launched:
  """A launched run that goes on.

  Args:
    workdir: the run's directory.
    folder: where the digits are prepared, and what the run says is kept.
    name: of the files that hold what it says.
  """

  def __init__(self, workdir: pathlib.Path, folder: pathlib.Path, name: str):
    values = {**OVERRIDES, 'data.data_dir': folder / 'data'}
    self._out, self._err = (folder / f'{name}.{v}' for v in ('out', 'err'))
    with open(self._err, 'w') as err, open(self._out, 'w') as out:
      self._process = subprocess.Popen(
        [sys.executable, '-W', 'ignore', '-m', 'launch.main']
        + [f'--config={CONFIG}:testing', f'--workdir={workdir}']
        + [f'--config.{key}={value}' for key, value in values.items()],
        cwd=ROOT,
        stdout=out,
        stderr=err,
      )

  def cpu_seconds(self) -> float:
    """What the process has used so far, on Linux."""
    stat = pathlib.Path(f'/proc/{self._process.pid}/stat').read_text()
    user, system = stat.rpartition(')')[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf('SC_CLK_TCK')

  def stage(self) -> str:
    """See `Ended`."""
    lines = self._err.read_text().splitlines()
    names = [v.split()[1] for v in lines if v.startswith('stage ')]
    if self._out.stat().st_size:
      return 'end'
    return names[-1] if names else 'start'

  def until_stage(self) -> None:
    """Waits until it is in a stage, or has ended."""
    while not self._is_over() and self.stage() == 'start':
      time.sleep(_LOOK)

  def _is_over(self) -> bool:
    how = os.WEXITED | os.WNOHANG | os.WNOWAIT
    return os.waitid(os.P_PID, self._process.pid, how) is not None

  def ended(self, number: int = 0, at: float | None = None) -> Ended:
    """Waits for its end, and may send it a signal before.

    Args:
      number: of the signal.
      at: CPU seconds after which it is sent; None for never.
    """
    delivered = False
    # Not waited for: until then its clock can be read.
    while at is not None and not self._is_over():
      if self.cpu_seconds() >= at:
        self._process.send_signal(number)
        delivered = True
        break
      time.sleep(_LOOK)
    stage = self.stage()
    _, status, usage = os.wait4(self._process.pid, 0)
    stage = stage if delivered else self.stage()
    self._process.returncode = os.waitstatus_to_exitcode(status)
    return Ended(
      code=self._process.returncode,
      delivered=delivered,
      stage=stage,
      err=self._err.read_text(),
      cpu_seconds=usage.ru_utime + usage.ru_stime,
    )


# --- what a run left ---


def numbers(workdir: pathlib.Path) -> dict[str, Any]:
  """What a finished run found: its report but for times, and its arrays.

  The arrays by the digests that `ur.save` keeps of each.
  """
  from orbax.checkpoint import v1

  report = json.loads((workdir / 'report.json').read_text(encoding='utf-8'))
  kept = {t: v1.metadata(str(workdir / t)).custom_metadata for t in TREES}
  trees = {t: v['utilized_rank']['checksums'] for t, v in kept.items() if v}
  return {'report': _timeless(report), 'arrays': trees}


def _timeless(value: Any) -> Any:
  if isinstance(value, dict):
    return {k: _timeless(v) for k, v in value.items() if k not in _TIMES}
  return [_timeless(v) for v in value] if isinstance(value, list) else value


def temporary(workdir: pathlib.Path) -> list[str]:
  """Files and folders beside under a temporary name; the outermost ones."""
  found = [
    str(path.relative_to(workdir))
    for path in sorted(workdir.rglob('*'))
    if path.name.endswith('.tmp') or '-checkpoint-tmp' in path.name
  ]
  return [v for v in found if not any(v.startswith(f'{o}/') for o in found)]


def unreadable(workdir: pathlib.Path) -> list[str]:
  """JSON under its own name that is none, or not what was written."""
  found = []
  for path in sorted(workdir.rglob('*.json')):
    try:
      files.parsed(path)
    except ValueError:
      found.append(str(path.relative_to(workdir)))
  return found

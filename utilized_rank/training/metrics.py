"""The metrics of a training loop: gathered, checked, shown and written."""

from __future__ import annotations

from collections.abc import Callable
import json
import math
import os
import time
import types
from typing import Any

import jax
import numpy as np

from utilized_rank.host.extras import extra


class DivergedError(FloatingPointError):
  """The loss or the gradient became NaN or infinite."""


class Log:
  """Gathers metrics on the device; fetches, checks and writes them rarely.

  Args:
    directory: of `metrics.jsonl`, of which lines after `start` are dropped;
      None writes nothing.
    start: steps that an earlier run has done.
    desc: name of the run, for errors.
    every: steps between two lines.
    schedule: the learning rate after so many steps, or None.
    tensorboard: write events there as well; needs tensorboardX.
  """

  def __init__(
    self,
    directory: str | os.PathLike[str] | None,
    start: int,
    desc: str,
    *,
    every: int,
    schedule: Callable[[int], Any] | None = None,
    tensorboard: bool = False,
  ):
    self._desc = desc
    self._every = every
    self._schedule = schedule
    self._window: list[dict[str, jax.Array]] = []
    self._examples = 0
    self._since = time.monotonic()
    self._text = ''
    self._path = self._events = None
    if directory is not None:
      self._path = os.path.join(directory, 'metrics.jsonl')
      kept = _lines_until(self._path, start) if start else []
      with open(self._path, 'w', encoding='utf-8') as file:
        file.writelines(kept)
    if tensorboard:
      self._events = _event_writer(directory, start)

  def __enter__(self) -> Log:
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    traceback: types.TracebackType | None,
  ) -> None:
    if self._events is not None:
      self._events.close()

  def status(self) -> str:
    return self._text

  def add(
    self,
    step: int,
    metrics: dict[str, jax.Array],
    examples: int,
    *,
    flush: bool,
  ) -> None:
    self._window.append(metrics)
    self._examples += examples
    if not flush and step % self._every:
      return
    first = step - len(self._window) + 1
    window = jax.device_get(self._window)
    seconds = time.monotonic() - self._since
    for i, values in enumerate(window):
      for name in ('loss', 'grad_norm'):
        if not math.isfinite(values[name]):
          raise DivergedError(
            f'{self._desc}: {name} is {values[name]} at step {first + i}, '
            f'seen in steps {first} to {step}. Lower the learning rate'
            f'{self._rate_at(first + i - 1)}, or check the '
            'data and the parameters for values that are not finite.'
          )
    record: dict[str, float] = {'step': step}
    for name in window[0]:
      record[name] = float(np.mean([values[name] for values in window]))
    if self._schedule is not None:
      record['learning_rate'] = float(self._schedule(step - 1))
    record['examples_per_second'] = round(self._examples / seconds, 1)
    shown = [name for name in window[0] if name != 'grad_norm']
    self._text = ', '.join(f'{name} {record[name]:.4f}' for name in shown)
    self.write(record)
    self._window, self._examples = [], 0
    self._since = time.monotonic()

  def write(self, record: dict[str, float]) -> None:
    """Writes one line; `step` is in it."""
    if self._path is not None:
      with open(self._path, 'a', encoding='utf-8') as file:
        file.write(json.dumps(record) + '\n')
    if self._events is not None:
      for name, value in record.items():
        if name != 'step':
          self._events.add_scalar(name, value, int(record['step']))

  def _rate_at(self, step: int) -> str:
    if self._schedule is None:
      return ''
    return f' ({float(self._schedule(step)):.3g} there)'


def _event_writer(directory: Any, start: int) -> Any:
  """Writes events for TensorBoard, those after `start` being dropped there.

  Raises:
    ValueError: there is no directory.
    ImportError: tensorboardX is not installed.
  """
  if directory is None:
    raise ValueError('tensorboard=True writes into directory=, which is None')
  try:
    with extra('tensorboard'):
      from tensorboardX import SummaryWriter
  except ImportError as error:
    raise ImportError(
      f'tensorboard=True needs the package tensorboardX: {error}; '
      'metrics.jsonl holds the same numbers without it'
    ) from error
  return SummaryWriter(os.fspath(directory), purge_step=start + 1)


def _lines_until(path: str, step: int) -> list[str]:
  """The lines that a run which goes on after `step` keeps."""
  kept = []
  if os.path.exists(path):
    with open(path, encoding='utf-8') as file:
      for line in file:
        # The last line may be cut off, where the run was killed.
        if line.endswith('\n') and json.loads(line)['step'] <= step:
          kept.append(line)
  return kept

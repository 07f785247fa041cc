"""The metrics of a training loop: gathered, checked, shown and written."""

from __future__ import annotations

from collections.abc import Callable
import json
import math
import os
import time
from typing import Any

import jax
import numpy as np


class DivergedError(FloatingPointError):
  """The loss or the gradient became NaN or infinite."""


class Log:
  """Gathers metrics on the device; fetches, checks and writes them rarely."""

  def __init__(
    self,
    directory: str | os.PathLike[str] | None,
    start: int,
    desc: str,
    *,
    batch_size: int,
    every: int,
    schedule: Callable[[int], Any],
  ):
    self._desc = desc
    self._batch_size = batch_size
    self._every = every
    self._schedule = schedule
    self._window: list[dict[str, jax.Array]] = []
    self._since = time.monotonic()
    self._text = ''
    self._path = None
    if directory is not None:
      self._path = os.path.join(directory, 'metrics.jsonl')
      kept = _lines_until(self._path, start)
      with open(self._path, 'w', encoding='utf-8') as file:
        file.writelines(kept)

  def status(self) -> str:
    return self._text

  def add(
    self, step: int, metrics: dict[str, jax.Array], *, flush: bool
  ) -> None:
    self._window.append(metrics)
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
            f'seen in steps {first} to {step}. Lower the learning rate '
            f'({float(self._schedule(first + i - 1)):.3g} there), or check the '
            'data and the parameters for values that are not finite.'
          )
    record: dict[str, float] = {'step': step}
    for name in window[0]:
      record[name] = float(np.mean([values[name] for values in window]))
    record['learning_rate'] = float(self._schedule(step - 1))
    images = len(window) * self._batch_size
    record['images_per_second'] = round(images / seconds, 1)
    shown = [name for name in window[0] if name != 'grad_norm']
    self._text = ', '.join(f'{name} {record[name]:.4f}' for name in shown)
    if self._path is not None:
      with open(self._path, 'a', encoding='utf-8') as file:
        file.write(json.dumps(record) + '\n')
    self._window = []
    self._since = time.monotonic()


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

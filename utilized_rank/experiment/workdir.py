"""The directory of a run: its config, its finished stages, their results."""

from __future__ import annotations

from collections.abc import Callable
import json
import os
import time
from typing import Any

from utilized_rank.host import files


class Workdir:
  """One run's directory. Every file in it appears whole or not at all.

  Attributes:
    path: the directory.
  """

  def __init__(self, path: str | os.PathLike[str], config: dict[str, Any]):
    """Opens the directory, or makes it.

    Args:
      path: where.
      config: nested JSON of the run's configuration.

    Raises:
      ValueError: the directory holds a run of another configuration, or
        something that is no run.
    """
    self.path = os.path.abspath(os.fspath(path))
    config = json.loads(json.dumps(config))
    if os.path.exists(self.file('config.json')):
      there = self.read('config.json')
      if there != config:
        raise ValueError(
          f'{self.path!r} belongs to a run of another config: '
          f'{_first_difference(there, config)}; give a new --workdir, or '
          'the config it was started with'
        )
    elif os.path.isdir(self.path) and os.listdir(self.path):
      raise ValueError(
        f'{self.path!r} is not empty and holds no run (no config.json); '
        'give a new or empty --workdir'
      )
    else:
      os.makedirs(self.path, exist_ok=True)
      self.write('config.json', config)

  def file(self, *names: str) -> str:
    return os.path.join(self.path, *names)

  def read(self, name: str) -> Any:
    """Reads a JSON file.

    Raises:
      ValueError: it is damaged.
    """
    with open(self.file(name), encoding='utf-8') as f:
      text = f.read()
    try:
      return json.loads(text)
    except json.JSONDecodeError as error:
      raise ValueError(
        f'{self.file(name)!r} is damaged ({error}); remove it to make it again'
      ) from error

  def write(self, name: str, value: Any) -> None:
    """Writes JSON beside the file, then renames it into place."""
    self.write_text(name, json.dumps(value, indent=1) + '\n')

  def write_text(self, name: str, text: str) -> None:
    os.makedirs(os.path.dirname(self.file(name)), exist_ok=True)
    files.write_text(self.file(name), text)

  def finished(self, stage: str) -> bool:
    """Whether a stage has left its result."""
    return os.path.exists(self.file(f'stages/{stage}.json'))

  def stage(self, name: str, run: Callable[[], Any]) -> Any:
    """The stage's result, run now or read from an earlier start.

    Args:
      name: the stage's name.
      run: does the work and returns its JSON result.
    """
    done = f'stages/{name}.json'
    if not self.finished(name):
      start = time.perf_counter()
      result = run()
      seconds = time.perf_counter() - start
      self.write(done, {'seconds': seconds, 'result': result})
    return self.read(done)['result']

  def seconds(self) -> dict[str, float]:
    """Duration of each finished stage, as of its last start."""
    folder = self.file('stages')
    if not os.path.isdir(folder):
      return {}
    names = [n[:-5] for n in os.listdir(folder) if n.endswith('.json')]
    return {n: self.read(f'stages/{n}.json')['seconds'] for n in names}


def _first_difference(there: Any, here: Any, where: str = '') -> str:
  if isinstance(there, dict) and isinstance(here, dict):
    for key in [*there, *here]:
      a, b = there.get(key, '(absent)'), here.get(key, '(absent)')
      if a != b:
        return _first_difference(a, b, f'{where}.{key}' if where else key)
  return f'{where} is {there!r} there and {here!r} here'

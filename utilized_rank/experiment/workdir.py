"""The directory of a run: its config, its finished stages, their results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import contextlib
import json
import os
import shutil
import time
from typing import Any

from utilized_rank.host import files

FRACTIONS = 'compress.fractions'
_CONFIG = 'config.json'
# What to do about a damaged file; without its config a folder holds no run.
_REMEDY = 'remove it to make it again'
_WITHOUT_CONFIG = (
  'give a new --workdir: what the run was asked for is not known any more'
)


class Workdir:
  """One run's directory. Every file in it appears whole or not at all.

  Attributes:
    path: the directory.
  """

  def __init__(
    self,
    path: str | os.PathLike[str],
    config: dict[str, Any],
    *,
    stages: Sequence[str] = (),
    first_reader: Callable[[str], str] = lambda key: '',
    redo: str | None = None,
  ):
    """Opens the directory, or makes it.

    What a finished stage has read may not change under it: another config is
    taken where no stage is finished and no training under way, where only
    stages from `redo` on read what is different, or where nothing is but the
    fractions, each of which is a result of its own.

    Args:
      path: where.
      config: nested JSON of the run's configuration.
      stages: their names, in order.
      first_reader: the first stage that reads a key such as `train.steps`.
      redo: the stage to forget, with those after it.

    Raises:
      ValueError: the directory holds a run of another configuration, or
        something that is no run; `redo` is no stage.
    """
    if redo is not None and redo not in stages:
      raise ValueError(f'no stage {redo!r}; there are {", ".join(stages)}')
    self.path = os.path.abspath(os.fspath(path))
    config = json.loads(json.dumps(config))
    if os.path.exists(self.file(_CONFIG)):
      there = self.read(_CONFIG, _WITHOUT_CONFIG)
      self._change(_differences(there, config), stages, first_reader, redo)
      if there != config:
        self.write(_CONFIG, config)
    elif self._holds_something():
      raise ValueError(
        f'{self.path!r} is not empty and holds no run (no config.json); '
        'give a new or empty --workdir'
      )
    else:
      os.makedirs(self.path, exist_ok=True)
      self.write(_CONFIG, config)

  def _change(
    self,
    changed: Sequence[tuple[str, Any, Any]],
    stages: Sequence[str],
    first_reader: Callable[[str], str],
    redo: str | None,
  ) -> None:
    """Forgets what another config would make otherwise, if that is allowed."""
    place = lambda key: stages.index(first_reader(key)) if stages else 0
    begun = changed and self._is_begun()
    fixed = [c for c in changed if c[0] != FRACTIONS] if begun else []
    if fixed:
      first = min(place(key) for key, _, _ in fixed)
      if redo is None or stages.index(redo) > first:
        key, there, here = fixed[0]
        text = (
          f'{self.path!r} belongs to a run of another config: {key} is '
          f'{there!r} there and {here!r} here; give a new --workdir, or the '
          'config it was started with'
        )
        if stages:
          text += f', or --redo={stages[first]}: that and what follows is lost'
        raise ValueError(text)
    if begun and len(fixed) < len(changed):
      for stage in stages[place(FRACTIONS) :]:
        self.forget(stage)
    if redo is not None:
      for stage in stages[stages.index(redo) :]:
        self.forget(stage)
        for folder in (self.file('stages', stage), self.file(stage)):
          shutil.rmtree(folder, ignore_errors=True)

  def _holds_something(self) -> bool:
    """Whether there are files but those of a start that was cut short."""
    own = {_CONFIG, 'process.json'}
    names = os.listdir(self.path) if os.path.isdir(self.path) else []
    return any(name.removesuffix('.tmp') not in own for name in names)

  def _is_begun(self) -> bool:
    """Whether a stage is finished, or steps of training are saved."""
    steps = self.file('train')
    return bool(self.seconds()) or (
      os.path.isdir(steps) and any(n.isdigit() for n in os.listdir(steps))
    )

  def forget(self, stage: str) -> None:
    """Removes the mark of a stage: it is run again."""
    with contextlib.suppress(FileNotFoundError):
      os.remove(self.file(f'stages/{stage}.json'))

  def file(self, *names: str) -> str:
    return os.path.join(self.path, *names)

  def read(self, name: str, remedy: str = _REMEDY) -> Any:
    """Reads a JSON file.

    Args:
      name: of the file.
      remedy: what to do where it is damaged.

    Raises:
      ValueError: it is damaged.
    """
    try:
      return files.parsed(self.file(name))
    except ValueError as error:
      raise ValueError(
        f'{self.file(name)!r} is damaged ({error}); {remedy}'
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

  def stage(
    self, name: str, run: Callable[[], Any], made: Sequence[str] = ()
  ) -> Any:
    """The stage's result, run now or read from an earlier start.

    Args:
      name: the stage's name.
      run: does the work and returns its JSON result.
      made: files that it makes for others to read; their digests are kept.
    """
    done = f'stages/{name}.json'
    if not self.finished(name):
      start = time.perf_counter()
      result = run()
      seconds = time.perf_counter() - start
      record = {'seconds': seconds, 'result': result}
      if made:
        record['made'] = {n: files.digest(self.file(n)) for n in made}
      self.write(done, files.sealed(record))
    return self.read(done)['result']

  def changed(self, stage: str, made: Sequence[str]) -> list[str]:
    """Files of a finished stage that are gone, or not what it made."""
    if not self.finished(stage):
      return []
    # Stages of before 0.2.0 kept no digests: what is there is taken as it is.
    kept = self.read(f'stages/{stage}.json').get('made', {})
    found = {name: files.digest(self.file(name)) for name in made}
    return [n for n, d in found.items() if d is None or d != kept.get(n, d)]

  def seconds(self) -> dict[str, float]:
    """Duration of each finished stage, as of its last start."""
    folder = self.file('stages')
    if not os.path.isdir(folder):
      return {}
    names = [n[:-5] for n in os.listdir(folder) if n.endswith('.json')]
    return {n: self.read(f'stages/{n}.json')['seconds'] for n in names}


def _differences(
  there: Any, here: Any, where: str = ''
) -> list[tuple[str, Any, Any]]:
  """(key, value there, value here) of all that differ."""
  if not (isinstance(there, dict) and isinstance(here, dict)):
    return [] if there == here else [(where, there, here)]
  absent = '(absent)'
  return [
    found
    for key in dict.fromkeys([*there, *here])
    for found in _differences(
      there.get(key, absent),
      here.get(key, absent),
      f'{where}.{key}' if where else key,
    )
  ]

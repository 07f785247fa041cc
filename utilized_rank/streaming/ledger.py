"""What is finished of a job that may be interrupted at any time."""

from __future__ import annotations

from collections.abc import Mapping
import json
import os
from typing import Any

from utilized_rank.host import files

_FILE = 'ledger.json'


class Ledger:
  """How many parts of each phase are finished, in a file of a folder.

  >>> import tempfile
  >>> folder = tempfile.mkdtemp()
  >>> Ledger(folder, {'share': 0.5}).finish('fit', 3)
  >>> Ledger(folder, {'share': 0.5}).finished('fit')
  3
  >>> Ledger(folder, {'share': 0.25})  # doctest: +ELLIPSIS
  Traceback (most recent call last):
  ...
  ValueError: ... was begun with share=0.5; this run has 0.25. Give the same...
  """

  def __init__(self, folder: str, identity: Mapping[str, Any]):
    """Begins a job, or goes on with it.

    Args:
      folder: made when it is not there.
      identity: JSON values that decide what is computed.

    Raises:
      ValueError: what is there was begun with others, or is damaged.
    """
    self._path = os.path.join(folder, _FILE)
    self._identity = json.loads(json.dumps(dict(identity)))
    self._done: dict[str, int] = {}
    os.makedirs(folder, exist_ok=True)
    if not os.path.exists(self._path):
      if strange := os.listdir(folder):
        raise ValueError(
          f'{folder} holds {sorted(strange)[:3]} and no {_FILE}: it is no job '
          'that was interrupted. Give another folder.'
        )
      self._write()
      return
    of = lambda record: (dict(record['identity']), dict(record['done']))
    was, self._done = files.read_json(self._path, 'ledger', of)
    for key in sorted({*was, *self._identity}):
      if was.get(key) != self._identity.get(key):
        raise ValueError(
          f'{folder} was begun with {key}={_short(was.get(key))}; this run has '
          f'{_short(self._identity.get(key))}. Give the same, or delete the '
          'folder to begin anew.'
        )

  def finished(self, phase: str) -> int:
    """How many parts of a phase are."""
    return self._done.get(phase, 0)

  def finish(self, phase: str, count: int) -> None:
    """Writes down that so many are, before what they read may be removed."""
    self._done[phase] = count
    self._write()

  def _write(self) -> None:
    record = {'identity': self._identity, 'done': self._done}
    files.write_json(self._path, record, indent=1)


def _short(value: Any) -> str:
  text = repr(value)
  return text if len(text) < 200 else f'{text[:200]}...'

"""Running sums on disk, with the place in the data that they reach.

A process writes under a name of its own, so that processes may be killed at
different places; a snapshot is complete or absent, and the one before it goes
only when it is there. A process alone writes with orbax. Those of a job write a
file each: orbax lets its saves wait for those of all other processes, which may
be elsewhere, or done (0.12 compares their paths, and mixes up their signals,
whatever its `active_processes` say).
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
from typing import Any

import jax
import numpy as np

from utilized_rank.host import processes
from utilized_rank.moments.moments import Moments
from utilized_rank.storage import checkpoint

_GONE = 'finished-'


class Snapshots:
  """The snapshots of this process's part of one collection.

  >>> import tempfile
  >>> Snapshots(tempfile.mkdtemp() + '/sums').latest() is None
  True
  """

  def __init__(self, folder: str | os.PathLike[str]):
    self.folder = os.path.abspath(os.fspath(folder))
    self.name = processes.own_name()
    self._mine = os.path.join(self.folder, self.name)
    self._suffix = '' if jax.process_count() == 1 else '.npz'

  def latest(self) -> tuple[dict[str, Moments], int, Any] | None:
    """(sums by name, batches, iterator's state), or None.

    Raises:
      ValueError: the folder is something else, or of another number of
        processes.
    """
    if not os.path.isdir(self.folder):
      return None
    count = jax.process_count()
    others = [
      name
      for name in os.listdir(self.folder)
      if not name.startswith(_GONE)
      and not (name.startswith('process-') and name.endswith(f'-of-{count}'))
    ]
    if others:
      raise ValueError(
        f'{self.folder!r} holds no running sums of a collection by {count} '
        f'processes: there is {sorted(others)[0]!r}'
      )
    done = self._numbers()
    if not done:
      return None
    where = self._path(done[-1])
    if self._suffix:
      tree, record = checkpoint.load_file(where)
    else:
      tree = checkpoint.load(where)
      record = checkpoint.load_metadata(where)
    return tree, record['batches'], _unpack(record['iterator'])

  def save(self, sums: dict[str, Moments], done: int, place: Any) -> None:
    """Writes a snapshot after `done` batches, then drops the one before."""
    tree = jax.tree.map(np.asarray, sums)
    os.makedirs(self._mine, exist_ok=True)
    where, record = (
      self._path(done),
      {'batches': done, 'iterator': _pack(place)},
    )
    if self._suffix:
      checkpoint.save_file(where, tree, record)
    else:
      checkpoint.save(where, tree, metadata=record, overwrite=True)
    for other in os.scandir(self._mine):
      if other.path != where:
        (shutil.rmtree if other.is_dir() else os.remove)(other.path)

  def remove(self) -> None:
    """Removes this process's snapshots, at one stroke for whoever looks."""
    if os.path.isdir(self._mine):
      gone = os.path.join(self.folder, _GONE + self.name)
      shutil.rmtree(gone, ignore_errors=True)
      os.rename(self._mine, gone)
      shutil.rmtree(gone)
    with contextlib.suppress(OSError):  # until the last process is done
      os.rmdir(self.folder)

  def _path(self, done: int) -> str:
    return os.path.join(self._mine, f'{done}{self._suffix}')

  def _numbers(self) -> list[int]:
    if not os.path.isdir(self._mine):
      return []
    names = [n.removesuffix(self._suffix) for n in os.listdir(self._mine)]
    return sorted(int(n) for n in names if n.isdigit())


def place_of(iterator: Any) -> Any:
  """Where an iterator is, if it can say: `get_state()` or `state_dict()`."""
  for get, put in _PROTOCOLS:
    if hasattr(iterator, get) and hasattr(iterator, put):
      return getattr(iterator, get)()
  return None


def go_to(iterator: Any, place: Any) -> None:
  """Puts an iterator where `place_of` found it.

  Raises:
    ValueError: it has no such thing.
  """
  for get, put in _PROTOCOLS:
    if hasattr(iterator, get) and hasattr(iterator, put):
      getattr(iterator, put)(place)
      return
  raise ValueError(
    'the snapshot has the state of a data iterator, and this '
    f'{type(iterator).__name__} has neither set_state nor load_state_dict; '
    'pass the same kind of batches as in the interrupted collection'
  )


_PROTOCOLS = [
  ('get_state', 'set_state'),  # grain
  ('state_dict', 'load_state_dict'),
]


def _pack(place: Any) -> Any:
  """JSON of an iterator's state."""
  if isinstance(place, bytes):
    return {'bytes': base64.b64encode(place).decode()}
  try:
    return {'json': json.loads(json.dumps(place))}
  except TypeError as error:
    raise TypeError(
      f"the data iterator's state is a {type(place).__name__} that JSON cannot "
      f'hold ({error}); bytes and JSON can be saved'
    ) from error


def _unpack(record: Any) -> Any:
  if 'bytes' in record:
    return base64.b64decode(record['bytes'])
  return record['json']

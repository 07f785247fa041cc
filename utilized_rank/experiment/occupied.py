"""One process at a time in a run's directory."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import json
import os
import socket
import sys

import jax

from utilized_rank.host import files

_NAME = 'process.json'


@contextlib.contextmanager
def occupied(path: str | os.PathLike[str]) -> Iterator[None]:
  """Holds a directory, which is made if need be, against other processes.

  The lock is the operating system's and on the directory itself: it goes with
  the process, however that ends, and leaves nothing to be cleaned up. Of a job
  of several processes the first one holds it.

  Raises:
    ValueError: another process holds it; names the process and its host.
  """
  if sys.platform == 'win32':  # where two runs are not told apart
    yield
    return
  import fcntl

  if jax.distributed.is_initialized() and jax.process_index():
    yield
    return
  os.makedirs(path, exist_ok=True)
  handle = os.open(path, os.O_RDONLY)
  try:
    try:
      fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise ValueError(
        f'{os.fspath(path)!r} is in use by {_holder(path)}; wait for it, or '
        'give another --workdir'
      ) from error
    except OSError:  # a file system without locks
      pass
    yield
  finally:
    os.close(handle)


def sign(path: str | os.PathLike[str]) -> None:
  """Writes who holds the directory, for those who would like to."""
  about = {'pid': os.getpid(), 'host': socket.gethostname()}
  files.write_text(os.path.join(path, _NAME), json.dumps(about) + '\n')


def _holder(path: str | os.PathLike[str]) -> str:
  try:
    with open(os.path.join(path, _NAME), encoding='utf-8') as file:
      about = json.load(file)
    return f'pid {about["pid"]} on {about["host"]}'
  except (OSError, ValueError, KeyError):
    return 'another process'

"""What a terminal shows: little, and one line of what a user can mend."""

from __future__ import annotations

import atexit
from collections.abc import Iterator
import contextlib
import errno
import os
import shutil
import sys
import tempfile

from utilized_rank.host.extras import extra
from utilized_rank.host.stopping import Preempted
from utilized_rank.walk.interpret import UnsupportedError

with extra('all'):
  from absl import logging

_FULL = os.strerror(errno.ENOSPC)


def same_command() -> str:
  """How to go on where the command line says it all."""
  return f'the same command again: {" ".join(sys.argv)}'


@contextlib.contextmanager
def in_one_line(again: str = '') -> Iterator[None]:
  """Ends the process with one line for errors that speak for themselves.

  Args:
    again: how to go on with what was stopped.

  Raises:
    SystemExit: in their place; `--verbosity=1` shows where they were raised.
  """
  try:
    yield
  except Preempted as error:
    raise SystemExit(f'stopped: {error}. To go on, {again}') from error
  except KeyboardInterrupt as error:
    raise SystemExit(f'stopped at once. To go on, {again}') from error
  except Exception as error:
    logging.debug('failed', exc_info=True)
    if full := _full(error):
      raise SystemExit(
        f'error: the disk is full: {full}. Make room; to go on, {again}'
      ) from error
    if isinstance(
      error,
      (ValueError, OSError, ImportError, FloatingPointError, UnsupportedError),
    ):
      raise SystemExit(f'error: {error}') from error
    raise


def prepare() -> None:
  """Keeps libraries from what nobody asked for.

  absl sets INFO, where orbax tells of every file; matplotlib would write its
  caches to the home folder.
  """
  if 'MPLCONFIGDIR' not in os.environ:
    folder = os.environ['MPLCONFIGDIR'] = tempfile.mkdtemp(prefix='matplotlib-')
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
  if logging.get_verbosity() == logging.INFO:
    logging.set_verbosity(logging.WARNING)


def _full(error: BaseException) -> str:
  """What says so, of an error or of those behind it; writers have their own."""
  seen: BaseException | None = error
  while seen is not None:
    if _FULL in str(seen):
      return str(seen).splitlines()[0]
    seen = seen.__cause__ or seen.__context__
  return ''

"""What a terminal shows: little, and one line of what a user can mend."""

from __future__ import annotations

import atexit
from collections.abc import Iterator
import contextlib
import errno
from logging import LogRecord
from logging import getLogger as get_logger
import os
import shlex
import shutil
import sys
import tempfile
from typing import Any

from utilized_rank.host.extras import extra
from utilized_rank.host.stopping import Preempted
from utilized_rank.walk.interpret import UnsupportedError

with extra('all'):
  from absl import logging

_FULL = os.strerror(errno.ENOSPC)
# How orbax, reading what is damaged, begins to tell of what it then raises.
_RAISED_TOO = ('Failed to get metadata', 'Task exception was never retrieved')


def same_command() -> str:
  """How to go on where the command line says it all."""
  module = sys.modules['__main__'].__spec__
  # The file of a module that `python -m` runs is no command.
  start = sys.argv[:1] if module is None else ['python', '-m', module.name]
  return f'the same command again: {shlex.join([*start, *sys.argv[1:]])}'


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
  caches to the home folder. An error in orbax's threads is raised where they
  are waited for, and needs not to be told of by each of them before.
  """
  for logger in (logging.get_absl_logger(), get_logger('asyncio')):
    logger.addFilter(_is_news)
  sys.unraisablehook = _unraisable
  if 'MPLCONFIGDIR' not in os.environ:
    folder = os.environ['MPLCONFIGDIR'] = tempfile.mkdtemp(prefix='matplotlib-')
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
  if logging.get_verbosity() == logging.INFO:
    logging.set_verbosity(logging.WARNING)


def _is_news(record: LogRecord) -> bool:
  raised = record.exc_info and 'orbax' in record.pathname
  raised = raised or record.getMessage().startswith(_RAISED_TOO)
  return not raised or logging.level_debug()


def _unraisable(found: Any) -> None:
  # Writes that were under way when orbax gave up end in threads of C++.
  if str(found.exc_value) != 'Event loop is closed' or logging.level_debug():
    sys.__unraisablehook__(found)


def _full(error: BaseException) -> str:
  """What says so, of an error or of those behind it; writers have their own."""
  seen: BaseException | None = error
  while seen is not None:
    if _FULL in str(seen):
      return str(seen).splitlines()[0]
    seen = seen.__cause__ or seen.__context__
  return ''

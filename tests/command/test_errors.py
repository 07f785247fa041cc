"""Which errors end in one line, and what it says."""

import errno
import logging as standard_logging
import os
import sys
import tempfile
import types

from absl import logging
import pytest

import utilized_rank as ur
from utilized_rank.command.errors import in_one_line
from utilized_rank.command.errors import prepare
from utilized_rank.command.errors import same_command


@pytest.mark.quick
@pytest.mark.parametrize(
  'error, says',
  [
    (ValueError('no'), 'error: no'),
    (PermissionError(errno.EROFS, 'Read-only file system', 'f'), 'error: .*f'),
    (FloatingPointError('loss is nan'), 'error: loss is nan'),
    (ModuleNotFoundError('x is not installed'), 'error: x is not installed'),
    (ur.UnsupportedError('a/b: cond'), 'error: a/b: cond'),
    (ur.Preempted('step 3'), 'stopped: step 3. To go on, call it'),
    (KeyboardInterrupt(), 'stopped at once. To go on, call it'),
  ],
)
def test_errors_that_speak_for_themselves(error, says):
  with (
    pytest.raises(SystemExit, match=f'^{says}') as found,
    in_one_line('call it'),
  ):
    raise error
  assert '\n' not in str(found.value)


def test_a_full_disk_is_seen_behind_what_a_writer_raises():
  def write():
    try:
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), 'a/b')
    except OSError as error:
      raise RuntimeError('checkpoint failed') from error

  says = 'error: the disk is full: .*Make room'
  with pytest.raises(SystemExit, match=says), in_one_line('call it'):
    write()


def test_matplotlib_writes_nothing_to_the_home_folder(monkeypatch):
  monkeypatch.delenv('MPLCONFIGDIR', raising=False)
  prepare()
  folder = os.environ['MPLCONFIGDIR']
  assert os.path.dirname(folder) == tempfile.gettempdir()
  monkeypatch.setenv('MPLCONFIGDIR', 'mine')
  prepare()
  assert os.environ['MPLCONFIGDIR'] == 'mine'


def test_what_threads_of_a_save_tell_is_left_to_the_save(monkeypatch):
  monkeypatch.setattr(sys, 'unraisablehook', None)  # else it stays
  prepare()
  logger = logging.get_absl_logger()
  tell = lambda path, info, says='no': logger.filter(
    standard_logging.LogRecord('absl', 40, path, 1, says, (), info)
  )
  info = (OSError, OSError('disk'), None)
  said: list[str] = []
  show = lambda found: said.append(str(found.exc_value))
  monkeypatch.setattr(sys, '__unraisablehook__', show)
  assert not tell('site-packages/orbax/checkpoint/future.py', info)
  assert tell('site-packages/orbax/checkpoint/future.py', None)
  assert tell('utilized_rank/x.py', info)
  assert not tell('x.py', None, 'Failed to get metadata for checkpointable')
  assert not standard_logging.getLogger('asyncio').filter(
    standard_logging.makeLogRecord(
      {'msg': 'Task exception was never retrieved\nfuture: ...'}
    )
  )
  for text in ('Event loop is closed', 'another'):
    error = RuntimeError(text)
    sys.unraisablehook(
      types.SimpleNamespace(
        exc_type=RuntimeError,
        exc_value=error,
        exc_traceback=None,
        err_msg=None,
        object=None,
      )
    )
  assert said == ['another']
  monkeypatch.setattr(logging, 'level_debug', lambda: True)
  assert tell('site-packages/orbax/checkpoint/future.py', info)


def test_how_to_go_on_is_a_command(monkeypatch):
  main = sys.modules['__main__']
  monkeypatch.setattr(sys, 'argv', ['/x/main.py', '--fractions=(0.5,)'])
  for spec, program in [
    (None, '/x/main.py'),
    (types.SimpleNamespace(name='launch.main'), 'python -m launch.main'),
  ]:
    monkeypatch.setattr(main, '__spec__', spec)
    assert same_command() == (
      f"the same command again: {program} '--fractions=(0.5,)'"
    )


def test_a_mistake_of_ours_keeps_its_traceback():
  with pytest.raises(ZeroDivisionError), in_one_line():
    _ = 1 / 0

"""Which errors end in one line, and what it says."""

import errno
import os
import tempfile

import pytest

import utilized_rank as ur
from utilized_rank.command.errors import in_one_line
from utilized_rank.command.errors import prepare


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


def test_a_mistake_of_ours_keeps_its_traceback():
  with pytest.raises(ZeroDivisionError), in_one_line():
    _ = 1 / 0

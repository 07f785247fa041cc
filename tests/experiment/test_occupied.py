"""One process at a time: what is said, and that nothing stays behind."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest

from utilized_rank.experiment.occupied import occupied
from utilized_rank.experiment.occupied import sign

HOLD = """
import sys, time
from utilized_rank.experiment.occupied import occupied, sign
with occupied(sys.argv[1]):
  sign(sys.argv[1])
  print('held', flush=True)
  time.sleep(600)
"""


def test_a_second_one_is_told_of_the_first_until_it_is_gone(tmp_path):
  other = subprocess.Popen(
    [sys.executable, '-W', 'ignore', '-c', HOLD, tmp_path],
    stdout=subprocess.PIPE,
    cwd=pathlib.Path(__file__).parents[2],
  )
  assert other.stdout.readline() == b'held\n'
  says = f"'{tmp_path}' is in use by pid {other.pid} on {os.uname().nodename}"
  with pytest.raises(ValueError, match=says), occupied(tmp_path):
    pass
  other.send_signal(signal.SIGKILL)
  other.wait()
  other.stdout.close()
  with occupied(tmp_path):  # what it had written does not matter
    sign(tmp_path)
  assert str(os.getpid()) in (tmp_path / 'process.json').read_text()


def test_a_holder_that_has_not_signed_is_another_process(tmp_path):
  with occupied(tmp_path):
    says = 'in use by another process; wait'
    with pytest.raises(ValueError, match=says), occupied(tmp_path):
      pass
  assert not list(tmp_path.iterdir())

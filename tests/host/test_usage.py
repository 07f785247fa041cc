"""What a step takes."""

import time

import numpy as np
import pytest

from utilized_rank.host import usage

pytestmark = pytest.mark.slow


def test_a_step_that_holds_memory_and_gives_it_back():
  with usage.measured() as before:
    time.sleep(0.12)
  with usage.measured() as step:
    held = np.ones(2**25)  # 256 MiB
    time.sleep(0.2)
    del held
  with usage.measured() as after:
    time.sleep(0.12)
  most = before.peak_bytes + 0.9 * 2**28
  assert step.peak_bytes > most
  assert after.peak_bytes < most, 'of this step, not of all before it'
  assert 0.2 <= step.seconds < 10
  assert step.cpu_seconds < step.seconds + 1


def test_a_step_that_fails_is_measured():
  with pytest.raises(KeyError), usage.measured() as step:
    time.sleep(0.01)
    raise KeyError
  assert step.seconds >= 0.01


def test_where_the_system_does_not_say(monkeypatch):
  monkeypatch.setattr(usage, 'held', lambda: 0)
  monkeypatch.setattr(usage, '_most_ever', lambda: 0)
  with usage.measured() as step:
    pass
  assert step.peak_bytes is None

"""Signals: the first one asks, what was there before comes back."""

import os
import signal
import threading

import pytest

from utilized_rank.host import processes
from utilized_rank.host import stopping


@pytest.mark.quick
@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_asks_once(number, capsys):
  before = signal.getsignal(number)
  with stopping.on_signals():
    assert not processes.is_leaving(1)
    os.kill(os.getpid(), number)
    assert stopping.asked() and processes.is_leaving(2)
    assert signal.getsignal(number) == before  # a second one ends it
  assert not stopping.asked()
  assert signal.getsignal(number) == before
  said = capsys.readouterr().err
  assert said == (
    f'{signal.Signals(number).name}: stopping after this step; again to stop '
    'at once\n'
  )


def test_a_thread_takes_no_signals():
  def work():
    with stopping.on_signals():
      found.append(signal.getsignal(signal.SIGINT))

  found = []
  thread = threading.Thread(target=work)
  thread.start()
  thread.join()
  assert found == [signal.getsignal(signal.SIGINT)]

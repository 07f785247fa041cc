"""Progress on a terminal and elsewhere."""

import io
import sys
import time

import pytest

from utilized_rank.host import progress


class Terminal(io.StringIO):
  def isatty(self):
    return True


class Clock:
  """Seconds that pass when they are told to."""

  def __init__(self, monkeypatch):
    self.now = 0.0
    monkeypatch.setattr(progress.time, 'monotonic', lambda: self.now)


@pytest.mark.quick
def test_quiet_when_short(capsys):
  assert list(progress.track(range(5), total=5, desc='x')) == [0, 1, 2, 3, 4]
  with progress.working('y'):
    pass
  assert capsys.readouterr() == ('', '')


def worked(clock, ends, **options):
  """Items, each of which takes until a time; the clock moves as one works."""
  for i, end in zip(
    progress.track(range(len(ends)), **options), ends, strict=True
  ):
    del i
    clock.now = end


def test_lines_when_long(capsys, monkeypatch):
  clock = Clock(monkeypatch)
  worked(
    clock,
    [6.0, 12.0],
    total=4,
    desc='x',
    unit='step',
    initial=2,
    status=lambda: 'hi',
  )
  lines = capsys.readouterr().err.splitlines()
  assert lines[0] == 'x: 3/4 step, 0.167 step/s, 6 s left, hi'
  assert lines[1] == 'x: 4/4 step, 0.167 step/s, 0 s left, hi'
  assert len(lines) == 2


def test_lines_without_a_total(capsys, monkeypatch):
  worked(Clock(monkeypatch), [6.0, 12.0])
  err = capsys.readouterr().err
  assert len(err.splitlines()) == 2 and 'left' not in err


def test_lines_become_rarer(capsys, monkeypatch):
  worked(Clock(monkeypatch), [float(i) for i in range(1, 701)], desc='x')
  lines = capsys.readouterr().err.splitlines()
  at = [int(line.split()[1]) for line in lines[:-1]]
  gaps = [after - before for before, after in zip(at, at[1:])]
  assert gaps[:10] == [5] * 10 and gaps[-1] == 30
  assert gaps == sorted(gaps)


def test_one_long_step_is_not_silent(capsys, monkeypatch):
  """A thread says it while the loop waits."""
  monkeypatch.setattr(progress, 'LINE_INTERVAL', 0.05)
  with progress.working('fit'):
    for _ in progress.track(range(1), total=1, desc='compile', unit='step'):
      time.sleep(0.5)
    lines = capsys.readouterr().err.splitlines()
    # Half a second is ten times the interval.
    assert lines[:2] == ['compile: 0/1 step, 0 s'] * 2
    time.sleep(0.5)
  assert capsys.readouterr().err.startswith('fit: 1 s\n')
  time.sleep(0.2)
  assert capsys.readouterr().err == ''


def test_a_loop_that_fails_is_not_said_for_ever(capsys, monkeypatch):
  """Its generator may be held by a traceback, as in a notebook."""
  monkeypatch.setattr(progress, 'LINE_INTERVAL', 0.05)
  with progress.working('fit'):
    held = progress.track(range(3), desc='broken off')
    next(held)
  time.sleep(0.3)
  assert 'broken' not in capsys.readouterr().err
  assert progress._step is None
  with progress.working('outer'):
    with progress.working('fit'):
      held = progress.track(range(3), desc='broken off')
      next(held)
    time.sleep(0.3)
    assert 'outer: 0 s' in capsys.readouterr().err
    held.close()
    time.sleep(0.3)
  said = capsys.readouterr().err
  assert 'outer: 0 s' in said and 'broken' not in said


def test_the_innermost_is_said(capsys, monkeypatch):
  clock = Clock(monkeypatch)
  with progress.working('outer'):
    worked(clock, [6.0], desc='inner')
    clock.now = 20.0
    progress._step.tell()
  assert capsys.readouterr().err.splitlines() == [
    'inner: 1 it, 0.167 it/s',
    'outer: 20 s',
  ]


def test_bar_on_a_terminal(monkeypatch):
  terminal = Terminal()
  monkeypatch.setattr(sys, 'stderr', terminal)
  assert list(progress.track(range(3), total=3, desc='count')) == [0, 1, 2]
  assert 'count' in terminal.getvalue()
  at = terminal.tell()
  with progress.working('step'):
    pass
  assert terminal.tell() == at


def test_the_end_is_told_where_the_way_was(capsys, monkeypatch):
  worked(Clock(monkeypatch), [40.0, 43.0], total=2, desc='x', unit='step')
  lines = capsys.readouterr().err.splitlines()
  assert lines[0].startswith('x: 1/2 step')
  assert lines[1] == 'x: 2 step, done in 43 s'

"""Progress on a terminal and elsewhere."""

import io
import sys

import pytest

from utilized_rank.host import progress


class Terminal(io.StringIO):
  def isatty(self):
    return True


@pytest.mark.quick
def test_quiet_when_short(capsys):
  assert list(progress.track(range(5), total=5, desc='x')) == [0, 1, 2, 3, 4]
  assert capsys.readouterr() == ('', '')


def test_lines_when_long(capsys, monkeypatch):
  monkeypatch.setattr(progress, 'LINE_INTERVAL', 0.0)
  items = progress.track(
    range(2), total=4, desc='x', unit='step', initial=2, status=lambda: 'hi'
  )
  assert list(items) == [0, 1]
  lines = capsys.readouterr().err.splitlines()
  assert lines[0].startswith('x: 3/4 step, ')
  assert lines[1].startswith('x: 4/4 step, ')
  assert lines[1].endswith(' 0 s left, hi')


def test_lines_without_a_total(capsys, monkeypatch):
  monkeypatch.setattr(progress, 'LINE_INTERVAL', 0.0)
  assert list(progress.track('ab')) == ['a', 'b']
  assert 'left' not in capsys.readouterr().err


def test_bar_on_a_terminal(monkeypatch):
  terminal = Terminal()
  monkeypatch.setattr(sys, 'stderr', terminal)
  assert list(progress.track(range(3), total=3, desc='count')) == [0, 1, 2]
  assert 'count' in terminal.getvalue()


def test_the_end_is_told_where_the_way_was(capsys, monkeypatch):
  clock = iter([0.0, 40.0, 45.0, 50.0])
  monkeypatch.setattr(progress.time, 'monotonic', lambda: next(clock))
  list(progress.track(range(2), total=2, desc='x', unit='step'))
  lines = capsys.readouterr().err.splitlines()
  assert lines[0].startswith('x: 1/2 step')
  assert lines[1] == 'x: 2 step, done in 50 s'

"""Progress of long loops and steps: a bar on a terminal, else a line at times.

What goes on within `working` is said from a thread of its own, so that a step
which takes a minute (a compilation) is not silent for a minute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
import contextlib
import sys
import textwrap
import threading
import time
from typing import TypeVar

T = TypeVar('T')

# Columns of a terminal, for lines that are not about the bars.
WIDTH = 80
# Seconds between two lines when stderr is a file or a pipe; from a minute on
# they grow, to six times as many.
LINE_INTERVAL = 5.0


def say(text: str) -> None:
  """Shows one line on stderr."""
  print(text, file=sys.stderr, flush=True)


def wrapped(text: str) -> str:
  """A long line as several that fit a terminal.

  >>> print(wrapped('one two three ' * 6))
  one two three one two three one two three one two three one two three one two
    three
  """
  return textwrap.fill(
    text, WIDTH, subsequent_indent='  ', break_on_hyphens=False
  )


class _Lines:
  """Lines about what goes on, a while apart.

  Of loops inside each other the innermost is said.
  """

  def __init__(self, text: Callable[[], str] | None = None):
    self._inside = [] if text is None else [text]
    self._start = self._said = time.monotonic()
    self._lock = threading.Lock()

  @contextlib.contextmanager
  def about(self, text: Callable[[], str]) -> Iterator[None]:
    """Says `text()` in place of what is said now."""
    self._inside.append(text)
    try:
      yield
    finally:
      # A loop inside may have been broken off, and is closed later or never.
      if text in self._inside:
        del self._inside[self._inside.index(text) :]

  def tell(self) -> None:
    """Says it if it is time to."""
    with self._lock:
      now = time.monotonic()
      since = now - self._start
      if now - self._said < LINE_INTERVAL * min(max(since / 60, 1), 6):
        return
      self._said = now
      text = self._inside[-1]
    say(text())

  def keep_telling(self, over: threading.Event) -> None:
    """Until an event is set."""
    while not over.wait(max(LINE_INTERVAL / 4, 0.05)):
      self.tell()


# Of the outermost step that goes on; a step inside it is said there.
_step: _Lines | None = None


@contextlib.contextmanager
def working(desc: str) -> Iterator[None]:
  """Says every few seconds how far a step is, also while nothing moves.

  How far the loops inside are, by `track`, or else for how long it goes on. On
  a terminal it says nothing: the bars of the loops do.

  >>> with working('add'):
  ...   print(sum(range(4)))
  6
  """
  global _step
  if sys.stderr.isatty():
    yield
    return
  start = time.monotonic()
  text = lambda: f'{desc}: {time.monotonic() - start:.0f} s'
  if _step is not None:
    with _step.about(text):
      yield
    return
  _step, over = _Lines(text), threading.Event()
  threading.Thread(target=_step.keep_telling, args=[over], daemon=True).start()
  try:
    yield
  finally:
    over.set()
    _step = None


def track(
  iterable: Iterable[T],
  *,
  total: int | None = None,
  desc: str = '',
  unit: str = 'it',
  initial: int = 0,
  status: Callable[[], str] | None = None,
) -> Iterator[T]:
  """Yields the items of `iterable` and shows how far it is on stderr.

  On a terminal this is a tqdm bar with throughput and time left. Elsewhere it
  is a line every few seconds, while a long item is worked on only within
  `working`.

  Example:
    >>> sum(track(range(4), total=4, desc='add'))
    6

  Args:
    iterable: what to iterate over.
    total: number of items including `initial`; without it no time left.
    desc: what is going on, in a word or two.
    unit: name of one item.
    initial: items that an earlier run has done.
    status: called when something is shown; its text is appended.
  """
  if sys.stderr.isatty():
    try:
      from tqdm import tqdm
    except ImportError:
      pass
    else:
      yield from _bar(tqdm, iterable, total, desc, unit, initial, status)
      return
  yield from _said(iterable, total, desc, unit, initial, status)


def _bar(tqdm, iterable, total, desc, unit, initial, status):
  with tqdm(
    total=total, desc=desc, unit=unit, initial=initial, dynamic_ncols=True
  ) as bar:
    for item in iterable:
      yield item
      if bar.update() and status is not None:
        bar.set_postfix_str(status(), refresh=False)


def _said(iterable, total, desc, unit, initial, status):
  start = time.monotonic()
  done = told = 0

  def line():
    nonlocal told
    told = done
    text = f'{desc}: {initial + done}'
    if total is not None:
      text += f'/{total}'
    text += f' {unit}'
    if done:
      rate = done / max(time.monotonic() - start, 1e-9)
      text += f', {rate:.3g} {unit}/s'
      if total is not None:
        text += f', {(total - initial - done) / rate:.0f} s left'
    else:
      text += f', {time.monotonic() - start:.0f} s'
    if status is not None and done:
      text += f', {status()}'
    return text

  lines = _step or _Lines()
  with lines.about(line):
    for item in iterable:
      yield item
      done += 1
      lines.tell()
  if 0 < told < done:
    # Who read that it goes on may read that it is done.
    seconds = time.monotonic() - start
    text = f'{desc}: {initial + done} {unit}, done in {seconds:.0f} s'
    say(text)

"""Progress of long loops: a bar on a terminal, a rare line elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
import sys
import time
from typing import TypeVar

T = TypeVar('T')

# Seconds between two lines when stderr is a file or a pipe.
LINE_INTERVAL = 30.0


def say(text: str) -> None:
  """Shows one line on stderr."""
  print(text, file=sys.stderr, flush=True)


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

  On a terminal this is a tqdm bar with throughput and time left. Elsewhere
  it stays quiet except for one line every 30 seconds.

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
  yield from _lines(iterable, total, desc, unit, initial, status)


def _bar(tqdm, iterable, total, desc, unit, initial, status):
  with tqdm(
    total=total, desc=desc, unit=unit, initial=initial, dynamic_ncols=True
  ) as bar:
    for item in iterable:
      yield item
      if bar.update() and status is not None:
        bar.set_postfix_str(status(), refresh=False)


def _lines(iterable, total, desc, unit, initial, status):
  start = shown = time.monotonic()
  done = told = 0
  for done, item in enumerate(iterable, 1):
    yield item
    now = time.monotonic()
    if now - shown < LINE_INTERVAL:
      continue
    shown, told = now, done
    rate = done / (now - start)
    text = f'{desc}: {initial + done}'
    if total is not None:
      left = (total - initial - done) / rate
      text += f'/{total} {unit}, {rate:.3g} {unit}/s, {left:.0f} s left'
    else:
      text += f' {unit}, {rate:.3g} {unit}/s'
    if status is not None:
      text += f', {status()}'
    say(text)
  if 0 < told < done:
    # Who read that it goes on may read that it is done.
    seconds = time.monotonic() - start
    text = f'{desc}: {initial + done} {unit}, done in {seconds:.0f} s'
    say(text)

"""Ctrl-C and SIGTERM: a loop ends after its step, and what is done is kept."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import signal
import threading
import types

import jax

from utilized_rank.host import progress

# Set by a signal, which is the process's: there is one of it.
_asked = threading.Event()


class Preempted(RuntimeError):
  """The machine is about to be taken away; what was done is saved."""


def asked() -> bool:
  """Whether a signal has asked the process to come to an end."""
  return _asked.is_set()


@contextlib.contextmanager
def on_signals() -> Iterator[None]:
  """Has loops inside that save their place end at the next step.

  The first Ctrl-C or SIGTERM asks, a second one ends the process as ever. Of
  a job of several processes JAX takes the signal (`jax.distributed`), and a
  thread that is not the main one can take none: nothing is changed there.

  >>> with on_signals():
  ...   asked()
  False
  """
  is_main = threading.current_thread() is threading.main_thread()
  if jax.distributed.is_initialized() or not is_main:
    yield
    return
  before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

  def restore():
    for number, handler in before.items():
      signal.signal(number, handler)

  def ask(number: int, frame: types.FrameType | None) -> None:
    del frame
    _asked.set()
    restore()
    name = signal.Signals(number).name
    progress.say(f'{name}: stopping after this step; again to stop at once')

  try:
    for number in before:
      signal.signal(number, ask)
    yield
  finally:
    restore()
    _asked.clear()

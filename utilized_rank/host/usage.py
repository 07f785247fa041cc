"""What a step takes: seconds, and memory of this process."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import ctypes
import dataclasses
import sys
import threading
import time

# Seconds between two looks at how much is held.
_LOOK = 0.05


@dataclasses.dataclass
class Usage:
  """What a step took; complete when it is over.

  Attributes:
    seconds: that passed.
    cpu_seconds: of all threads of this process.
    peak_bytes: the most that this process held on the host at once, seen
      twenty times a second, and exactly where it never held more before; None
      where the system does not say.
  """

  seconds: float = 0.0
  cpu_seconds: float = 0.0
  peak_bytes: int | None = None


@contextlib.contextmanager
def measured() -> Iterator[Usage]:
  """Measures what the body takes.

  >>> with measured() as usage:
  ...   total = sum(range(1000))
  >>> usage.seconds >= 0, usage.cpu_seconds >= 0
  (True, True)
  """
  usage, over = Usage(), threading.Event()
  before = _most_ever()
  seen = [held()]

  def look():
    while not over.wait(_LOOK):
      seen[0] = max(seen[0], held())

  threading.Thread(target=look, daemon=True).start()
  start, cpu = time.monotonic(), time.process_time()
  try:
    yield usage
  finally:
    over.set()
    usage.seconds = time.monotonic() - start
    usage.cpu_seconds = time.process_time() - cpu
    after = _most_ever()
    most = max(seen[0], held(), after if after > before else 0)
    usage.peak_bytes = most or None


def return_freed() -> None:
  """Gives freed memory back to the system, where the C library keeps it."""
  if sys.platform.startswith('linux'):
    trim = getattr(ctypes.CDLL(None), 'malloc_trim', None)  # of glibc
    if trim is not None:
      trim(0)


def held() -> int:
  """Bytes of memory that this process holds now; 0 where there is no /proc."""
  try:
    with open('/proc/self/statm', encoding='ascii') as file:
      pages = int(file.read().split()[1])
  except OSError:
    return 0
  import resource

  return pages * resource.getpagesize()


def _most_ever() -> int:
  """The most that it ever held; 0 where the system does not say."""
  try:
    import resource
  except ImportError:  # Windows
    return 0
  most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return most * (1 if sys.platform == 'darwin' else 1024)

"""What a process holds in memory; Linux."""

from __future__ import annotations

import ctypes
import resource


def resident(what: str = 'VmRSS') -> int:
  """Bytes that this process holds, or at most held (`VmHWM`)."""
  with open('/proc/self/status') as f:
    line = next(line for line in f if line.startswith(what))
  return int(line.split()[1]) * 1024


def forget_peak() -> None:
  """Sets `VmHWM` to what the process holds now, without what it freed.

  The C library keeps freed memory, of the compiler for instance, until it is
  told to give it back.
  """
  ctypes.CDLL(None).malloc_trim(0)
  with open('/proc/self/clear_refs', 'w') as f:
    f.write('5')


def peak_gib() -> float:
  """GiB that this process at most held since it began."""
  # Kilobytes on Linux.
  return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)

"""Interleaved timing, and what a process holds in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import ctypes
import time
from typing import Any

import jax


def interleaved(
  fns: Mapping[str, Callable[[], Any]], repeats: int
) -> dict[str, dict[str, float]]:
  """Least wall and process time of each, one after the other, in turns.

  What else runs on the machine then slows all of them alike, and the least
  time is the one that was disturbed least.
  """
  times: dict[str, dict[str, float]] = {}
  for fn in fns.values():
    jax.block_until_ready(fn())
  for _ in range(repeats):
    for name, fn in fns.items():
      wall, cpu = time.perf_counter(), time.process_time()
      jax.block_until_ready(fn())
      spent = {
        'wall': time.perf_counter() - wall,
        'cpu': time.process_time() - cpu,
      }
      best = times.setdefault(name, spent)
      times[name] = {k: min(best[k], v) for k, v in spent.items()}
  return times


def resident(what: str = 'VmRSS') -> int:
  """Bytes that this process holds, or at most held (`VmHWM`); Linux."""
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

"""Seconds of a call, and of several in turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import time
from typing import Any

import jax
import jax.numpy as jnp


def once(call: Callable[[], Any]) -> tuple[float, Any]:
  """Seconds of one call, and what it returned."""
  start = time.perf_counter()
  result = call()
  return round(time.perf_counter() - start, 3), result


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


class Adding:
  """Adds `fn(*args)` to a running sum at every call, in place."""

  def __init__(
    self,
    fn: Callable[..., Any],
    *args: Any,
    merge: Callable[[Any, Any], Any] | None = None,
  ):
    merge = merge or (lambda a, b: jax.tree.map(jnp.add, a, b))
    add = lambda state, *args: merge(state, fn(*args))
    self._step = jax.jit(add, donate_argnums=0)
    shapes = jax.eval_shape(fn, *args)
    self._state = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    self._args = args

  def __call__(self) -> Any:
    self._state = self._step(self._state, *self._args)
    return self._state

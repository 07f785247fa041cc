"""What models cost to run: FLOPs, and milliseconds on this machine."""

from __future__ import annotations

from collections.abc import Sequence
import functools
import statistics
import time
from typing import Any

import jax

from utilized_rank.training.evaluate import Forward


def measure(
  models: Sequence[tuple[Forward, Any]], images: jax.Array, rounds: int = 25
) -> list[dict[str, float]]:
  """FLOPs per example and milliseconds per example of each model.

  The models take turns, so that a busy machine slows all of them alike.

  Args:
    models: each function with its parameters.
    images: what they are given in one call.
    rounds: how often each is timed; the median counts.

  Returns:
    `flops`, `latency_ms` and `latency_batch_size` for each.
  """
  calls, costs = [], []
  for forward, params in models:
    step = jax.jit(lambda p, x, f=forward: f(p, x, train=False, rng=None))
    compiled = step.lower(params, images).compile()
    analysis = compiled.cost_analysis() or {}
    costs.append({'flops': analysis.get('flops', 0.0) / len(images)})
    calls.append(functools.partial(compiled, params, images))
  times: list[list[float]] = [[] for _ in calls]
  for _ in range(rounds):
    for call, seconds in zip(calls, times, strict=True):
      start = time.perf_counter()
      jax.block_until_ready(call())
      seconds.append(time.perf_counter() - start)
  for cost, seconds in zip(costs, times, strict=True):
    cost['latency_ms'] = 1e3 * statistics.median(seconds) / len(images)
    cost['latency_batch_size'] = len(images)
  return costs

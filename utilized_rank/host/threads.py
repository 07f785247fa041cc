"""Independent decompositions side by side, one core each.

LAPACK spends most of an eigendecomposition where two threads are hardly faster
than one, and threads that wait for each other burn their cores: a (768, 768)
matrix takes 0.08 s of processor time on one BLAS thread, and on two, with other
work on the machine, from 0.4 s to more than 2 s. Stacks are no faster than
single matrices, in numpy or in JAX on the CPU, where both call LAPACK for each.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
import concurrent.futures
import contextlib
import os
from typing import TypeVar

T = TypeVar('T')
R = TypeVar('R')

# Each holds the moments of a kernel in float64, and several of its products.
_MOST_WORKERS = 8
# `ahead` where what waits is light. The eigenbasis of an MLP's hidden features
# takes longer than all else of its block: so far ahead, the next block's is
# begun beside it.
FAR = 8


def ordered_map(
  fn: Callable[[T], R],
  items: Iterable[T],
  workers: int | None = None,
  ahead: int = 1,
) -> Iterator[R]:
  """Yields fn(item) for every item, in order, computed on all cores.

  Items are taken from the iterable as they are needed: they may be large.

  Args:
    fn: a function that spends its time in numpy.
    items: what to call it with.
    workers: threads; default one for each core, eight at most.
    ahead: items that are taken, or results that are kept, beside one for each
      worker: the more of them, the less often a long call has the others wait.

  >>> list(ordered_map(lambda x: x * x, range(4)))
  [0, 1, 4, 9]
  """
  workers = workers or most_workers()
  if workers == 1:
    yield from map(fn, items)
    return
  pending: deque[concurrent.futures.Future[R]] = deque()
  with (
    one_blas_thread(),
    concurrent.futures.ThreadPoolExecutor(workers) as pool,
  ):
    try:
      for item in items:
        pending.append(pool.submit(fn, item))
        if len(pending) >= workers + ahead:
          yield pending.popleft().result()
      while pending:
        yield pending.popleft().result()
    finally:
      for future in pending:
        future.cancel()


def most_workers() -> int:
  """How many items are worked on at once, unless told."""
  return min(_cores(), _MOST_WORKERS)


def _cores() -> int:
  if hasattr(os, 'sched_getaffinity'):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def one_blas_thread() -> contextlib.AbstractContextManager[object]:
  """While it is entered, numpy's products and decompositions take one core."""
  from threadpoolctl import threadpool_limits

  return threadpool_limits(limits=1, user_api='blas')

"""Whether calibration data are few: rows of one example are not independent.

The positions of an image look alike, so that a thousand rows of ten images say
less than a thousand rows of a thousand. What rows are worth shows in how far
moments of a few examples each differ from one another: a second moment over n
independent Gaussian rows has the variance

  ((tr C)^2 + |C|^2 + 2 (|mu|^2 tr C + mu^T C mu)) / n,  C = S - mu mu^T,

so the variance that is seen says how many such rows it is like. On published
networks an example of KWT-1 (99 frames) is worth 6 rows, of ResNet-20 (64 to
1024 positions) 13 to 19, of a language model (255 tokens) 142.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import operator
from typing import Any

import jax
import numpy as np

from utilized_rank.collection.one_pass import check_batch
from utilized_rank.factorization.kernels import ENOUGH_ROWS
from utilized_rank.factorization.kernels import scarce
from utilized_rank.moments.capture import capture
from utilized_rank.moments.moments import Moments
from utilized_rank.tree import paths
from utilized_rank.walk import tracing

# Rows that an example is worth without looking, if it has as many.
SURE_ROWS = 5
# Examples that are looked at, and in how many parts.
_EXAMPLES = 64
_PARTS = 8


def few(
  fn: Callable[[Any, Any], Any],
  params: Any,
  moments: Moments,
  batches: Sequence[Any],
) -> bool:
  """Whether a kernel has under four independent rows for a feature.

  Args:
    fn: `fn(params, batch) -> outputs`.
    params: its parameters.
    moments: what there is of data.
    batches: some of the data, to see what rows are worth.
  """
  if scarce(moments, moments):
    return True
  seen = sum(check_batch(batch, i) for i, batch in enumerate(batches))
  examples = seen if moments.examples is None else int(moments.examples)
  wanted: dict[str, float] = {}
  for path in moments:
    moment = moments[path]
    rows = int(np.min(np.asarray(moment.count)))
    least = ENOUGH_ROWS * moment.layout.matrix_shape[0]
    if moment.entry.side == 'input' and SURE_ROWS * examples < least:
      wanted[path] = least / rows
  if not wanted:
    return False
  share = independent_share(fn, params, batches[0], list(wanted))
  return any(share[path] < least for path, least in wanted.items())


def independent_share(
  fn: Callable[[Any, Any], Any], params: Any, batch: Any, kernels: list[str]
) -> dict[str, float]:
  """What share of a kernel's rows independent ones would be as good as.

  Args:
    fn: `fn(params, batch) -> outputs`.
    params: its parameters.
    batch: a batch of at least two examples, the first 64 of which are run.
    kernels: their paths.

  Returns:
    Path to a share in (0, 1], of stacks that of their first member; of one
    example 1 over its rows.
  """
  size = min(check_batch(batch, 0), _EXAMPLES)
  each = max(size // _PARTS, 1)
  values, join = tracing.split(params)
  take = capture(fn, select=paths.only(kernels))
  run = jax.jit(lambda values, batch: take(join(values), batch)[1])
  spreads: dict[int, _Spread] = {}
  for start in range(0, size - each + 1, each):
    part = jax.tree.map(operator.itemgetter(slice(start, start + each)), batch)
    moments = run(values, part)
    places = {moments[path].entry.index: path for path in kernels}
    for index, path in places.items():
      spreads.setdefault(index, _Spread()).add(moments[path])
  return {path: spreads[moments[path].entry.index].share() for path in kernels}


class _Spread:
  """How much moments of several parts of the data differ."""

  def __init__(self):
    self._parts, self._rows = 0, 0
    self._square = 0.0
    self._second: Any = 0.0
    self._mean: Any = 0.0

  def add(self, moment: Any) -> None:
    """A part: what its first member reads."""
    d = moment.layout.matrix_shape[0]
    second = np.asarray(moment.second, np.float64).reshape(-1, d, d)[0]
    self._parts += 1
    self._rows = int(np.asarray(moment.count).reshape(-1)[0])
    self._square += float(np.sum(second**2))
    self._second = self._second + second
    self._mean = self._mean + np.asarray(moment.mean, float).reshape(-1, d)[0]

  def share(self) -> float:
    """Independent rows that would differ as much, over the rows there are."""
    k, n = self._parts, max(self._rows, 1)
    if k < 2:
      return 1 / n
    second, mean = self._second / k, self._mean / k
    seen = (self._square - k * float(np.sum(second**2))) / (k - 1)
    c = second - np.outer(mean, mean)
    trace = float(np.trace(c))
    of_one = trace**2 + float(np.sum(c**2))
    of_one += 2 * (trace * float(mean @ mean) + float(mean @ c @ mean))
    # What never varies is known by one row.
    if seen <= 1e-12 * max(of_one, 1e-300):
      return 1.0
    return min(1.0, of_one / seen / n)

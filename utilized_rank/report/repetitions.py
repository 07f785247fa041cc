"""What repetitions of a measurement, such as seeds, give."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Spread(NamedTuple):
  """What repetitions of a measurement give.

  Attributes:
    mean: over the repetitions.
    std: their standard deviation (with n - 1); NaN of a single one.
    low: the smallest.
    high: the largest.
    runs: how many there are.
  """

  mean: float
  std: float
  low: float
  high: float
  runs: int


def percent(spread: Spread) -> str:
  """The mean in percent, with the standard deviation where there is one."""
  text = f'{100 * spread.mean:.1f}%'
  if spread.runs > 1:
    text += f' ±{100 * spread.std:.1f}'
  return text


def spread(values: np.ndarray) -> Spread:
  """Of (repetitions,) numbers."""
  count = len(values)
  std = float(values.std(ddof=1)) if count > 1 else float('nan')
  low, high = float(values.min()), float(values.max())
  return Spread(float(values.mean()), std, low, high, count)

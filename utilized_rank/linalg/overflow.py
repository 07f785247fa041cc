"""What sums of squares that are not finite say of what was summed."""

from __future__ import annotations

from typing import Any

import numpy as np


def not_finite(total: Any) -> str:
  """What is wrong with rows whose squares have no finite sum.

  Args:
    total: their plain sum, which NaN and infinity are seen in too.

  >>> not_finite(np.array([1.0, np.nan]))
  'is NaN or infinite'
  >>> not_finite(np.array([1e20, 0.0]))[:34]
  'is finite, but its squares (above '
  """
  if not np.all(np.isfinite(np.asarray(total))):
    return 'is NaN or infinite'
  return (
    'is finite, but its squares (above 3e38) overflow float32: scale it down'
  )

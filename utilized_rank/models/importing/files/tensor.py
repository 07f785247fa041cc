"""A tensor that is still in its file."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Tensor:
  """Its shape is known; `read()` gives its values, anew at every call."""

  shape: tuple[int, ...]
  read: Callable[[], np.ndarray]

"""Which examples and tokens count, and in how many sums."""

from __future__ import annotations

import dataclasses
import math
from typing import Any


@dataclasses.dataclass(frozen=True)
class Counting:
  """What is counted.

  Attributes:
    mask: whether each example, (B,), or each of its tokens, (B, T), counts.
    over: a mesh and the names of its axes over which the examples are spread;
      each share of them has sums of its own, along an axis behind the groups.
  """

  mask: Any = None
  over: tuple[Any, tuple[str, ...]] | None = None

  @property
  def parts(self) -> int:
    if self.over is None:
      return 0
    mesh, names = self.over
    return math.prod(mesh.shape[n] for n in names)


EVERY = Counting()  # all rows, in one sum

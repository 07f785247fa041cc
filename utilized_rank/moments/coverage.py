"""Which share of the parameters kernels hold, and what else there is."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
import dataclasses
import math

# Leaves that a line names, before it says how many there are more.
_MOST_NAMES = 5
NOT_SELECTED = 'not selected'


@dataclasses.dataclass(frozen=True)
class LeftOut:
  """A leaf of two or more axes that is no kernel.

  Attributes:
    path: the leaf's.
    size: how many numbers it holds.
    why: why it is not measured.
  """

  path: str
  size: int
  why: str


@dataclasses.dataclass(frozen=True)
class Coverage:
  """How many of a function's parameters are measured; printed, one line.

  Attributes:
    kernels: numbers that the kernels hold.
    total: numbers that all leaves hold, vectors and scalars too.
    left_out: other leaves of two or more axes that are no biases, largest
      first.

  >>> print(Coverage.of({'w': (4, 2), 'up': (2, 2)}, {'up': 'used by sort'}))
  kernels hold 66.7% of the 12 parameters; not measured: up (sort)
  """

  kernels: int
  total: int
  left_out: tuple[LeftOut, ...] = ()

  @classmethod
  def of(
    cls,
    shapes: dict[str, tuple[int, ...]],
    unseen: dict[str, str],
    biases: Collection[str] = (),
  ) -> Coverage:
    """Of every leaf's shape, why some are no kernels, and which of those
    belong to kernels."""
    sizes = {path: math.prod(shape) for path, shape in shapes.items()}
    missed = [
      LeftOut(path, sizes[path], why)
      for path, why in unseen.items()
      if len(shapes[path]) > 1 and path not in biases
    ]
    kernels = sum(n for path, n in sizes.items() if path not in unseen)
    return cls(kernels, sum(sizes.values()), _largest_first(missed))

  def without(self, kernels: dict[str, int]) -> Coverage:
    """The same, some kernels (path to size) being left out by a choice."""
    chosen = [LeftOut(*item, NOT_SELECTED) for item in kernels.items()]
    return dataclasses.replace(
      self,
      kernels=self.kernels - sum(kernels.values()),
      left_out=_largest_first([*self.left_out, *chosen]),
    )

  @property
  def is_low(self) -> bool:
    """Whether less than half is measured, though there is more to measure."""
    return 2 * self.kernels < self.total and bool(self.left_out)

  def __str__(self) -> str:
    share = 100 * self.kernels / max(self.total, 1)
    line = f'kernels hold {share:.1f}% of the {self.total:,} parameters'
    if not self.left_out:
      return line
    named = self.left_out[:_MOST_NAMES]
    reasons: dict[str, list[str]] = {}
    for leaf in named:
      why = leaf.why.removeprefix('used by ')
      reasons.setdefault(why, []).append(leaf.path)
    parts = [f'{", ".join(names)} ({why})' for why, names in reasons.items()]
    more = len(self.left_out) - len(named)
    if more:
      parts.append(f'and {more} more')
    return f'{line}; not measured: {", ".join(parts)}'


def _largest_first(leaves: Iterable[LeftOut]) -> tuple[LeftOut, ...]:
  return tuple(sorted(leaves, key=lambda leaf: -leaf.size))


def from_record(record: dict | None) -> Coverage | None:
  """Undoes `dataclasses.asdict`; None where nothing was kept, as before 0.2."""
  if record is None:
    return None
  left: Sequence[dict] = record['left_out']
  return Coverage(
    record['kernels'],
    record['total'],
    tuple(LeftOut(**leaf) for leaf in left),
  )

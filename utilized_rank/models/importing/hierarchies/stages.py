"""What shapes say of stages whose blocks are named `stage#_#`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from utilized_rank.models.importing.by_shape import count
from utilized_rank.models.importing.layouts import Shape
from utilized_rank.models.importing.layouts import Shapes


def depths(mapped: Shapes) -> tuple[int, ...]:
  """How many blocks each stage has.

  >>> depths({'params/stage0_0/x': (1,), 'params/stage0_1/x': (1,)})
  (2,)
  """
  stages = count(mapped, r'params/stage(\d+)_.*')
  return tuple(
    count(mapped, rf'params/stage{i}_(\d+)/.*') for i in range(stages)
  )


def of_first_blocks(mapped: Shapes, leaf: str) -> list[Shape]:
  """Shapes of a leaf in the first block of each stage.

  >>> of_first_blocks({'params/stage0_0/x': (1, 3)}, 'x')
  [(1, 3)]
  """
  stages = range(len(depths(mapped)))
  return [mapped[f'params/stage{i}_0/{leaf}'] for i in stages]


def averaged(options: Mapping[str, Any]) -> dict[str, Any]:
  """The options without the pooling, which is a mean.

  Raises:
    ValueError: it is another.
  """
  others = dict(options)
  if (pool := others.pop('pool', 'gap')) != 'gap':
    raise ValueError(f"pool={pool!r}; the mean of all pixels, 'gap', is read.")
  return others

"""What networks of several resolutions are asked for at each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def check_lengths(**options: Sequence[Any]) -> None:
  """Refuses options of which there is not one for each resolution.

  >>> check_lengths(depths=(1, 2), heads=(3,))
  Traceback (most recent call last):
    ...
  ValueError: {'depths': 2, 'heads': 1}; there is one of each for a resolution.

  Args:
    **options: by name.

  Raises:
    ValueError: they are not as long as each other.
  """
  lengths = {name: len(values) for name, values in options.items()}
  if len(set(lengths.values())) > 1:
    raise ValueError(f'{lengths}; there is one of each for a resolution.')

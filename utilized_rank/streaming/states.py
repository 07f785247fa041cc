"""The values of a run between two blocks, in files."""

from __future__ import annotations

from collections.abc import Sequence
import os
import shutil
from typing import Any

import numpy as np

from utilized_rank.models.importing.files import safetensors_file
from utilized_rank.refit.blocks import Program
from utilized_rank.refit.blocks import State


class States:
  """Of each batch the values that a block needs, read and written one by one.

  A `Held` of `Streams`: what is read was written behind the block before; what
  is written is read after `advance`. So a block that is broken off begins
  again with what it began with.
  """

  def __init__(
    self, folder: str, programs: Sequence[Program], start: Sequence[State]
  ):
    """Stands before the first block.

    Args:
      folder: made when something is written.
      programs: of each batch, its function cut into blocks.
      start: of each batch, the values before the first block.
    """
    self._folder = folder
    self._start = list(start)
    self._names = [_names(program) for program in programs]
    self._number = 0

  def __len__(self) -> int:
    return len(self._start)

  def __getitem__(self, i: int, /) -> State:
    if self._number == 0:
      return self._start[i]
    tensors, _ = safetensors_file.read(self._file(self._number, i))
    return {
      var: tensors[name].read()
      for var, name in self._names[i].items()
      if name in tensors
    }

  def __setitem__(self, i: int, state: State, /) -> None:
    os.makedirs(self._of_block(self._number + 1), exist_ok=True)
    names = self._names[i]
    arrays = {names[var]: np.asarray(value) for var, value in state.items()}
    in_order = dict(sorted(arrays.items()))
    safetensors_file.write(self._file(self._number + 1, i), in_order)

  def stand_before(self, number: int) -> None:
    """Goes on before a block; what is older than that is removed."""
    self._number = number
    if not os.path.isdir(self._folder):
      return
    for name in os.listdir(self._folder):
      if int(name) < number:
        shutil.rmtree(os.path.join(self._folder, name))

  def remove(self) -> None:
    shutil.rmtree(self._folder, ignore_errors=True)

  def _of_block(self, number: int) -> str:
    return os.path.join(self._folder, str(number))

  def _file(self, number: int, i: int) -> str:
    return os.path.join(self._of_block(number), f'{i:06d}.safetensors')


def _names(program: Program) -> dict[Any, str]:
  """Every value that may lie between blocks; the same in every process."""
  values = [*program.args, *(v for b in program.blocks for v in b.gives)]
  return {var: f'v{i:06d}' for i, var in enumerate(dict.fromkeys(values))}

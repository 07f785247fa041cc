"""The files of a compressed checkpoint, one for each block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
import fnmatch
import json
import os
import shutil
from typing import Any

import numpy as np

from utilized_rank.host import files
from utilized_rank.lowrank.leaf import is_low_rank
from utilized_rank.models.importing.files import safetensors_file
from utilized_rank.models.importing.files import shards
from utilized_rank.models.importing.files.factored import KEY
from utilized_rank.models.importing.files.factored import Factored
from utilized_rank.models.importing.files.factored import parts_of
from utilized_rank.models.importing.open_checkpoint import Opened
from utilized_rank.moments.sites import Site
from utilized_rank.refit.blocks import Block
from utilized_rank.storage.recipe import Recipe

# What stands beside weights and is still true of the compressed ones.
_BESIDE = (
  '*.json', '*.txt', '*.model', '*.jinja', 'LICENSE*', 'NOTICE*', 'USE_POLICY*',
)  # fmt: skip
_WEIGHT = '.weight'


class Output:
  """Which tensor goes to which file, under which name.

  A tensor of the checkpoint is written with the first block that reads it,
  bytes as they were, or as the leaves that it is made of where one of them is a
  pair now. What no block reads is written last.
  """

  def __init__(
    self,
    opened: Opened,
    blocks: Sequence[Block],
    sites: Mapping[str, Site],
    recipe: Recipe,
    folder: str,
  ):
    """Writes nothing yet.

    Args:
      opened: the checkpoint.
      blocks: all blocks of its model.
      sites: those of its kernels that become pairs, by path.
      recipe: how.
      folder: for the files.
    """
    self._opened, self._recipe, self._folder = opened, recipe, folder
    targets = opened.match.targets
    self._leaves_of: dict[str, list[str]] = {}
    for path, target in targets.items():
      self._leaves_of.setdefault(target.name, []).append(path)
    biases = {s.bias: path for path, s in sites.items() if s.bias is not None}
    changed = {targets[path].name for path in (*sites, *biases)}
    self._parts = {
      path: self._parts_of(path, sites, biases)
      for name in sorted(changed)
      for path in self._leaves_of[name]
    }
    self._changed = changed
    written: set[str] = set()
    self._tensors: list[list[str]] = []
    for block in blocks:
      used = {targets[path].name for path in block.params} - written
      written |= used
      self._tensors.append(sorted(used))
    self._tensors[-1] += sorted(set(opened.tensors) - written)
    self._numbers = [i for i, names in enumerate(self._tensors) if names]

  def _parts_of(
    self, path: str, sites: Mapping[str, Site], biases: Mapping[str, str]
  ) -> dict[str, str]:
    """The names of the tensors that a leaf becomes; see `factored`."""
    name = self._opened.match.targets[path].name
    stem = name.rpartition('.')[0]
    if len(self._leaves_of[name]) > 1:
      stem = f'{stem}.{path.split("/")[-2]}'
    if path in sites:
      parts = {'a': f'{stem}.0.weight', 'b': f'{stem}.1.weight'}
      if self._recipe.leaves[path].has_constant:
        parts['c'] = f'{stem}.1.bias'
      return parts
    if path in biases:
      return {'bias': f'{stem}.1.bias'}
    kind = 'weight' if name.endswith(_WEIGHT) else 'bias'
    return {kind: f'{stem}.{kind}'}

  def write(
    self, number: int, leaves: Mapping[str, Any]
  ) -> dict[str, dict[str, np.ndarray]]:
    """Writes a block's file.

    Args:
      number: of the block.
      leaves: those of its leaves that are new: pairs, and biases that have
        taken a constant.

    Returns:
      For each leaf that is in tensors of its own now these, as they were
      rounded: 'a', 'b' and 'c' of a pair, 'weight' or 'bias'.
    """
    arrays: dict[str, np.ndarray] = {}
    made: dict[str, dict[str, np.ndarray]] = {}
    for name in self._tensors[number]:
      values = self._opened.tensors[name].read()
      if name not in self._changed:
        arrays[name] = values
        continue
      for path in self._leaves_of[name]:
        parts = self._parts[path]
        found = dict(self._now(path, parts, leaves, values))
        assert set(found) == set(parts), (path, parts)
        made[path] = {
          what: np.ascontiguousarray(array.astype(values.dtype))
          for what, array in found.items()
        }
        arrays |= {parts[what]: array for what, array in made[path].items()}
    if arrays:
      where = os.path.join(self._folder, self._file(number))
      # Hugging Face's loaders look for the format.
      safetensors_file.write(where, arrays, {'format': 'pt'})
    return made

  def _now(
    self,
    path: str,
    parts: Mapping[str, str],
    leaves: Mapping[str, Any],
    values: np.ndarray,
  ) -> Iterator[tuple[str, np.ndarray]]:
    """What a leaf of a tensor that changes is, by what it is to the leaf."""
    leaf = leaves.get(path)
    if is_low_rank(leaf):
      yield from parts_of(leaf).items()
    elif leaf is not None:
      yield 'bias', np.asarray(leaf).reshape(-1)
    else:  # beside others that change
      own = self._opened.match.targets[path].of(values)
      yield next(iter(parts)), own.T if 'weight' in parts else own

  def finish(self, out: str) -> None:
    """Writes the index, copies what stands beside weights; renames to `out`."""
    tensors = self._opened.tensors
    factored = Factored(
      self._recipe,
      {name: tuple(tensors[name].shape) for name in sorted(self._changed)},
      dict(sorted(self._parts.items())),
    )
    where: dict[str, str] = {}
    size = 0
    for number in self._numbers:
      file = self._file(number)
      path = os.path.join(self._folder, file)
      where |= dict.fromkeys(safetensors_file.read(path)[0], file)
      size += safetensors_file.data_bytes(path)
    index = {
      'metadata': {'total_size': size, KEY: factored.json()},
      'weight_map': dict(sorted(where.items())),
    }
    files.write_text(
      os.path.join(self._folder, shards.INDEX), json.dumps(index, indent=1)
    )
    source = self._opened.path
    beside = source if os.path.isdir(source) else os.path.dirname(source)
    for name in sorted(os.listdir(beside or '.')):
      if _stands_beside(name) and os.path.isfile(
        path := os.path.join(beside, name)
      ):
        shutil.copyfile(path, os.path.join(self._folder, name))
    os.rename(self._folder, out)

  def _file(self, number: int) -> str:
    at, count = self._numbers.index(number) + 1, len(self._numbers)
    return f'model-{at:05d}-of-{count:05d}.safetensors'


def _stands_beside(name: str) -> bool:
  if name.endswith('.index.json'):
    return False
  return any(fnmatch.fnmatchcase(name, pattern) for pattern in _BESIDE)

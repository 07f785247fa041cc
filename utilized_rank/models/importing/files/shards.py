"""Which files of a directory hold one model."""

from __future__ import annotations

import json
import os
import re
from typing import Any

# As Hugging Face, timm and OpenCLIP name them; the first that is there.
_WHOLE = (
  'model.safetensors',
  'open_clip_model.safetensors',
  'pytorch_model.bin',
  'open_clip_pytorch_model.bin',
  'flax_model.msgpack',
)
_SHARD = re.compile(r'.*-(\d+)-of-(\d+)\.(safetensors|bin)')
_SUFFIXES = ('.safetensors', '.bin', '.pth', '.pt', '.npz', '.msgpack')


INDEX = 'model.safetensors.index.json'


def index_of(path: str) -> str | None:
  """The index that says which files of a directory hold a model, or None."""
  if path.endswith('.index.json'):
    return path
  for name in (INDEX, 'pytorch_model.bin.index.json'):
    if os.path.exists(where := os.path.join(path, name)):
      return where
  return None


def is_several(path: str) -> bool:
  """Whether a model may be in several files: a directory's, an index's."""
  return os.path.isdir(path) or index_of(path) is not None


def metadata(path: str) -> dict[str, Any]:
  """What an index says beside where the tensors are."""
  with open(path) as file:
    return json.load(file).get('metadata') or {}


def files(folder: str) -> list[str]:
  """The files of one model: by an index, by a usual name, or all shards.

  Raises:
    ValueError: there is none, or nothing says which it is.
  """
  if index := index_of(folder):
    return _indexed(index)
  names = sorted(os.listdir(folder))
  for name in _WHOLE:
    if name in names:
      return [os.path.join(folder, name)]
  found = [n for n in names if n.endswith(_SUFFIXES)]
  shards = [m for n in found if (m := _SHARD.fullmatch(n))]
  if shards and len(shards) == len(found):
    if len({m[2] for m in shards}) > 1 or len(shards) != int(shards[0][2]):
      raise ValueError(f'{folder} has {found}; shards are missing.')
    return [os.path.join(folder, n) for n in found]
  if len(found) == 1:
    return [os.path.join(folder, found[0])]
  raise ValueError(
    f'{folder} holds {found or names}; give the path of the file with the '
    'weights.'
  )


def _indexed(path: str) -> list[str]:
  """The files that an index names.

  Raises:
    ValueError: the index is none, or a file is not there.
  """
  with open(path) as file:
    index = json.load(file)
  if not isinstance(index.get('weight_map'), dict):
    raise ValueError(f'{path} has no weight_map.')
  folder = os.path.dirname(path)
  names = sorted(set(index['weight_map'].values()))
  if wrong := [n for n in names if os.path.basename(n) != n]:
    raise ValueError(f'{path} names {wrong[0]!r}, which is not beside it.')
  missing = [n for n in names if not os.path.exists(os.path.join(folder, n))]
  if missing:
    raise ValueError(f'{path} names {missing}, which are not there.')
  return [os.path.join(folder, n) for n in names]

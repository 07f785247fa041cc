"""Checkpoint files of every format, told apart by their first bytes."""

from __future__ import annotations

import functools
import os
from typing import Any
import zipfile

import ml_dtypes
import numpy as np

from utilized_rank.models.importing.files import msgpack_file
from utilized_rank.models.importing.files import safetensors_file
from utilized_rank.models.importing.files import shards
from utilized_rank.models.importing.files import torch_file
from utilized_rank.models.importing.files.tensor import Tensor


def read_tensors(path: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
  """The tensors of a file or directory, unread, and what is no tensor.

  Args:
    path: `.npz`, `.safetensors`, `.pth` (weights only) or Flax `.msgpack`; the
      contents tell which, not the name. Or a directory with one of them, with
      shards and their index, or with shards alone.

  Returns:
    `(tensors, others)`, both by name; nested names are joined as the format's
    users do, with dots (PyTorch) or slashes (Flax).

  Raises:
    ValueError: it is none of these, not safe to read, or ends too early.
  """
  if shards.is_several(path):
    tensors, others = _of_files(path, shards.files(path))
    index = shards.index_of(path)
    said = {} if index is None else shards.metadata(index)
    return tensors, others | {f'__metadata__.{k}': v for k, v in said.items()}
  with open(path, 'rb') as file:
    head = file.read(9)
  if zipfile.is_zipfile(path):
    with zipfile.ZipFile(path) as archive:
      names = archive.namelist()
    if any(n.endswith('data.pkl') for n in names):
      return torch_file.read(path)
    if names and all(n.endswith('.npy') for n in names):
      return _npz(path, names), {}
    raise ValueError(
      f'{path} is a zip file of {names[:3]}..., neither numpy nor torch.'
    )
  if head.startswith(b'PK\x03\x04'):
    raise ValueError(
      f'{path} begins as a zip file (.pth or .npz) and has no end: it is '
      'truncated. Copy it again.'
    )
  header = int.from_bytes(head[:8], 'little')
  if head[8:] == b'{' and header < os.path.getsize(path):
    return safetensors_file.read(path)
  if head[:1] == b'\x80' and head[1:2] in b'\x02\x03\x04\x05':
    return torch_file.read_legacy(path)
  if head and (0x80 <= head[0] <= 0x8F or head[0] in (0xDE, 0xDF)):
    return msgpack_file.read(path)
  raise ValueError(
    f'{path} begins with {head!r}; .npz, .safetensors, .pth and Flax .msgpack '
    'files are read.'
  )


def _of_files(
  path: str, files: list[str]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
  tensors: dict[str, Tensor] = {}
  others: dict[str, Any] = {}
  for file in files:
    found, more = read_tensors(file)
    if twice := sorted(set(found) & set(tensors)):
      raise ValueError(f'{path} has {twice[0]} in {file} and in another file.')
    tensors.update(found)
    others.update(more)
  return tensors, others


def _npz(path: str, names: list[str]) -> dict[str, Tensor]:
  tensors = {}
  with zipfile.ZipFile(path) as archive:
    for name in names:
      with archive.open(name) as file:
        version = np.lib.format.read_magic(file)
        header = (
          np.lib.format.read_array_header_1_0
          if version == (1, 0)
          else np.lib.format.read_array_header_2_0
        )
        shape = header(file)[0]
      key = name.removesuffix('.npy')
      tensors[key] = Tensor(shape, functools.partial(_npz_values, path, key))
  return tensors


def _npz_values(path: str, name: str) -> np.ndarray:
  with np.load(path, allow_pickle=False) as file:
    values = file[name]
  # numpy knows no bfloat16 and writes two bytes of anything.
  return values.view(ml_dtypes.bfloat16) if values.dtype == 'V2' else values

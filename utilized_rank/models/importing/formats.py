"""Checkpoint files of every format, told apart by their first bytes."""

from __future__ import annotations

import functools
import os
import zipfile

import ml_dtypes
import numpy as np

from utilized_rank.models.importing import msgpack_file
from utilized_rank.models.importing import torch_file
from utilized_rank.models.importing.tensor import Tensor


def read_tensors(path: str) -> tuple[dict[str, Tensor], list[str]]:
  """The tensors of a file, unread, and the names of what is no tensor.

  Args:
    path: `.npz`, `.safetensors`, `.pth` (the zip format, weights only) or
      Flax `.msgpack`. The contents tell which, not the name.

  Returns:
    `(tensors, others)`; nested names are joined as the format's users do, with
    dots (PyTorch) or slashes (Flax).

  Raises:
    ValueError: it is none of these, or not safe to read.
  """
  with open(path, 'rb') as file:
    head = file.read(9)
  if zipfile.is_zipfile(path):
    with zipfile.ZipFile(path) as archive:
      names = archive.namelist()
    if any(n.endswith('data.pkl') for n in names):
      return torch_file.read(path)
    if names and all(n.endswith('.npy') for n in names):
      return _npz(path, names), []
    raise ValueError(
      f'{path} is a zip file of {names[:3]}..., neither numpy nor torch.'
    )
  header = int.from_bytes(head[:8], 'little')
  if head[8:] == b'{' and header < os.path.getsize(path):
    return _safetensors(path), []
  if head[:1] == b'\x80' and head[1:2] in b'\x02\x03\x04\x05':
    raise ValueError(
      f'{path} is a bare pickle, as torch.save wrote before version 1.6. Open '
      'it with torch where you trust it and save it again.'
    )
  if head and (0x80 <= head[0] <= 0x8F or head[0] in (0xDE, 0xDF)):
    return msgpack_file.read(path)
  raise ValueError(
    f'{path} begins with {head!r}; .npz, .safetensors, .pth (zip) and Flax '
    '.msgpack files are read.'
  )


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


def _safetensors(path: str) -> dict[str, Tensor]:
  import safetensors

  tensors = {}
  with safetensors.safe_open(path, 'np') as file:
    for name in file.keys():  # noqa: SIM118 (it is no dictionary)
      shape = tuple(file.get_slice(name).get_shape())
      tensors[name] = Tensor(
        shape, functools.partial(_safetensors_values, path, name)
      )
  return tensors


def _safetensors_values(path: str, name: str) -> np.ndarray:
  import safetensors

  # Opened anew: the pages of a mapping that stays open stay in memory.
  with safetensors.safe_open(path, 'np') as file:
    return file.get_tensor(name)

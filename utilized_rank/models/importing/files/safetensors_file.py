"""Files of safetensors, in every dtype of JAX; read tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping
import functools
import json
import math
import os
from typing import Any

import ml_dtypes
import numpy as np

from utilized_rank.host import files
from utilized_rank.models.importing.files.tensor import Tensor

_DTYPES: dict[str, Any] = {
  'F64': np.float64,
  'F32': np.float32,
  'F16': np.float16,
  'BF16': ml_dtypes.bfloat16,
  'F8_E4M3': ml_dtypes.float8_e4m3fn,
  'F8_E5M2': ml_dtypes.float8_e5m2,
  'I64': np.int64,
  'I32': np.int32,
  'I16': np.int16,
  'I8': np.int8,
  'U64': np.uint64,
  'U32': np.uint32,
  'U16': np.uint16,
  'U8': np.uint8,
  'BOOL': np.bool_,
}


def read(path: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
  """Tensors, and the file's own metadata as `__metadata__.key`.

  Raises:
    ValueError: the header is none, a dtype is not known, or the file ends
      before its tensors.
  """
  size = os.path.getsize(path)
  with open(path, 'rb') as file:
    length = int.from_bytes(file.read(8), 'little')
    try:
      # Not what a damaged length says: that may be more than there is memory.
      header = json.loads(file.read(min(length, size)))
      if not isinstance(header, dict):
        raise ValueError(f'a {type(header).__name__} is none')
    except ValueError as error:
      raise ValueError(f'{path} has no header of safetensors.') from error
  start = 8 + length
  others = {
    f'__metadata__.{key}': value
    for key, value in (header.pop('__metadata__', None) or {}).items()
  }
  tensors = {}
  for name, entry in header.items():
    try:
      kind, shape = entry['dtype'], tuple(map(int, entry['shape']))
      first, last = map(int, entry['data_offsets'])
    except (KeyError, TypeError, ValueError) as error:
      raise ValueError(
        f'{path}: of {name} it says {entry}, where dtype, shape and '
        'data_offsets should be.'
      ) from error
    if kind not in _DTYPES:
      raise ValueError(
        f'{path}: {name} is of type {kind}; known are {", ".join(_DTYPES)}.'
      )
    dtype = np.dtype(_DTYPES[kind])
    if start + last > size or first < 0:
      raise ValueError(
        f'{path} ends at {size} bytes, before {name}: it is truncated.'
      )
    count = int(np.prod(shape))
    if last - first != count * dtype.itemsize:
      raise ValueError(
        f'{path}: {name} of shape {shape} has {last - first} bytes.'
      )
    tensors[name] = Tensor(
      shape, functools.partial(_values, path, start + first, dtype, shape)
    )
  return tensors, others


def data_bytes(path: str) -> int:
  """What the tensors of a file take, without its header."""
  with open(path, 'rb') as file:
    return os.path.getsize(path) - 8 - int.from_bytes(file.read(8), 'little')


def _values(
  path: str, offset: int, dtype: np.dtype, shape: tuple[int, ...]
) -> np.ndarray:
  count = int(np.prod(shape))
  # Not a mapping: pages of one that stays open stay in memory.
  flat = np.fromfile(path, np.uint8, count * dtype.itemsize, offset=offset)
  return flat.view(dtype).reshape(shape)


def header(
  tensors: Mapping[str, tuple[Any, tuple[int, ...]]],
  metadata: Mapping[str, str] | None = None,
) -> bytes:
  """What a file begins with, before the tensors one after the other.

  Args:
    tensors: dtype and shape of each, by name.
    metadata: kept beside them.

  Raises:
    ValueError: a dtype that the format does not know.
  """
  names = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
  record: dict[str, Any] = {}
  if metadata:
    record['__metadata__'] = dict(metadata)
  at = 0
  for name, (dtype, shape) in tensors.items():
    if dtype not in names:
      raise ValueError(
        f'{name} is of type {dtype}; known are {", ".join(_DTYPES)}.'
      )
    end = at + math.prod(shape) * np.dtype(dtype).itemsize
    record[name] = {
      'dtype': names[dtype],
      'shape': list(shape),
      'data_offsets': [at, end],
    }
    at = end
  text = json.dumps(record).encode()
  text += b' ' * (-len(text) % 8)
  return len(text).to_bytes(8, 'little') + text


def write(
  path: str,
  tensors: Mapping[str, np.ndarray],
  metadata: Mapping[str, str] | None = None,
) -> None:
  """Writes arrays beside the file, then renames: all of it, or nothing.

  Equal arrays make equal bytes.

  Raises:
    ValueError: an array has a dtype that the format does not know.

  >>> import tempfile
  >>> path = os.path.join(tempfile.mkdtemp(), 'x.safetensors')
  >>> write(path, {'x': np.arange(3, dtype=np.int8)})
  >>> read(path)[0]['x'].read()
  array([0, 1, 2], dtype=int8)
  """
  head = header({n: (a.dtype, a.shape) for n, a in tensors.items()}, metadata)

  def put(file: Any) -> None:
    file.write(head)
    for array in tensors.values():
      # A view of bytes: numpy has no buffer of a type that it does not know.
      file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8))

  files.write(path, put)

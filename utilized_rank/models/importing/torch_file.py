"""`torch.save` files, read without PyTorch and without running their code.

A pickle may name any function and have it called. Here it may name nothing but
the few that rebuild tensors, and these are replaced by our own, which only
write down where in the file the numbers are.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator
import pickle
from typing import Any, NamedTuple
import zipfile

import ml_dtypes
import numpy as np

from utilized_rank.models.importing.tensor import Tensor

_DTYPES: dict[str, Any] = {
  'DoubleStorage': np.float64,
  'FloatStorage': np.float32,
  'HalfStorage': np.float16,
  'BFloat16Storage': ml_dtypes.bfloat16,
  'LongStorage': np.int64,
  'IntStorage': np.int32,
  'ShortStorage': np.int16,
  'CharStorage': np.int8,
  'ByteStorage': np.uint8,
  'BoolStorage': np.bool_,
}
_CHUNK = 1 << 20


class _Storage(NamedTuple):
  """One flat array of the archive."""

  path: str
  member: str
  dtype: np.dtype
  size: int


def read(path: str) -> tuple[dict[str, Tensor], list[str]]:
  """Tensors and the names of what is none; nested keys joined by dots.

  Raises:
    ValueError: the pickle names anything but tensors and ordered dictionaries,
      the file is TorchScript or big-endian, or a tensor exceeds its storage.
  """
  with zipfile.ZipFile(path) as archive:
    names = archive.namelist()
    root = next(n for n in names if n.endswith('data.pkl'))[: -len('data.pkl')]
    if f'{root}constants.pkl' in names:
      raise ValueError(
        f'{path} is a TorchScript program, not a file of weights; save the '
        'state_dict() of the loaded module instead.'
      )
    if f'{root}byteorder' in names and (
      archive.read(f'{root}byteorder') != b'little'
    ):
      raise ValueError(f'{path} is big-endian; only little-endian is read.')
    with archive.open(f'{root}data.pkl') as file:
      tree = _Unpickler(file, path, f'{root}data/', archive).load()
  tensors: dict[str, Tensor] = {}
  others: list[str] = []
  for name, leaf in _leaves(tree, ''):
    if isinstance(leaf, Tensor):
      tensors[name] = leaf
    else:
      others.append(name)
  return tensors, others


def _leaves(tree: Any, name: str) -> Iterator[tuple[str, Any]]:
  if isinstance(tree, dict):
    items: Any = tree.items()
  elif isinstance(tree, (list, tuple)):
    items = enumerate(tree)
  else:
    yield name, tree
    return
  for key, below in items:
    yield from _leaves(below, f'{name}.{key}' if name else str(key))


class _Unpickler(pickle.Unpickler):
  """Admits tensors and plain containers; everything else is refused."""

  def __init__(
    self, file: Any, path: str, folder: str, archive: zipfile.ZipFile
  ):
    super().__init__(file)
    self._path, self._folder, self._archive = path, folder, archive

  def find_class(self, module: str, name: str) -> Any:
    if module == 'torch' and name in _DTYPES:
      return np.dtype(_DTYPES[name])
    allowed: dict[tuple[str, str], Callable[..., Any]] = {
      ('collections', 'OrderedDict'): collections.OrderedDict,
      ('torch._utils', '_rebuild_tensor_v2'): _tensor,
      ('torch._utils', '_rebuild_parameter'): _parameter,
    }
    if (module, name) not in allowed:
      raise ValueError(
        f'{self._path} asks for {module}.{name}; only tensors and ordered '
        'dictionaries are read. Save the weights alone: '
        'torch.save(model.state_dict(), path).'
      )
    return allowed[module, name]

  def persistent_load(self, pid: Any) -> _Storage:
    kind, dtype, key, _, _ = pid
    if kind != 'storage' or not isinstance(dtype, np.dtype):
      raise ValueError(f'{self._path} refers to {pid!r}; only to storages.')
    member = f'{self._folder}{key}'
    size = self._archive.getinfo(member).file_size // dtype.itemsize
    return _Storage(self._path, member, dtype, size)


def _tensor(
  storage: _Storage,
  offset: int,
  shape: tuple[int, ...],
  strides: tuple[int, ...],
  *_: Any,
) -> Tensor:
  if 0 in shape:
    return Tensor(shape, lambda: np.zeros(shape, storage.dtype))
  span = 1 + sum(
    (n - 1) * stride for n, stride in zip(shape, strides, strict=True)
  )
  if min((offset, *strides, *shape)) < 0 or offset + span > storage.size:
    raise ValueError(
      f'{storage.path}: a tensor of shape {shape}, strides {strides} at '
      f'{offset} does not fit into its storage of {storage.size} numbers.'
    )

  def values() -> np.ndarray:
    item = storage.dtype.itemsize
    flat = np.empty(span * item, np.uint8)
    with (
      zipfile.ZipFile(storage.path) as archive,
      archive.open(storage.member) as file,
    ):
      file.seek(offset * item)
      # In small pieces: zipfile holds what is asked for a second time.
      for start in range(0, len(flat), _CHUNK):
        piece = file.read(min(_CHUNK, len(flat) - start))
        flat[start : start + len(piece)] = np.frombuffer(piece, np.uint8)
    return np.lib.stride_tricks.as_strided(
      flat.view(storage.dtype), shape, [item * stride for stride in strides]
    )

  return Tensor(shape, values)


def _parameter(tensor: Tensor, *_: Any) -> Tensor:
  return tensor

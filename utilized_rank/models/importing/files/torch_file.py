"""`torch.save` files, read without PyTorch and without running their code.

A pickle may name any function and have it called. Here it may name nothing but
the few that rebuild tensors, and these are replaced by our own, which only
write down where in the file the numbers are.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator
import contextlib
import os
import pickle
import re
from typing import Any, NamedTuple
import zipfile

import ml_dtypes
import numpy as np

from utilized_rank.models.importing.files.tensor import Tensor

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
  'UntypedStorage': np.uint8,
}
# Those without a storage class of their own.
_MORE_DTYPES: dict[str, Any] = {
  'float8_e4m3fn': ml_dtypes.float8_e4m3fn,
  'float8_e5m2': ml_dtypes.float8_e5m2,
  'float8_e4m3fnuz': ml_dtypes.float8_e4m3fnuz,
  'float8_e5m2fnuz': ml_dtypes.float8_e5m2fnuz,
  'uint16': np.uint16,
  'uint32': np.uint32,
  'uint64': np.uint64,
}
_CHUNK = 1 << 20


# What training scripts save beside weights; it is put down as inert.
_INERT = frozenset(
  {
    ('argparse', 'Namespace'),
    ('types', 'SimpleNamespace'),
    ('pathlib', 'PosixPath'),
    ('numpy', 'dtype'),
    ('numpy', 'ndarray'),
    ('numpy.core.multiarray', 'scalar'),
    ('numpy.core.multiarray', '_reconstruct'),
    ('numpy._core.multiarray', 'scalar'),
    ('numpy._core.multiarray', '_reconstruct'),
    ('_codecs', 'encode'),
    ('torch', 'device'),
    ('datetime', 'datetime'),
    ('datetime', 'timedelta'),
  }
)
_MAGIC = 0x1950A86A20F9469CFC6C  # of the files before PyTorch 1.6


class _Inert:
  """Stands for an object that is no weight: takes anything, does nothing."""

  def __init__(self, *_: Any, **__: Any):
    pass

  def __setstate__(self, _: Any) -> None:
    pass


class _Place(NamedTuple):
  """Where numbers begin: a member of an archive, or in the file itself."""

  path: str
  member: str | None
  offset: int

  def read(self, start: int, size: int) -> np.ndarray:
    flat = np.empty(size, np.uint8)
    with contextlib.ExitStack() as stack:
      if self.member is None:
        file: Any = stack.enter_context(open(self.path, 'rb'))
      else:
        archive = stack.enter_context(zipfile.ZipFile(self.path))
        file = stack.enter_context(archive.open(self.member))
      file.seek(self.offset + start)
      # In small pieces: zipfile holds what is asked for a second time.
      for at in range(0, size, _CHUNK):
        piece = file.read(min(_CHUNK, size - at))
        flat[at : at + len(piece)] = np.frombuffer(piece, np.uint8)
    return flat


class _Storage(NamedTuple):
  """One flat array of the file; a legacy file says last where it begins."""

  place: list[_Place]
  dtype: np.dtype
  size: int


def read(path: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
  """Tensors, and what is none; nested keys joined by dots.

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

      def storage(key: str, dtype: np.dtype, size: int) -> _Storage:
        del size
        member = f'{root}data/{key}'
        bytes_ = archive.getinfo(member).file_size
        place = [_Place(path, member, 0)]
        return _Storage(place, dtype, bytes_ // dtype.itemsize)

      tree = _Unpickler(file, path, storage).load()
  return _sorted(tree)


def read_legacy(path: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
  """As `read`, of what `torch.save` wrote before version 1.6.

  A number, a version and the machine's sizes, the tree, the keys of the
  storages, and then the storages one after the other.

  Raises:
    ValueError: it is another pickle, or as of `read`.
  """
  storages: dict[str, _Storage] = {}

  def storage(key: str, dtype: np.dtype, size: int) -> _Storage:
    return storages.setdefault(key, _Storage([], dtype, size))

  with open(path, 'rb') as file:

    def load() -> Any:
      return _Unpickler(file, path, storage).load()

    try:
      if load() != _MAGIC:
        raise ValueError(
          f'{path} is a bare pickle that torch.save did not write. Open it '
          'where you trust it and save its tensors with torch or numpy.'
        )
      _, machine, tree, keys = load(), load(), load(), load()
    except (EOFError, pickle.UnpicklingError) as error:
      raise ValueError(f'{path} is no complete pickle.') from error
    if not machine.get('little_endian', True):
      raise ValueError(f'{path} is big-endian; only little-endian is read.')
    end = os.path.getsize(path)
    at = file.tell()
    for key in keys:
      file.seek(at)
      count, at = int.from_bytes(file.read(8), 'little'), at + 8
      found = storages[key]
      found.place.append(_Place(path, None, at))
      at += count * found.dtype.itemsize
      if count != found.size or at > end:
        raise ValueError(f'{path} ends before its tensors: it is truncated.')
  return _sorted(tree)


def _sorted(tree: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
  tensors: dict[str, Tensor] = {}
  others: dict[str, Any] = {}
  for name, leaf in _leaves(tree, ''):
    if isinstance(leaf, Tensor):
      tensors[name] = leaf
    else:
      others[name] = leaf
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
    self,
    file: Any,
    path: str,
    storage: Callable[[str, np.dtype, int], _Storage],
  ):
    super().__init__(file)
    self._path, self._storage = path, storage

  def find_class(self, module: str, name: str) -> Any:
    if module == 'torch' and name in _DTYPES:
      return np.dtype(_DTYPES[name])
    if module == 'torch' and name in _MORE_DTYPES:
      return np.dtype(_MORE_DTYPES[name])
    if module == 'torch' and re.fullmatch(
      r'b?float\d+|u?int\d+|bool|complex\d+', name
    ):
      return name
    if (module, name) in _INERT:
      return _Inert
    allowed: dict[tuple[str, str], Any] = {
      ('collections', 'OrderedDict'): collections.OrderedDict,
      ('collections', 'defaultdict'): lambda *_: {},
      ('torch', 'Size'): tuple,
      ('torch.storage', 'UntypedStorage'): np.dtype(np.uint8),
      ('torch._utils', '_rebuild_tensor_v2'): _tensor,
      ('torch._utils', '_rebuild_tensor_v3'): _tensor_of_type,
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
    kind, dtype, key, _, size = pid[:5]
    if kind != 'storage' or not isinstance(dtype, np.dtype):
      raise ValueError(f'{self._path} refers to {pid!r}; only to storages.')
    return self._storage(key, dtype, size)


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
      f'a tensor of shape {shape}, strides {strides} at '
      f'{offset} does not fit into its storage of {storage.size} numbers.'
    )

  def values() -> np.ndarray:
    item = storage.dtype.itemsize
    flat = storage.place[0].read(offset * item, span * item)
    return np.lib.stride_tricks.as_strided(
      flat.view(storage.dtype), shape, [item * stride for stride in strides]
    )

  return Tensor(shape, values)


def _parameter(tensor: Tensor, *_: Any) -> Tensor:
  return tensor


def _tensor_of_type(
  storage: _Storage,
  offset: int,
  shape: tuple[int, ...],
  strides: tuple[int, ...],
  _: Any,
  __: Any,
  dtype: np.dtype,
  *___: Any,
) -> Tensor:
  """Of types that have no storage class: bytes, read as the type."""
  count = storage.size // dtype.itemsize
  return _tensor(_Storage(storage.place, dtype, count), offset, shape, strides)

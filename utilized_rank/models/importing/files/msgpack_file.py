"""Files of `flax.serialization`, read leaf by leaf."""

from __future__ import annotations

from collections.abc import Generator
import functools
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from utilized_rank.host.extras import extra
from utilized_rank.models.importing.files.tensor import Tensor

with extra('models'):
  from flax import serialization
  import msgpack

_NDARRAY = 1  # flax.serialization's code for an array
_HEAD = 512  # more than keys, lengths and shapes take


class _Leaf(NamedTuple):
  """Where in the file a leaf is; `shape` is None if it is no array.

  Flax cuts an array of over a GiB into flat `pieces`.
  """

  name: str
  start: int
  size: int
  shape: tuple[int, ...] | None
  pieces: tuple[_Leaf, ...] = ()


def read(path: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
  """Tensors, and what is none as None; nested keys joined by `/`.

  Raises:
    ValueError: the file is no msgpack of a dictionary.
  """
  tensors: dict[str, Tensor] = {}
  others: dict[str, Any] = {}
  with open(path, 'rb') as file:
    try:
      leaves = list(_walk(file, 0, ''))
    except (msgpack.UnpackException, IndexError) as error:
      raise ValueError(f'{path} is no complete msgpack file.') from error
  for leaf in leaves:
    if leaf.shape is None:
      others[leaf.name] = None
    else:
      values = functools.partial(_values, path, leaf)
      tensors[leaf.name] = Tensor(leaf.shape, values)
  return tensors, others


def _walk(file: BinaryIO, start: int, name: str) -> Generator[_Leaf, None, int]:
  """Yields the leaves below `start` and returns where they end."""
  head = _peek(file, start)
  if 0x80 <= head[0] <= 0x8F or head[0] in (0xDE, 0xDF):
    unpacker = _unpacker(head)
    count, at = unpacker.read_map_header(), start + unpacker.tell()
    for _ in range(count):
      unpacker = _unpacker(_peek(file, at))
      key, at = unpacker.unpack(), at + unpacker.tell()
      if key == '__msgpack_chunked_array__':
        leaf = _chunked(file, at, name, count - 1)
        yield leaf
        return leaf.start + leaf.size
      at = yield from _walk(file, at, f'{name}/{key}' if name else str(key))
    return at
  if extension := _extension(head):
    code, before, size = extension
    shape = None
    if code == _NDARRAY:
      # (shape, name of the dtype, bytes)
      unpacker = _unpacker(head[before:])
      unpacker.read_array_header()
      shape = tuple(unpacker.unpack())
    yield _Leaf(name, start, before + size, shape)
    return start + before + size
  file.seek(start)
  unpacker = msgpack.Unpacker(file, max_buffer_size=0)
  unpacker.skip()
  yield _Leaf(name, start, unpacker.tell(), None)
  return start + unpacker.tell()


def _chunked(file: BinaryIO, start: int, name: str, more: int) -> _Leaf:
  """An array in pieces, from behind the key that says so."""
  at = start + 1  # the key's value is True
  shape: tuple[int, ...] = ()
  pieces: list[_Leaf] = []
  for _ in range(more):
    unpacker = _unpacker(_peek(file, at))
    key, at = unpacker.unpack(), at + unpacker.tell()
    if key == 'shape':
      unpacker = _unpacker(_peek(file, at))
      sizes, at = unpacker.unpack(), at + unpacker.tell()
      shape = tuple(sizes[str(i)] for i in range(len(sizes)))
    else:
      walk = _walk(file, at, '')
      try:
        while True:
          pieces.append(next(walk))
      except StopIteration as stop:
        at = stop.value
  pieces.sort(key=lambda piece: int(piece.name))
  return _Leaf(name, start, at - start, shape, tuple(pieces))


def _peek(file: BinaryIO, start: int) -> bytes:
  file.seek(start)
  return file.read(_HEAD)


def _unpacker(head: bytes) -> msgpack.Unpacker:
  unpacker = msgpack.Unpacker()
  unpacker.feed(head)
  return unpacker


def _extension(head: bytes) -> tuple[int, int, int] | None:
  """Code, bytes of the header and bytes after it of an extension type."""
  if 0xD4 <= head[0] <= 0xD8:
    return head[1], 2, 1 << (head[0] - 0xD4)
  if 0xC7 <= head[0] <= 0xC9:
    length = 1 << (head[0] - 0xC7)
    size = int.from_bytes(head[1 : 1 + length], 'big')
    return head[1 + length], 2 + length, size
  return None


def _values(path: str, leaf: _Leaf) -> np.ndarray:
  if leaf.pieces:
    flat = np.concatenate([_values(path, piece) for piece in leaf.pieces])
    return flat.reshape(leaf.shape)
  with open(path, 'rb') as file:
    file.seek(leaf.start)
    values: Any = serialization.msgpack_restore(file.read(leaf.size))
  return np.asarray(values)

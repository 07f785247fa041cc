"""Files of `flax.serialization`, read leaf by leaf."""

from __future__ import annotations

from collections.abc import Iterator
import functools
from typing import Any, BinaryIO, NamedTuple

from flax import serialization
import msgpack
import numpy as np

from utilized_rank.models.importing.tensor import Tensor

_NDARRAY = 1  # flax.serialization's code for an array


class _Leaf(NamedTuple):
  """Where in the file a leaf is."""

  name: str
  start: int
  size: int


def read(path: str) -> tuple[dict[str, Tensor], list[str]]:
  """Tensors and the names of what is none; nested keys joined by `/`.

  Raises:
    ValueError: the file is no msgpack of a dictionary, or has an array of over
      a GiB, which Flax cuts into pieces.
  """
  tensors: dict[str, Tensor] = {}
  others: list[str] = []
  with open(path, 'rb') as file:
    for leaf in _leaves(path):
      shape = _shape(file, leaf)
      if shape is None:
        others.append(leaf.name)
      else:
        tensors[leaf.name] = Tensor(
          shape, functools.partial(_values, path, leaf)
        )
  return tensors, others


def _leaves(path: str) -> Iterator[_Leaf]:
  with open(path, 'rb') as file, open(path, 'rb') as ahead:
    unpacker = msgpack.Unpacker(file, max_buffer_size=0, raw=False)

    def walk(name: str) -> Iterator[_Leaf]:
      start = unpacker.tell()
      ahead.seek(start)
      if _is_map(ahead.read(1)):
        for _ in range(unpacker.read_map_header()):
          key = unpacker.unpack()
          if key == '__msgpack_chunked_array__':
            raise ValueError(
              f'{path}: {name} is over a GiB, which Flax cuts into pieces; '
              'save it as safetensors instead.'
            )
          yield from walk(f'{name}/{key}' if name else str(key))
      else:
        unpacker.skip()
        yield _Leaf(name, start, unpacker.tell() - start)

    try:
      yield from walk('')
    except (msgpack.UnpackException, msgpack.exceptions.ExtraData) as error:
      raise ValueError(f'{path} is no complete msgpack file.') from error


def _is_map(first: bytes) -> bool:
  return bool(first) and (0x80 <= first[0] <= 0x8F or first[0] in (0xDE, 0xDF))


def _shape(file: BinaryIO, leaf: _Leaf) -> tuple[int, ...] | None:
  """The shape of an array, from the beginning of its bytes; else None."""
  file.seek(leaf.start)
  head = file.read(512)
  first = head[0] if head else 0
  # Extension types: of 1 to 16 bytes, or with 1, 2 or 4 bytes of length.
  before = (
    1 if 0xD4 <= first <= 0xD8 else {0xC7: 2, 0xC8: 3, 0xC9: 5}.get(first)
  )
  if before is None or head[before] != _NDARRAY:
    return None
  unpacker = msgpack.Unpacker(raw=False)
  unpacker.feed(head[before + 1 :])
  unpacker.read_array_header()
  return tuple(unpacker.unpack())


def _values(path: str, leaf: _Leaf) -> np.ndarray:
  with open(path, 'rb') as file:
    file.seek(leaf.start)
    values: Any = serialization.msgpack_restore(file.read(leaf.size))
  return np.asarray(values)

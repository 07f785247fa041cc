"""Random access to TFDS sets stored as TFRecord, without TensorFlow.

TFDS reads TFRecord through TensorFlow and only in order. The file format
itself is simple: a record is its length (uint64, little endian), four bytes
of checksum, the payload, and four more bytes of checksum. Reading the lengths
gives every record's place, and with it the same random access, order and
resumption that array_record files have. The checksums are not verified.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
import itertools
import struct
import threading
from typing import Any


class TfRecords:
  """The examples of one split, decoded to numpy.

  A shard's lengths are read on the first access to it: one seek per record.

  Args:
    instructions: TFDS `FileInstruction`s (filename, skip, take).
    features: the TFDS features that decode a record.
    decoders: TFDS decoders of single features, or None.
  """

  def __init__(
    self, instructions: Sequence[Any], features: Any, decoders: Any = None
  ):
    self._decoders = decoders
    self._instructions = [i for i in instructions if i.take]
    self._features = features
    self._ends = list(itertools.accumulate(i.take for i in self._instructions))
    self._places: dict[str, list[tuple[int, int]]] = {}
    self._lock = threading.Lock()

  def __len__(self) -> int:
    return self._ends[-1] if self._ends else 0

  def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
    """Reads the examples at `indices`, in that order."""
    return [self._read(int(i)) for i in indices]

  def _read(self, index: int) -> dict[str, Any]:
    shard = bisect.bisect_right(self._ends, index)
    instruction = self._instructions[shard]
    # Backwards from the shard's end, to save a second list of starts.
    record = instruction.skip + instruction.take - (self._ends[shard] - index)
    offset, length = self._shard(instruction)[record]
    with open(instruction.filename, 'rb') as file:
      file.seek(offset)
      payload = file.read(length)
    try:
      return self._features.deserialize_example_np(
        payload, decoders=self._decoders
      )
    except Exception as error:
      error.add_note(f'It is record {record} of {instruction.filename}.')
      raise

  def _shard(self, instruction: Any) -> list[tuple[int, int]]:
    with self._lock:
      if instruction.filename not in self._places:
        places = _scan(instruction.filename)
        if len(places) != instruction.examples_in_shard:
          raise ValueError(
            f'{instruction.filename} holds {len(places)} whole records; its '
            f'dataset_info.json says {instruction.examples_in_shard}. The '
            'file is truncated or compressed, or belongs to another version.'
          )
        self._places[instruction.filename] = places
      return self._places[instruction.filename]


def _scan(filename: str) -> list[tuple[int, int]]:
  """Offsets and lengths in bytes of the payloads of one file."""
  places = []
  with open(filename, 'rb') as file:
    size = file.seek(0, 2)
    start = 0
    while start + 12 <= size:
      file.seek(start)
      (length,) = struct.unpack('<Q', file.read(8))
      if start + 16 + length > size:
        break
      places.append((start + 12, length))
      start += 16 + length
  return places

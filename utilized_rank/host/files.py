"""Files that appear whole or not at all, and say so if they were changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import hashlib
import json
import os
from typing import IO, Any, TypeVar

T = TypeVar('T')
_DIGEST = 'sha256'


def write_text(path: str | os.PathLike[str], text: str) -> None:
  """Writes beside the file, then renames over it."""
  write(path, lambda file: file.write(text.encode()))


def write(
  path: str | os.PathLike[str], put: Callable[[IO[bytes]], Any]
) -> None:
  """Writes what `put(file)` puts beside the file, then renames over it."""
  where = os.fspath(path)
  beside = f'{where}.tmp'
  with open(beside, 'wb') as file:
    put(file)
    file.flush()
    os.fsync(file.fileno())
  os.replace(beside, where)


def write_json(
  path: str | os.PathLike[str],
  record: Mapping[str, Any],
  *,
  indent: int | None = None,
) -> None:
  """Writes JSON with a digest of itself, which `read_json` compares."""
  write_text(path, json.dumps(sealed(record), indent=indent) + '\n')


def read_json(
  path: str | os.PathLike[str], what: str, make: Callable[[Any], T]
) -> T:
  """What `make` makes of a file of JSON.

  Args:
    path: the file.
    what: what it should hold, for the error.
    make: of what was parsed; its KeyError, TypeError and ValueError mean that
      the file holds something else.

  Raises:
    FileNotFoundError: there is no file.
    ValueError: it is damaged, or holds something else.
  """
  try:
    return make(parsed(path))
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(
      f'{os.fspath(path)!r} holds no {what}, or a damaged one: {error}'
    ) from error


def parsed(path: str | os.PathLike[str]) -> Any:
  """What a file of JSON holds, without its digest.

  Raises:
    FileNotFoundError: there is no file.
    ValueError: it is no text, no JSON, or not what was written.
  """
  with open(path, encoding='utf-8') as f:
    return unsealed(json.load(f))


def digest(path: str | os.PathLike[str]) -> str | None:
  """The SHA-256 of a file's bytes; None where there is none."""
  try:
    with open(path, 'rb') as file:
      return hashlib.file_digest(file, _DIGEST).hexdigest()
  except FileNotFoundError:
    return None


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
  """A record of JSON with its digest.

  >>> unsealed(sealed({'rank': 3}))
  {'rank': 3}
  >>> unsealed({**sealed({'rank': 3}), 'rank': 2})
  Traceback (most recent call last):
    ...
  ValueError: it is not what was written: its sha256 is another; ...
  """
  return {**record, _DIGEST: _digest(record)}


def unsealed(record: Any) -> Any:
  """The record alone; what has no digest, as of before 0.2.0, is as it was.

  Raises:
    ValueError: the digest is of another record.
  """
  if not isinstance(record, dict) or _DIGEST not in record:
    return record
  rest = {key: value for key, value in record.items() if key != _DIGEST}
  if _digest(rest) != record[_DIGEST]:
    raise ValueError(
      f'it is not what was written: its {_DIGEST} is another; what was changed '
      'on purpose has none'
    )
  return rest


def _digest(record: Mapping[str, Any]) -> str:
  # As JSON gives it back: lists for tuples, strings for numbers as keys.
  plain = json.loads(json.dumps(record))
  text = json.dumps(plain, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()

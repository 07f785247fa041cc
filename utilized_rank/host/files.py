"""Files that appear whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
import json
import os
from typing import IO, Any, TypeVar

T = TypeVar('T')


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
  with open(path, encoding='utf-8') as f:
    text = f.read()
  try:
    return make(json.loads(text))
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(
      f'{os.fspath(path)!r} holds no {what}, or a damaged one: {error}'
    ) from error

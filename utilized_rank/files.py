"""Files that appear whole or not at all."""

from __future__ import annotations

import os


def write_text(path: str | os.PathLike[str], text: str) -> None:
  """Writes beside the file, then renames over it."""
  where = os.fspath(path)
  beside = f'{where}.tmp'
  with open(beside, 'w', encoding='utf-8') as f:
    f.write(text)
  os.replace(beside, where)

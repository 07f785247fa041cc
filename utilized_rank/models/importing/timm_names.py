"""Facts that the names of timm's and torchvision's models say.

`timm_names.txt` is written by `python tests/parity/timm_names.py` from timm's
own modules: a line of options, then the names that have them.
"""

from __future__ import annotations

import ast
import difflib
import functools
import pathlib
from typing import Any

# Akamaster's for CIFAR, and torchvision's that timm names otherwise.
_MORE: dict[str, dict[str, Any]] = {
  **{f'resnet{n}': {'activation': 'relu'} for n in (20, 32, 44, 56, 110, 1202)},
  **{
    f'vit_{size}_{patch}': {'heads': heads}
    for size, patch, heads in (
      ('b', 16, 12),
      ('b', 32, 12),
      ('l', 16, 16),
      ('l', 32, 16),
      ('h', 14, 16),
    )
  },
}


@functools.cache
def _table() -> dict[str, dict[str, Any]]:
  names = dict(_MORE)
  text = pathlib.Path(__file__).with_name('timm_names.txt').read_text()
  facts: dict[str, Any] = {}
  for line in text.splitlines():
    if line.startswith('{'):
      facts = ast.literal_eval(line)
    else:
      names.update(dict.fromkeys(line.split(), facts))
  return names


def known(architecture: Any) -> bool:
  """Whether it is a name that `facts` takes."""
  name = architecture.partition('.')[0] if isinstance(architecture, str) else ''
  return name in _table()


def facts(architecture: str, source: str) -> dict[str, Any]:
  """Options of the model with that name; a tag behind a dot says none.

  Raises:
    ValueError: there is no layout for a model of that name.

  >>> facts('vit_tiny_patch16_224.augreg_in21k', '')['heads']
  3
  """
  name = architecture.partition('.')[0]
  table = _table()
  if name not in table:
    near = difflib.get_close_matches(name, table, 4)
    raise ValueError(
      f'{source}: {architecture!r} is no model of timm or torchvision that has '
      f'a layout here; near in name: {", ".join(near) or "none"}.'
    )
  return dict(table[name])

"""How benchmarks write down what they found, and where they found it."""

from __future__ import annotations

from collections.abc import Sequence
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import sys
from typing import Any

import jax

RESULTS = pathlib.Path(__file__).parent / 'results'
_PACKAGES = ('utilized_rank', 'jax', 'jaxlib', 'flax', 'numpy', 'torch')
# Their values are places of one machine.
_PLACES = {'--data_root': 'DIR', '--out': None, '--cache': None}


def command(module: str, argv: Sequence[str] | None = None) -> str:
  """The command line, without the places of this machine.

  >>> command('gram', ['--repeats', '3', '--data_root=/d', '--out', 'x.json'])
  'python -m benchmarks.gram --repeats 3 --data_root=DIR'
  """
  words = ['python', '-m', f'benchmarks.{module}']
  rest = iter(sys.argv[1:] if argv is None else argv)
  for word in rest:
    name, equals, _ = word.partition('=')
    if name not in _PLACES:
      words.append(word)
      continue
    if not equals:
      next(rest, None)
    if _PLACES[name]:
      words.append(f'{name}={_PLACES[name]}')
  return ' '.join(words)


def conditions(line: str) -> dict[str, Any]:
  """Command, date, machine, its load, and versions."""
  versions = {'python': platform.python_version()}
  for name in _PACKAGES:
    try:
      versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return {
    'command': line,
    'date': datetime.date.today().isoformat(),
    'machine': f'{os.cpu_count()} cores, {platform.machine()}, '
    f'{jax.devices()[0].device_kind}',
    'load': [round(v, 1) for v in os.getloadavg()],
    'versions': versions,
  }


def write(path: Any, line: str, result: dict[str, Any]) -> None:
  """Writes a result with its conditions; nothing where `path` is None."""
  if path is None:
    return
  text = json.dumps({**conditions(line), **result}, indent=1)
  pathlib.Path(path).write_text(text + '\n', encoding='utf-8')

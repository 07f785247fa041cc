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
# What decides on speed from outside of the program.
_SETTINGS = (
  'GLIBC_TUNABLES',
  'MALLOC_ARENA_MAX',
  'MALLOC_MMAP_MAX_',
  'MALLOC_TRIM_THRESHOLD_',
  'XLA_FLAGS',
)


def command(module: str, argv: Sequence[str] | None = None) -> str:
  """The command line, with settings, without the places of this machine.

  >>> command('gram', ['--repeats', '3', '--data_root=/d', '--out', 'x.json'])
  'python -m benchmarks.gram --repeats 3 --data_root=DIR'
  """
  words = [f'{k}={os.environ[k]}' for k in _SETTINGS if k in os.environ]
  words += ['python', '-m', f'benchmarks.{module}']
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
    'machine': f'{os.cpu_count()} cores, {_processor()}, '
    f'{jax.devices()[0].device_kind}',
    'load': [round(v, 1) for v in os.getloadavg()],
    'versions': versions,
  }


def _processor() -> str:
  """The processor's name, where Linux tells it, and what it is."""
  cpus = pathlib.Path('/proc/cpuinfo')
  lines = cpus.read_text().splitlines() if cpus.exists() else []
  named = [v for v in lines if v.startswith('model name')]
  return ', '.join(
    [v.partition(':')[2].strip() for v in named[:1]] + [platform.machine()]
  )


def write(path: Any, line: str, result: dict[str, Any]) -> None:
  """Writes a result with its conditions; nothing where `path` is None."""
  if path is None:
    return
  text = json.dumps({**conditions(line), **result}, indent=1)
  pathlib.Path(path).write_text(text + '\n', encoding='utf-8')

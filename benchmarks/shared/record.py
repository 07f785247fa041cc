"""How benchmarks write down what they found, and where they found it."""

from __future__ import annotations

from collections.abc import Sequence
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys
from typing import Any

import jax

_ROOT = pathlib.Path(__file__).parents[2]
RESULTS = _ROOT / 'benchmarks' / 'results'
_PACKAGES = ('utilized_rank', 'jax', 'jaxlib', 'flax', 'numpy', 'torch')
# Their values are places of one machine.
_PLACES = {
  '--data_root': 'DIR',
  '--base': 'CHECKOUT',
  '--out': None,
  '--cache': None,
  '--workdir': None,
}
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


def commit(root: pathlib.Path) -> str | None:
  """The commit that is checked out, short, `+` if files of it were changed.

  Results that earlier runs wrote are no changes. None if `root` is not the top
  of a git repository, or there is no git.
  """

  def git(*words):
    done = subprocess.run(
      ['git', '-C', root, *words], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()

  if not (root / '.git').exists():
    return None
  try:
    head = git('rev-parse', '--short', 'HEAD')
    changed = git(
      'status', '--porcelain', '--untracked-files=no', '--',
      '.', ':!benchmarks/results',
    )  # fmt: skip
  except (OSError, subprocess.CalledProcessError):
    return None
  return head + '+' * bool(changed)


# As the program begins: what is checked out while it runs is not what runs.
_COMMIT = commit(_ROOT)


def conditions(line: str) -> dict[str, Any]:
  """Command, date, commit, machine, its load, and versions."""
  versions = {'python': platform.python_version()}
  for name in _PACKAGES:
    try:
      versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return {
    'command': line,
    'date': datetime.date.today().isoformat(),
    'commit': _COMMIT,
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


def write(
  path: pathlib.Path | None,
  module: str,
  result: dict[str, Any],
  argv: Sequence[str] | None = None,
) -> None:
  """Writes a result with its conditions; nothing where `path` is None.

  Args:
    path: the file; what it held is lost.
    module: the benchmark's name, for the command line.
    result: what was found.
    argv: the options to name, if not those of this process.
  """
  if path is None:
    return
  result = {**conditions(command(module, argv)), **result}
  path.write_text(json.dumps(result, indent=1) + '\n', encoding='utf-8')

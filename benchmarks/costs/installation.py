"""What installing and importing the core takes, beside an older commit.

  python -m benchmarks.installation --base=CHECKOUT \\
    --out benchmarks/results/installation.json

CHECKOUT is a checkout of the commit to compare with (c1a4d28). Each is
installed without extras into an environment of its own, from the index that pip
is set up for, and imported in turns. Then pip resolves the core for other
platforms from wheels alone, without downloading them. Bars: the installed size
is at most .5 of the older one's, the import takes no longer, and every
platform and Python for which JAX has wheels resolves. The size of JAX and numpy
with what they need, the floor, is written beside. Takes five minutes and 3 GB
of disk.
"""

from __future__ import annotations

from collections.abc import Sequence
import configparser
import json
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

from benchmarks.shared import arguments
from benchmarks.shared import record

BARS = {'size': 0.5, 'import': 1.0}
FLOOR = ['jax', 'numpy']
_GLIBC = range(17, 32)
# By name, the tags of wheels that such a machine takes. Intel Macs are there to
# show what JAX leaves out.
PLATFORMS = {
  'Windows x86_64': ['win_amd64'],
  'macOS arm64': [f'macosx_{v}_0_arm64' for v in range(11, 16)],
  'macOS x86_64': [f'macosx_{v}_0_x86_64' for v in range(11, 16)],
  'Linux x86_64': [f'manylinux_2_{v}_x86_64' for v in _GLIBC]
  + ['manylinux2014_x86_64'],
  'Linux aarch64': [f'manylinux_2_{v}_aarch64' for v in _GLIBC]
  + ['manylinux2014_aarch64'],
}
PYTHONS = ('3.11', '3.12', '3.13')

IMPORT = """
import time
start = time.perf_counter()
import utilized_rank
print(time.perf_counter() - start)
"""
_ROOT = pathlib.Path(__file__).parents[2]


def environment(folder: pathlib.Path, packages: Sequence[str]) -> str:
  """The interpreter of a new environment with some packages.

  Args:
    folder: where it is made.
    packages: what pip is to install.
  """
  python = str(folder / 'bin' / 'python')
  pip = [python, '-m', 'pip', 'install', '--quiet']
  for words in (
    [sys.executable, '-m', 'venv', str(folder)],
    [*pip, '--upgrade', 'pip'],
    [*pip, *packages],
    # Import times are of code that is compiled, whatever pip left out.
    [python, '-m', 'compileall', '-q', str(folder / 'lib')],
  ):
    subprocess.run(words, check=True, cwd=folder.parent)
  return python


def copied(checkout: pathlib.Path, folder: pathlib.Path) -> str:
  """A copy of what is committed, so that nothing is built in the checkout."""
  words = ['git', 'clone', '-q', '--depth=1', f'file://{checkout}', str(folder)]
  subprocess.run(words, check=True)
  return str(folder)


def megabytes(folder: pathlib.Path) -> float:
  """Of all files below, but for pip itself and what Python compiled of it."""
  sizes = [
    path.lstat().st_size
    for path in folder.rglob('*')
    if path.is_file()
    and not any(part.startswith('pip') for part in path.parts)
    and '__pycache__' not in path.parts
  ]
  return round(sum(sizes) / 1e6, 1)


def import_seconds(python: str, folder: pathlib.Path) -> float:
  """Seconds that the import takes in a process of its own."""
  done = subprocess.run(
    [python, '-c', IMPORT], check=True, cwd=folder, capture_output=True
  )
  return float(done.stdout)


def resolved(python: str, requirements: list[str], version: str, tags) -> Any:
  """Names and versions of what pip would install, or its last line."""
  words = [python, '-m', 'pip', 'install', '--dry-run', '--quiet', '--report=-']
  words += ['--ignore-installed', '--only-binary=:all:', '--target=nowhere']
  words += [f'--python-version={version}', '--implementation=cp']
  words += [f'--platform={tag}' for tag in tags]
  done = subprocess.run(
    [*words, *requirements], capture_output=True, text=True, check=False
  )
  if done.returncode:
    return done.stderr.strip().splitlines()[-1]
  found = [v['metadata'] for v in json.loads(done.stdout)['install']]
  return {v['name']: v['version'] for v in found}


def requirements_of(checkout: pathlib.Path) -> list[str]:
  """What the core of a checkout asks for."""
  config = configparser.ConfigParser()
  config.read(checkout / 'setup.cfg', encoding='utf-8')
  lines = config['options']['install_requires'].split('\n')
  return [line for line in map(str.strip, lines) if line and line[0] != '#']


def main():
  parser = arguments.parser(__doc__, repeats=15)
  parser.add_argument(
    '--base', type=pathlib.Path, required=True, help='the older checkout'
  )
  args = parser.parse_args()
  checkouts = {'base': args.base.absolute(), 'now': _ROOT}
  with tempfile.TemporaryDirectory() as temporary:
    folder = pathlib.Path(temporary)
    pythons = {
      name: environment(
        folder / name, [copied(checkout, folder / f'{name}_source')]
      )
      for name, checkout in checkouts.items()
    }
    environment(folder / 'floor', FLOOR)
    sizes = {k: megabytes(folder / k / 'lib') for k in (*checkouts, 'floor')}
    print('MB', sizes, flush=True)
    seconds: dict[str, list[float]] = {k: [] for k in checkouts}
    for _ in range(args.repeats):
      for name, python in pythons.items():
        seconds[name].append(import_seconds(python, folder))
    least = {k: round(min(v), 3) for k, v in seconds.items()}
    print('seconds', least, flush=True)
    core = requirements_of(_ROOT)
    platforms = {
      f'{name}, Python {version}': resolved(pythons['now'], core, version, tags)
      for name, tags in PLATFORMS.items()
      for version in PYTHONS
    }
  ratios = {
    'size': round(sizes['now'] / sizes['base'], 3),
    'size of the floor': round(sizes['floor'] / sizes['base'], 3),
    'import': round(least['now'] / least['base'], 3),
  }
  for name, found in platforms.items():
    print(name, found if isinstance(found, str) else 'resolves', flush=True)
  print('ratios', ratios, 'bars', BARS)
  record.write(
    args.out,
    'installation',
    {
      'base_commit': record.commit(checkouts['base']),
      'bars': BARS,
      'ratios': ratios,
      'megabytes': sizes,
      'import_seconds': least,
      'platforms': platforms,
    },
  )


if __name__ == '__main__':
  main()

"""`pytest --quick`: what a change touches, and one test of every room.

A change is what git sees against the commit that it begins at: the last one on
the main branch, or HEAD on that branch itself. A module touches its own
examples and `tests/<room>/test_<module>.py`; a test file touches itself.
"""

import pathlib
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[2]
MARK = 'mark.quick'


def pytest_addoption(parser):
  parser.addoption(
    '--quick',
    action='store_true',
    help='only what a change touches, and one test of every room',
  )


def pytest_configure(config):
  if config.getoption('--quick'):
    config.stash[TOUCHED] = touched(changed())


TOUCHED = pytest.StashKey[set]()


def pytest_ignore_collect(collection_path, config):
  """Files of which nothing will run are not even imported."""
  files = config.stash.get(TOUCHED, None)
  if files is None or collection_path.suffix != '.py':
    return None
  if collection_path in files or collection_path.name == 'conftest.py':
    return None
  return True if MARK not in collection_path.read_text('utf-8') else None


def pytest_collection_modifyitems(config, items):
  files = config.stash.get(TOUCHED, None)
  if files is None:
    return
  wanted = lambda item: (
    'quick' in item.keywords
    or (item.path in files and 'slow' not in item.keywords)
  )
  left_out = [item for item in items if not wanted(item)]
  items[:] = [item for item in items if wanted(item)]
  config.hook.pytest_deselected(items=left_out)


def changed() -> list[str]:
  """Paths that differ from where the change began, new ones among them."""
  base = _git('merge-base', 'HEAD', 'main') or ['HEAD']
  return [
    *_git('diff', '--name-only', base[0]),
    *_git('ls-files', '--others', '--exclude-standard'),
  ]


def touched(paths: list[str]) -> set[pathlib.Path]:
  """The files whose tests and examples a change of these paths touches."""
  found = set()
  for path in map(pathlib.PurePosixPath, paths):
    if path.suffix != '.py':
      continue
    found.add(ROOT / path)
    if path.parts[0] == 'utilized_rank':
      room = pathlib.PurePosixPath('tests', *path.parts[1:-1])
      found.add(ROOT / room / f'test_{path.name}')
  return {path for path in found if path.exists()}


def _git(*words: str) -> list[str]:
  """Lines that git prints; none where it fails, as outside of a checkout."""
  done = subprocess.run(
    ['git', *words], cwd=ROOT, capture_output=True, text=True, check=False
  )
  return done.stdout.splitlines() if done.returncode == 0 else []

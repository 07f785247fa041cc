"""The rooms of the package: their order, their size, what importing costs."""

import ast
import importlib
import pathlib
import re
import subprocess
import sys

import pytest

import utilized_rank

ROOT = pathlib.Path(utilized_rank.__file__).parent
# Lowest first. A room imports from itself and from rooms before it.
CORE = [
  'tree',
  'host',
  'losses',
  'walk',
  'axes',
  'products',
  'linalg',
  'lowrank',
  'moments',
  'factorization',
  'storage',
  'collection',
  'ranks',
  'attention',
  'hidden',
  'refit',
  'report',
  'compression',
]
# They need flax, optax, TFDS, absl or torch, and are imported by name.
OUTER = [
  'models',
  'streaming',
  'data',
  'training',
  'experiment',
  'command',
  'torch',
]
ROOMS = [*CORE, *OUTER]
MOST_FILES = 15
MOST_LINES = 400


def modules():
  """(name of the room, dotted name, path) of every module in a room."""
  for path in sorted(ROOT.rglob('*.py')):
    parts = path.relative_to(ROOT).with_suffix('').parts
    if len(parts) > 1:
      yield parts[0], '.'.join(('utilized_rank', *parts)), path


def imports_of(path):
  """(dotted module, whether it is imported when the file is)."""
  tree = ast.parse(path.read_text())
  lazy = {
    id(node)
    for f in ast.walk(tree)
    if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef))
    for node in ast.walk(f)
  }
  for guard in ast.walk(tree):
    if isinstance(guard, ast.If) and 'TYPE_CHECKING' in ast.dump(guard.test):
      lazy |= {id(node) for node in ast.walk(guard)}
  for node in ast.walk(tree):
    eager = id(node) not in lazy
    if isinstance(node, ast.Import):
      for alias in node.names:
        yield alias.name, eager
    elif isinstance(node, ast.ImportFrom):
      for alias in node.names:
        whole = f'{node.module}.{alias.name}'
        is_module = (ROOT.parent / whole.replace('.', '/')).with_suffix('.py')
        yield whole if is_module.exists() else node.module, eager


def test_every_folder_is_a_room():
  assert {room for room, _, _ in modules()} == set(ROOMS)
  alone = {path.name for path in ROOT.glob('*.py')}
  assert alone == {'__init__.py', 'version.py'}


def test_rooms_are_imported_one_way():
  place = {room: i for i, room in enumerate(ROOMS)}
  for room, name, path in modules():
    for module, _ in imports_of(path):  # those inside of functions, too
      parts = module.split('.')
      if parts[0] != 'utilized_rank' or parts[1:] == ['version']:
        continue
      assert len(parts) > 1, f'{name} imports the package it is in'
      assert place[parts[1]] <= place[room], f'{name} imports {module}'


def test_no_modules_import_each_other():
  graph = {
    name: {m for m, _ in imports_of(path) if m.startswith('utilized_rank.')}
    for _, name, path in modules()
  }
  done, open_ = set(), []

  def visit(name):
    assert name not in open_, ' -> '.join([*open_[open_.index(name) :], name])
    if name in done:
      return
    open_.append(name)
    for other in sorted(graph.get(name, ())):
      visit(other)
    open_.pop()
    done.add(name)

  for name in graph:
    visit(name)


def test_rooms_and_files_are_small():
  folders = {path.parent for _, _, path in modules()}
  for folder in folders:
    files = [p for p in folder.glob('*.py') if p.name != '__init__.py']
    assert len(files) <= MOST_FILES, (folder.name, len(files))
  for _, name, path in modules():
    lines = len(path.read_text().splitlines())
    assert lines <= MOST_LINES, (name, lines)


def test_the_init_of_a_room_is_its_map():
  for room in ROOMS:
    tree = ast.parse((ROOT / room / '__init__.py').read_text())
    assert len(tree.body) == 1 and ast.get_docstring(tree), room


def test_the_map_has_every_room_in_order():
  readme = (ROOT.parent / 'README.md').read_text('utf-8')
  rows = re.findall(r'^\| (`\w+`(?:, `\w+`)*) \|', readme, re.M)
  named = [room for row in rows for room in re.findall(r'`(\w+)`', row)]
  assert [room for room in named if room in ROOMS] == ROOMS


def test_tests_mirror_the_rooms():
  here = pathlib.Path(__file__).parent
  of_no_room = {'support', 'properties', 'frameworks', 'parity'}
  for folder in here.iterdir():
    if folder.is_dir() and folder.name not in {*of_no_room, '__pycache__'}:
      assert folder.name in ROOMS
  names = [path.name for path in here.rglob('test_*.py')]
  assert len(names) == len(set(names)), 'pytest imports them by name'


def test_the_public_names_are_said_once():
  offered = utilized_rank.__all__
  assert offered == sorted(offered)
  assert all(hasattr(utilized_rank, name) for name in offered)
  assert dir(utilized_rank) == sorted([*offered, '__version__'])
  stub = ast.parse((ROOT / '__init__.pyi').read_text())
  told = {
    alias.asname: node.module
    for node in stub.body
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
  }
  assert set(told) == {*offered, '__version__'}
  for name in offered:
    module = importlib.import_module(told[name])
    assert getattr(utilized_rank, name) is getattr(module, name)
  with pytest.raises(AttributeError, match="no attribute 'measures'"):
    _ = utilized_rank.measures


def test_the_core_imports_jax_and_numpy_alone():
  allowed = {'jax', 'numpy', 'utilized_rank', *sys.stdlib_module_names}
  for room, name, path in modules():
    if room in OUTER:
      continue
    for module, eager in imports_of(path):
      assert not eager or module.split('.')[0] in allowed, (name, module)


def test_jax_internals_are_touched_in_one_file():
  for _, name, path in modules():
    text = path.read_text()
    for private in ('jax._src', 'jax.extend', 'jax.interpreters'):
      assert private not in text or name.endswith('.compat'), (name, private)


@pytest.mark.parametrize(
  'module', ['utilized_rank', 'utilized_rank.experiment.pipeline']
)
def test_importing_loads_no_tensorflow(module):
  code = (
    f'import sys, {module}; '
    "print([m for m in ('tensorflow', 'torch') if m in sys.modules])"
  )
  out = subprocess.run(
    [sys.executable, '-W', 'ignore', '-c', code],
    capture_output=True,
    text=True,
    check=True,
  )
  assert out.stdout.strip() == '[]'


def test_importing_loads_no_more_than_jax_and_numpy():
  code = (
    'import jax, jax.numpy, jax.sharding, jax.extend.core, sys\n'
    'import jax.extend.source_info_util\n'
    'before = set(sys.modules)\n'
    'import utilized_rank\n'
    "tops = {m.split('.')[0] for m in set(sys.modules) - before}\n"
    'print(sorted(tops - set(sys.stdlib_module_names)))'
  )
  out = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=True
  )
  assert out.stdout.strip() == "['utilized_rank']"

"""What an installation brings: the core, its extras, and what needs them."""

import ast
import configparser
import importlib.metadata
import pathlib
import re
import sys

import pytest

from utilized_rank.host.extras import extra
from utilized_rank.version import __version__

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / 'utilized_rank'
# As they are imported, where that is not their name.
IMPORTED_AS = {
  'absl-py': ['absl'],
  'orbax-checkpoint': ['orbax'],
  'pillow': ['PIL'],
  'scikit-learn': ['sklearn'],
}
# Which extras bring what they import without naming it.
BROUGHT = {'models': ['msgpack']}


def required():
  """The names of the requirements of each extra; '' is the core."""
  config = configparser.ConfigParser()
  config.read(ROOT / 'setup.cfg')
  lists = {'': config['options']['install_requires']}
  lists |= dict(config['options.extras_require'])
  return {
    name: {
      re.match(r'[\w-]+', line)[0]
      for line in text.split('\n')
      if line and not line.startswith('#')
    }
    for name, text in lists.items()
  }


def modules_of(names):
  return {
    module
    for name in names
    for module in IMPORTED_AS.get(name, [name.replace('-', '_')])
  }


def imports_in(node):
  for inner in ast.walk(node):
    if isinstance(inner, ast.Import):
      yield from (alias.name.partition('.')[0] for alias in inner.names)
    elif isinstance(inner, ast.ImportFrom):
      yield inner.module.partition('.')[0]


def extras_in(tree):
  """(extra, what is imported under it) of every `with extra(...):`."""
  for node in ast.walk(tree):
    if isinstance(node, ast.With):
      call = node.items[0].context_expr
      if isinstance(call, ast.Call) and getattr(call.func, 'id', '') == 'extra':
        yield call.args[0].value, set(imports_in(node))


@pytest.mark.quick
def test_an_extra_is_named_for_what_it_brings():
  needs = required()
  for path in PACKAGE.rglob('*.py'):
    for name, modules in extras_in(ast.parse(path.read_text())):
      brings = modules_of(needs[name]) | set(BROUGHT.get(name, []))
      assert modules <= brings, (path, name, modules - brings)


def test_what_is_imported_without_an_extra_is_in_the_core():
  core = modules_of(required()['']) | {'utilized_rank', 'ml_dtypes'}
  # Figures exist where matplotlib does, and a bar is where tqdm is.
  core |= {'matplotlib', 'tqdm'} | set(sys.stdlib_module_names)
  # Who asks for a model of transformers is told that it is not there.
  core.add('transformers')
  for path in PACKAGE.rglob('*.py'):
    tree = ast.parse(path.read_text())
    apart = {m for _, modules in extras_in(tree) for m in modules}
    assert set(imports_in(tree)) - apart <= core, path


def test_the_reference_environment_pins_all_that_is_required():
  pins = re.findall(
    r'^([\w-]+)==', (ROOT / 'requirements.txt').read_text(), re.M
  )
  pins = {name.replace('_', '-') for name in pins}
  needs = required()
  for name in ('', 'all', 'test'):
    assert {n.replace('_', '-') for n in needs[name]} <= pins


def test_a_missing_module_is_one_line_with_the_extra():
  with pytest.raises(ModuleNotFoundError) as error, extra('data'):
    import no_such_module.inside  # noqa: F401
  assert str(error.value) == (
    "no_such_module is not installed: pip install 'utilized-rank[data]' "
    'brings it'
  )
  assert error.value.name == 'no_such_module'


def test_tfds_does_not_declare_what_it_imports():
  """When it does, the line in setup.cfg and in docs/compatibility.md can go."""
  declared = importlib.metadata.requires('tensorflow-datasets') or []
  lines = [line for line in declared if line.startswith('importlib_resources')]
  assert all('python_version < "3.9"' in line for line in lines)
  assert 'importlib_resources' in required()['data']


def test_the_papers_of_the_package_agree():
  citation = (ROOT / 'CITATION.cff').read_text()
  assert f'\nversion: {__version__}\n' in citation
  assert 'arxiv.org/abs/2407.04797' in citation
  assert '\nlicense: Apache-2.0\n' in citation
  license_ = (ROOT / 'LICENSE').read_text()
  assert 'Apache License' in license_ and 'APPENDIX' in license_
  about = importlib.metadata.metadata('utilized_rank')
  assert about['Name'].replace('-', '_') == 'utilized_rank'

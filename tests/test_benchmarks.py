"""The list of benchmarks, the table of their results, and running by name."""

import ast
import doctest
import importlib
import importlib.util
import json
import pathlib
import re
import runpy
import shutil
import subprocess
import sys

import pytest

from benchmarks import ROOMS
from benchmarks import catalogue
from benchmarks import results_table
import benchmarks.__main__
from benchmarks.shared import record

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[1]
MODULES = [p for room in ROOMS for p in (ROOT / 'benchmarks' / room).iterdir()]
MODULES = [p for p in MODULES if p.suffix == '.py' and p.stem != '__init__']
RESULTS = results_table.load()


def python(*words, cwd=ROOT):
  return subprocess.run(
    [sys.executable, '-W', 'error', *words],
    cwd=cwd,
    capture_output=True,
    text=True,
    timeout=120,
  )


def test_every_module_is_listed_once():
  assert {b.path for b in catalogue.benchmarks().values()} == set(MODULES)
  assert len(catalogue.benchmarks()) == len(MODULES)
  listing = catalogue.listing()
  listed = re.findall(r'^  (\w+)$', listing, re.MULTILINE)
  assert listed == list(catalogue.benchmarks())
  assert all(b.purpose in listing for b in catalogue.benchmarks().values())


@pytest.mark.parametrize('name', catalogue.benchmarks())
def test_its_docstring_is_true_to_its_code(name):
  """What it says of its command line and its needs is what the code does."""
  benchmark = catalogue.benchmarks()[name]
  found = importlib.util.find_spec(f'benchmarks.{name}')
  assert found is not None and found.origin == str(benchmark.path)
  assert benchmark.purpose.endswith('.')
  source = benchmark.path.read_text(encoding='utf-8')
  tree = ast.parse(source)
  doc = ast.get_docstring(tree)
  assert re.search(rf'^ *python -m benchmarks\.{name}\b', doc, re.MULTILINE)
  code = source.replace(doc, '')
  reads_data = 'networks.parser(' in code or "'data_root'" in code
  assert ('--data_root' in benchmark.needs) == reads_data
  imported = {
    alias.name for node in tree.body if isinstance(node, ast.Import)
    for alias in node.names
  }  # fmt: skip
  assert ('the extra `torch`' in benchmark.needs) == ('torch' in imported)
  assert "if __name__ == '__main__':" in code


def test_the_committed_table_is_that_of_the_files():
  """Else: python -m benchmarks --results --write."""
  assert results_table.TABLE.read_text(encoding='utf-8') == results_table.text()


@pytest.mark.parametrize('name', RESULTS)
def test_every_result_names_its_benchmark_and_commit(name):
  result = RESULTS[name]
  assert results_table.benchmark_of(result) in catalogue.benchmarks()
  assert f'({name})' in results_table.text()
  commit = result.get('commit', result.get('landed_in'))
  assert commit is None or re.fullmatch(r'[0-9a-f]{7,40}\+?', commit)
  assert 'commit' in result or 'landed_in' in result


def test_what_is_written_elsewhere_names_benchmarks_that_exist():
  texts = [ROOT / 'README.md', *ROOT.glob('configs/*.py')]
  texts += ROOT.glob('utilized_rank/**/*.py')
  named = {
    name
    for path in texts
    for name in re.findall(
      r'\bbenchmarks\.(?!md\b)(\w+)', path.read_text('utf-8')
    )
  }
  assert named and named <= set(catalogue.benchmarks())


def test_by_name_is_as_the_module(tmp_path, monkeypatch):
  """On the one that is quick: it draws a result again."""
  result = results_table.RESULTS / 'quality_kwt1.json'
  paths = [shutil.copy(result, tmp_path / f'{i}.json') for i in range(2)]
  monkeypatch.setattr(sys, 'argv', ['', 'quality_plots', str(paths[0])])
  benchmarks.__main__.main(sys.argv[1:])
  monkeypatch.setattr(sys, 'argv', ['', str(paths[1])])
  runpy.run_module('benchmarks.quality_plots', run_name='__main__')
  by_name, as_module = (p.with_suffix('.png').read_bytes() for p in paths)
  assert by_name == as_module != b''


def test_an_error_of_a_benchmark_is_its_own(monkeypatch):
  monkeypatch.setattr(sys, 'argv', [''])
  with pytest.raises(FileNotFoundError, match='missing.json'):
    benchmarks.__main__.main(['quality_plots', 'missing.json'])


@pytest.mark.parametrize(
  ('argv', 'says'),
  [
    (['gramm'], "no benchmark 'gramm'; near it: gram; "),
    (['zzz'], "no benchmark 'zzz'; "),
    (['--write'], "no benchmark '--write'; "),
    (['--results', '--wirte'], "no benchmark '--results --wirte'; "),
  ],
)
def test_an_unknown_name_is_one_error(argv, says):
  done = python('-m', 'benchmarks', *argv)
  assert done.returncode == 2 and not done.stdout
  assert done.stderr.startswith(says) and done.stderr.count('\n') == 1
  assert done.stderr.endswith('`python -m benchmarks` lists all\n')


def test_the_command_lists_and_shows_the_table():
  listed = python('-m', 'benchmarks')
  assert listed.returncode == 0 and catalogue.listing() in listed.stdout
  table = python('-m', 'benchmarks', '--results')
  assert table.stdout == results_table.text()


def test_the_commit_is_what_is_checked_out(tmp_path):
  def git(*words):
    who = ('-c', 'user.name=a', '-c', 'user.email=a@b')
    done = subprocess.run(
      ['git', *who, *words], cwd=tmp_path, capture_output=True, check=True
    )
    return done.stdout.decode().strip()

  assert record.commit(tmp_path) is None
  git('init')
  assert record.commit(tmp_path) is None  # no commit yet
  results = tmp_path / 'benchmarks' / 'results'
  results.mkdir(parents=True)
  code, result = tmp_path / 'code.py', results / 'a.json'
  code.write_text('a')
  result.write_text('a')
  git('add', '.')
  git('commit', '-m', 'a')
  head = git('rev-parse', '--short', 'HEAD')
  assert record.commit(tmp_path) == head
  result.write_text('b')
  (tmp_path / 'new.txt').write_text('b')
  assert record.commit(tmp_path) == head
  code.write_text('b')
  assert record.commit(tmp_path) == f'{head}+'
  assert record.commit(results) is None


def test_what_is_written_says_where_it_was_found(tmp_path, monkeypatch):
  monkeypatch.delenv('XLA_FLAGS', raising=False)  # the command would have them
  monkeypatch.setattr(record, '_COMMIT', '1a2b3c4+')
  path = tmp_path / 'found.json'
  record.write(path, 'gram', {'rows': [1]}, ['--quick', '--out', 'x'])
  found = json.loads(path.read_text(encoding='utf-8'))
  assert found['command'] == 'python -m benchmarks.gram --quick'
  assert results_table.commit_of(found) == '1a2b3c4+'
  assert found['rows'] == [1]
  assert {'date', 'machine', 'load', 'versions'} < set(found)
  assert results_table.benchmark_of(found) == 'gram'
  record.write(None, 'gram', {})


@pytest.mark.parametrize(
  'module',
  [
    'catalogue',
    'results_table',
    'shared.processes',
    'shared.record',
    'trained.quality',
    'trained.utilization',
  ],
)
def test_examples(module, monkeypatch):
  monkeypatch.delenv('XLA_FLAGS', raising=False)
  found = doctest.testmod(importlib.import_module(f'benchmarks.{module}'))
  assert found.attempted and not found.failed

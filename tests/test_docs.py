"""What the documents name is there, and the README's example runs."""

import importlib
import pathlib
import re

import numpy as np
import pytest
import scripts

from benchmarks import catalogue
import utilized_rank as ur

ROOT = pathlib.Path(__file__).parents[1]
DOCUMENTS = [
  ROOT / 'README.md',
  ROOT / 'CHANGELOG.md',
  *sorted((ROOT / 'docs').glob('*.md')),
]
# Fenced blocks of any kind, then spans of code: what they hold is no Markdown.
CODE = re.compile(r'^```.*?^```$|`[^`]*`', re.MULTILINE | re.DOTALL)
LINK = re.compile(r'\[[^\]]*\]\(([^)\s]+)\)')


def read(path: pathlib.Path) -> str:
  return path.read_text(encoding='utf-8')


def links(text: str) -> list[str]:
  """Targets of links and images. Code in a link's text hides no target."""
  return LINK.findall(CODE.sub('', text))


def anchors(text: str) -> list[str]:
  """Anchors of the headings, as GitHub makes them."""
  prose = re.sub(r'^```.*?^```$', '', text, flags=re.MULTILINE | re.DOTALL)
  headings = re.findall(r'^#+ (.+)$', prose, re.MULTILINE)
  kept = [re.sub(r'[^\w\- ]', '', heading.lower()) for heading in headings]
  return [heading.strip().replace(' ', '-') for heading in kept]


def first_block(text: str) -> str:
  found = re.search(r'^```python\n(.*?)^```$', text, re.MULTILINE | re.DOTALL)
  assert found is not None
  return found[1]


@pytest.mark.parametrize('path', DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
  missing = []
  for target in links(read(path)):
    if re.match(r'https?://', target):
      continue
    name, _, anchor = target.partition('#')
    there = (path.parent / name).resolve() if name else path
    if (
      ROOT not in (there, *there.parents)
      or not there.exists()
      or (anchor and anchor not in anchors(read(there)))
    ):
      missing.append(target)
  assert not missing


@pytest.mark.parametrize('path', DOCUMENTS, ids=lambda path: path.name)
def test_an_anchor_means_one_heading(path):
  linked = {target.partition('#')[2] for target in links(read(path))}
  found = anchors(read(path))
  assert not [anchor for anchor in linked if found.count(anchor) > 1]


def test_every_page_is_reached_from_the_readme():
  readme = links(read(ROOT / 'README.md'))
  reached = {target.partition('#')[0] for target in readme}
  pages = {f'docs/{page.name}' for page in (ROOT / 'docs').glob('*.md')}
  assert pages <= reached


def test_readme_is_short():
  assert len(read(ROOT / 'README.md').splitlines()) < 200


@pytest.mark.parametrize('path', DOCUMENTS, ids=lambda path: path.name)
def test_commands_configs_and_results_are_there(path):
  text = read(path)
  for module in re.findall(r'python\s+-m\s+benchmarks\.(\w+)', text):
    assert module in catalogue.benchmarks()
  for pattern in re.findall(r'benchmarks/results/[\w*]+\.\w+', text):
    assert list(ROOT.glob(pattern)), pattern
  for name in re.findall(r'\b(?:configs|launch|notebooks)/\w+\.\w+', text):
    assert (ROOT / name).is_file(), name


def test_every_result_is_linked():
  named = read(ROOT / 'README.md') + read(ROOT / 'docs' / 'benchmarks.md')
  results = (ROOT / 'benchmarks' / 'results').glob('*.json')
  assert not [r.name for r in results if f'/{r.name})' not in named]


def test_picture_is_small():
  assert (ROOT / 'docs' / 'picture.png').stat().st_size < 150_000


def test_public_names_of_the_first_example():
  names = re.findall(r'\bur\.(\w+)', first_block(read(ROOT / 'README.md')))
  assert names
  assert not [name for name in names if not hasattr(ur, name)]


def test_first_example_does_what_the_readme_says(capsys):
  names: dict = {}
  exec(first_block(read(ROOT / 'README.md')), names)
  assert 'mean layer utilization' in capsys.readouterr().out
  assert ur.count_params(names['params']) == 18_944
  assert ur.count_params(names['small']) == 4_700
  dense = np.asarray(names['fn'](names['params'], names['x']))
  # Rounding of float32 in two products, sums of up to 256 terms.
  bound = 256 * np.finfo(np.float32).eps * np.abs(dense).max()
  assert np.abs(names['outputs'] - dense).max() < bound


# Pages whose blocks are one program each, from the first to the last.
PROGRAMS = [
  page
  for page in sorted((ROOT / 'docs').glob('*.md'))
  if page.stem
  in (
    'compress',
    'index',
    'language_models',
    'many_devices',
    'measure',
    'serving',
    'training_loops',
  )
]


@pytest.mark.slow
@pytest.mark.parametrize('page', PROGRAMS, ids=lambda page: page.stem)
def test_examples_run(page, capsys):
  blocks = re.findall(r'^```python\n(.*?)^```$', read(page), re.M | re.S)
  assert blocks
  names: dict = {}
  for block in blocks:
    exec(block, names)
  del capsys


# Other frameworks are in tests/frameworks/test_newcomers.py.
@pytest.mark.slow
@pytest.mark.parametrize('framework', ['jax', 'linen', 'nnx'])
def test_a_script_leads_from_training_to_serving(
  framework, tmp_path, monkeypatch
):
  pytest.importorskip('flatbuffers')  # of jax.export's own
  monkeypatch.chdir(tmp_path)
  scripts.assert_leads_from_training_to_serving(framework, tmp_path)


def test_the_reference_has_every_name():
  listed = re.findall(r'^::: (\S+)$', read(ROOT / 'docs' / 'api.md'), re.M)
  want = [getattr(ur, name) for name in ur.__all__]
  found = []
  for dotted in listed:
    module, _, name = dotted.rpartition('.')
    found.append(getattr(importlib.import_module(module), name))
  assert len(listed) == len(set(listed)) == len(want)
  assert {id(v) for v in found} == {id(v) for v in want}

"""What was chosen is said: in a line, a table, a page and a file."""

import json
import re

import pytest
from reports import vit

from utilized_rank.report.choice import Choice
from utilized_rank.report.choice import Contender
from utilized_rank.report.choice import Kept
from utilized_rank.report.choice import Stage
from utilized_rank.report.report import Report

pytestmark = pytest.mark.slow


def choice(prefix='params/Transformer', blocks=3):
  kernels = []
  for i in range(blocks):
    at = f'{prefix}/encoderblock_{i}'
    kernels += [
      Kept(f'{at}/query/kernel', 'narrower heads', 4096, 1024, 4, 16, 2e-3),
      Kept(f'{at}/key/kernel', 'narrower heads', 4096, 1024, 4, 16),
      Kept(f'{at}/up/kernel', 'pair', 16384, 4096, 13, 64, 1.5e-3, 1e-7),
      Kept(f'{at}/down/kernel', 'dense', 16384, 16384, why='better spent'),
    ]
  kernels.append(
    Kept('params/head/kernel', 'dense', 999, 999, why='not selected')
  )
  return Choice(
    method='loss',
    damping=0.1,
    divergence=0.00412,
    unit='nats',
    predicted_unit='nats',
    kernels=tuple(kernels),
    contenders=(
      Contender('pairs', 0.0052),
      Contender('narrower heads', 0.0041, 0.0011, 0.0002),
      Contender('something else', 0.0051, -0.001, 0.0003, chosen=False),
    ),
    stages=(
      Stage('collect', 10.0, 18.0, 600 * 2**20),
      Stage('ranks', 32.0, 60.0, None, None, 0.0052),
    ),
  )


def test_one_line_says_what_is_kept():
  # (2 * 1024 + 4096 + 16384) / (2 * 4096 + 2 * 16384) of what was selected.
  assert choice().line == (
    'kept 55.0 % of 123 k: 3 pairs, 6 narrower heads, 3 dense; divergence '
    '0.0041 nats; 42 s'
  )


def test_a_table_fits_a_terminal_whatever_the_paths():
  text = str(choice())
  assert text.startswith('kept 55.0 %')
  said = ' '.join(text.split())
  for wanted in (
    'method loss, damping 0.1',
    'narrower heads 0.0041 (nearer by 0.0011 ± 0.00020, taken)',
    'something else 0.0051 (farther by 0.0010 ± 0.00030, not taken)',
    'dense, better spent: params',
    'dense, not selected: params/head/kernel',
    'collect 10.0 18.0 600 MiB – –',
    'ranks 32.0 60.0 – – 0.0052',
  ):
    assert wanted in said, wanted
  (row,) = re.findall(r'.*block_1/up.*', text)
  assert row.split()[1:] == [
    'pair',
    '13/64',
    '4.10',
    'k',
    '25%',
    '0.0015',
    '1.0e-07',
  ]
  long = '/'.join([40 * 'a', 40 * 'b', 40 * 'c'])
  for prefix in ('params', long, f'{long}{long}'):
    report = Report(vit(3), 0.99, centered=False)
    report.choice = choice(prefix, blocks=12)
    lines = str(report).splitlines()
    assert max(map(len, lines)) <= 80
    names = [s.split()[0] for s in lines if '/64 ' in s or '/16 ' in s]
    assert len(set(names)) == 36, 'they differ'


def test_a_file_holds_it(tmp_path):
  report = Report(vit(1), 0.99, centered=False)
  report.save(tmp_path / 'plain.json')
  assert Report.load(tmp_path / 'plain.json').choice is None
  record = json.loads((tmp_path / 'plain.json').read_text())
  del record['choice'], record['sha256']  # as 0.1 wrote it
  (tmp_path / 'old.json').write_text(json.dumps(record))
  assert Report.load(tmp_path / 'old.json').choice is None
  report.choice = choice()
  report.save(tmp_path / 'chosen.json')
  assert Report.load(tmp_path / 'chosen.json').choice == choice()
  plain = json.loads(json.dumps(report.json()))
  assert plain['choice']['kernels'][2]['rank'] == 13


def test_the_page_has_a_section():
  pytest.importorskip('matplotlib')
  report = Report(vit(1), 0.99, centered=False)
  assert 'What compress chose' not in report.html()
  report.choice = choice('params/<b>')
  page = report.html()
  section = page[page.index('What compress chose') :]
  section = section[: section.index('</section>')]
  assert 'kept 55.0 % of 123 k' in section and '13/64' in section
  assert '<b>' not in section


def test_all_that_is_dense_is_a_choice_too():
  one = Choice(
    method='weight', damping=0.1, kernels=(Kept('w', 'dense', 8, 8, why='x'),)
  )
  assert str(one).splitlines() == [
    'kept 100.0 % of 8: 1 dense; 0.0 s',
    'method weight',
    'dense, x: w',
  ]

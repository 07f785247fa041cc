"""Text tables line up, fit, and say what they do not know."""

import re

import numpy as np
import pytest
from reports import RUNS
from reports import layer
from reports import vit

from utilized_rank.report import tables

pytestmark = pytest.mark.slow


@pytest.mark.quick
def test_layer_table_lines_up_and_fits():
  layers = vit(4)
  lines = tables.layer_table(layers).splitlines()
  assert lines[0] == 'layers: params/Transformer/…/kernel'
  head, rule, *rows = lines[1:-2]
  assert len(rows) == len(layers)
  assert set(rule) == {'─'}
  assert max(map(len, lines)) <= 80
  # Columns end where their titles do.
  for title, key in zip(
    (' d_in', ' d_out', ' k_S', ' k_T', ' r '),
    ('d_in', 'd_out', 'k_in', 'k_out', 'rank'),
    strict=True,
  ):
    end = head.index(title) + len(title.rstrip())
    for row, each in zip(rows, layers, strict=True):
      assert row[:end].split()[-1] == str(getattr(each, key))
      assert row[end : end + 1] in (' ', '')
  end = head.index('used') + 4
  assert all(row[end - 1] == '%' for row in rows)
  assert len({row.split()[0] for row in rows}) == len(layers)
  mean = np.mean([each.utilization for each in layers])
  assert lines[-1].startswith(f'mean layer utilization {100 * mean:.1f}%')
  assert '(12 layers, energy 0.99)' in lines[-1]


def test_layer_table_shortens_long_names_and_keeps_them_apart():
  layers = [
    layer(f'params/{"a" * 40}/{"b" * 70}_{i}/{end}/kernel')
    for i in range(3)
    for end in ('query', 'key')
  ]
  rows = tables.layer_table(layers).splitlines()[3:-2]
  assert max(map(len, rows)) <= 80
  assert len({row.split()[0] for row in rows}) == len(layers)
  assert all('…' in row for row in rows)


def test_layer_table_of_one_layer_and_of_stacks():
  text = tables.layer_table([layer('params/Dense_0/kernel')])
  assert 'params/Dense_0/kernel' in text
  assert '(1 layer, energy 0.99)' in text
  text = tables.layer_table([layer('a/b/w', index=(1, i)) for i in range(3)])
  assert all(f'a/b/w[1,{i}] ' in text for i in range(3))


def test_layer_table_of_200_layers():
  layers = [layer(f'params/net_{i}/w') for i in range(200)]
  rows = tables.layer_table(layers).splitlines()[3:-2]
  assert [row.split()[0] for row in rows] == [f'net_{i}' for i in range(200)]


@pytest.mark.parametrize(
  ('share', 'bar'),
  [(0, ''), (1e-6, '▏'), (0.5, '█████'), (0.3625, '███▋'), (1, '█' * 10)],
)
def test_bar(share, bar):
  assert tables._bar(share) == bar


def test_run_table():
  lines = tables.run_table(RUNS).splitlines()
  assert len(lines) == 2 + len(RUNS)
  dense, half, quarter = lines[2:]
  assert re.sub(' +', ' ', dense) == (
    'dense 98.61% – – 205,322 100% 6.81 M 100% 1.92 ms 100%'
  )
  assert half.startswith(
    '50% of block kernels, output    98.33%  96.11%     −0.28  108,100   53%'
  )
  # What is not known is a dash, not a zero and not a crash.
  assert re.sub(' +', ' ', quarter).endswith(
    'kernels 98.06% 87.22% −0.55 59,300 29% – – – –'
  )


def test_run_table_leaves_out_what_was_not_measured():
  runs = [{**run, 'flops': None, 'latency_ms': None} for run in RUNS]
  head, _, dense, *_ = tables.run_table(runs).splitlines()
  assert ' '.join(head.split()) == 'model accuracy before vs dense params'
  assert dense.split() == ['dense', '98.61%', '–', '–', '205,322', '100%']


def test_no_change_has_a_sign_but_no_minus():
  runs = [RUNS[0], {**RUNS[1], 'test_accuracy': 0.98609999}]
  assert ' +0.00 ' in tables.run_table(runs).splitlines()[-1]


def test_counted_accuracies_have_an_interval():
  runs = [{**run, 'test_correct': 357, 'test_count': 360} for run in RUNS]
  head, _, dense, *_ = tables.run_table(runs).splitlines()
  assert head.split()[:4] == ['model', 'accuracy', '95%', 'interval']
  # R: prop.test(357, 360, correct = FALSE)$conf.int
  assert dense.split()[2] == '97.6–99.7%'
  # Never beyond what a share can be, where the normal's own interval is.
  for correct in (0, 5):
    low, high = tables.wilson(correct, 5)
    assert 0 <= low < high <= 1


def test_short_count():
  values = (0, 12, 999, 999_499, 999_600, 12_345_678, 86.4e9, 1.5e12)
  texts = '0', '12', '999', '999 k', '1.00 M', '12.3 M', '86.4 G', '1.50 T'
  assert tuple(map(tables.short_count, values)) == texts


def test_bad_input_is_named():
  with pytest.raises(ValueError, match='no layers'):
    tables.layer_table([])
  with pytest.raises(ValueError, match='dense model first'):
    tables.run_table([])
  bad = {k: v for k, v in RUNS[1].items() if k != 'flops'}
  with pytest.raises(ValueError, match=r"runs\[1\] lacks \['flops'\]"):
    tables.run_table([RUNS[0], bad])

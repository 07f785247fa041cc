"""Comparisons: means over repetitions, tables, figures, pages, refusals."""

import dataclasses
import json
import re

import numpy as np
import pytest
from reports import layer
from reports import vit

import utilized_rank as ur
from utilized_rank.report.report import Report

pytestmark = pytest.mark.slow

ENERGIES = (0.9, 0.95, 0.99)


def decaying(rate, blocks=3, centered=False):
  """A report whose spectra all fall by one rate."""
  layers = [
    dataclasses.replace(
      each,
      spectrum_in=rate ** np.arange(each.d_in),
      spectrum_out=rate ** np.arange(each.d_out),
    )
    for each in vit(blocks)
  ]
  return Report(layers, 0.99, centered)


def rank(rate, energy, d):
  """The rank of a geometric spectrum by counting, in float64."""
  values = np.array([rate**i for i in range(d)], np.float64)
  return next(
    k for k in range(1, d + 1) if values[:k].sum() >= energy * values.sum()
  )


@pytest.fixture(scope='module')
def comparison():
  reports = [decaying(r) for r in (0.5, 0.6, 0.7, 0.9)]
  return ur.compare(reports, ['low', 'low', 'low', 'high'])


@pytest.mark.parametrize('energy', ENERGIES)
def test_mean_and_spread_over_repetitions(comparison, energy):
  expected = [rank(r, energy, 64) / 64 for r in (0.5, 0.6, 0.7)]
  found = comparison.mean_layer_utilization('low', energy)
  # Ranks are counts: only the rounding of the mean remains.
  np.testing.assert_allclose(found.mean, np.mean(expected), rtol=1e-12)
  np.testing.assert_allclose(found.std, np.std(expected, ddof=1), rtol=1e-12)
  assert (found.low, found.high) == (min(expected), max(expected))
  single = comparison.mean_layer_utilization('high', energy)
  assert single.runs == 1
  assert np.isnan(single.std)


def test_depth_and_kind_average_to_the_mean(comparison):
  """Blocks hold the same number of kernels, and kinds of blocks."""
  for name in comparison:
    mean = comparison.mean_layer_utilization(name, 0.95).mean
    for parts in (comparison.by_depth, comparison.by_kind):
      values = [spread.mean for _, spread in parts(name, 0.95)]
      np.testing.assert_allclose(np.mean(values), mean, rtol=1e-12)
  assert [label for label, _ in comparison.by_depth('low', 0.9)] == list('012')
  kinds = [kind for kind, _ in comparison.by_kind('low', 0.9)]
  assert kinds == ['query', 'key', 'Dense_0']


def test_text(comparison):
  lines = str(comparison).splitlines()
  assert lines[0] == (
    'mean layer utilization, spectra uncentred  (mean ± standard deviation)'
  )
  assert lines[1].split() == ['runs', '0.9', '0.95', '0.99']
  low = comparison.mean_layer_utilization('low', 0.9)
  assert lines[3].split()[:4] == [
    'low', '3', f'{100 * low.mean:.1f}%', f'±{100 * low.std:.1f}'
  ]  # fmt: skip
  assert lines[4].split()[:2] == ['high', '1']
  assert '±' not in lines[4]
  assert 'by depth, energy 0.99' in lines
  assert 'by kind of kernel, energy 0.99' in lines


def test_models_of_other_depth_have_no_common_rows():
  text = str(ur.compare([decaying(0.5, 2), decaying(0.5, 3)]))
  assert 'report 1' in text
  assert 'by depth' not in text
  assert 'by kind of kernel' in text


def test_json(comparison):
  record = json.loads(json.dumps(comparison.json(), allow_nan=False))
  low = record['names']['low']
  assert low['runs'] == 3
  found = low['energies']['0.9']
  spread = comparison.mean_layer_utilization('low', 0.9)
  assert found['mean_layer_utilization']['mean'] == spread.mean
  assert len(found['by_depth']) == 3
  high = record['names']['high']['energies']['0.9']
  assert high['mean_layer_utilization']['std'] is None


def test_figure(comparison):
  figure = comparison.plot()
  panels = [axes for axes in figure.axes if axes.get_visible()]
  assert [axes.get_title() for axes in panels] == [
    f'energy {energy:g}' for energy in ENERGIES
  ]
  for axes, energy in zip(panels, ENERGIES, strict=True):
    low, high = (line.get_ydata() for line in axes.lines)
    wanted = [s.mean for _, s in comparison.by_depth('low', energy)]
    np.testing.assert_array_equal(low, wanted)
    assert (high >= low).all()
    assert axes.get_ylim()[1] > high.max()
    # A band where there are repetitions.
    assert len(axes.collections) == 1


def test_figure_of_different_models():
  reports = [decaying(0.5, 2), Report([layer('params/a/kernel')], 0.99, False)]
  figure = ur.compare(reports, ['_vit', 'one']).plot()
  assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == [
    'first',
    'last',
  ]
  figure.canvas.draw()


def test_page():
  pair = ur.compare([decaying(0.5), decaying(0.6)], ['a <b>', 'b'])
  text = pair.html('Two & more')
  assert text.startswith('<!doctype html>')
  assert 'a &lt;b&gt;' in text
  assert '<h1>Two &amp; more</h1>' in text
  assert 'a <b>' not in text
  assert not re.search(r'(src|href)="(?!#)', text)
  for row in pair.table()[1]:
    assert all(cell in text for cell in row[1:])


def test_centred_reports_say_so():
  text = str(ur.compare([decaying(0.5, centered=True)]))
  assert text.startswith('mean layer utilization, spectra about the mean')


@pytest.mark.parametrize(
  ('reports', 'names', 'energies', 'message'),
  [
    ([], None, ENERGIES, 'no reports'),
    ([decaying(0.5)], None, (), 'no energies'),
    ([decaying(0.5)], None, (1.5,), r'in \(0, 1\], got 1.5'),
    ([decaying(0.5)], ['a', 'b'], ENERGIES, '2 names for 1 reports'),
    (
      [decaying(0.5), decaying(0.5, centered=True)],
      ['a', 'b'],
      ENERGIES,
      'a uncentred, b centred',
    ),
    (
      [decaying(0.5, 2), decaying(0.5, 3)],
      ['a', 'a'],
      ENERGIES,
      "named 'a' are of different layers.*encoderblock_2",
    ),
    (
      [decaying(0.5), Report(decaying(0.5).layers[::-1], 0.99, False)],
      ['a', 'a'],
      ENERGIES,
      'the order of layers',
    ),
  ],
)
def test_refusals(reports, names, energies, message):
  with pytest.raises(ValueError, match=message):
    ur.compare(reports, names, energies=energies)

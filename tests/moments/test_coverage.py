"""Which share of the parameters is measured, wherever it must be said."""

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import utilized_rank as ur
from utilized_rank.storage import encoding

RNG = np.random.default_rng(0)


def normal(*shape):
  return RNG.normal(size=shape).astype(np.float32)


X = normal(12, 4)
# A kernel of 24 numbers and its bias of 6; two tables that are looked up, 40
# and 10 numbers; a scale.
PARAMS = {
  'w': normal(4, 6),
  'b': normal(6),
  'table': normal(20, 2),
  'small': normal(5, 2),
  'scale': normal(6),
}
LINE = (
  'kernels hold 27.9% of the 86 parameters; not measured: table, small '
  '(a lookup (gather))'
)


def fn(p, x):
  at = jnp.argmax(x, 1)
  looked = p['table'][at].sum(1) * p['small'][at].sum(1)
  return (x @ p['w'] + p['b']) * p['scale'] * looked[:, None]


def collected(**options):
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    return ur.collect(fn, PARAMS, [X, X], progress=False, **options)


def test_every_number_counts_and_matrices_are_named():
  covered = ur.find_sites(fn, PARAMS, X).coverage
  assert (covered.kernels, covered.total) == (24, 24 + 6 + 40 + 10 + 6)
  assert [leaf.path for leaf in covered.left_out] == ['table', 'small']
  assert str(covered) == LINE
  assert str(ur.find_sites(fn, PARAMS, X)).splitlines()[-1] == LINE


def test_collect_says_so_and_warns_where_most_is_left_out(capsys):
  with pytest.warns(UserWarning, match='most is not measured.*table, small'):
    ur.collect(fn, PARAMS, [X])
  said = capsys.readouterr().err
  assert ' '.join(s.strip() for s in said.splitlines()[:2]) == LINE
  assert max(map(len, said.splitlines())) <= 80
  with pytest.warns(UserWarning, match='27.9%'):
    ur.collect(fn, PARAMS, [X], progress=False)
  assert capsys.readouterr() == ('', '')


def dense(p, x):
  return (x @ p['w'] + p['b']) * p['scale']


@pytest.mark.parametrize(
  'plain, outputs, options',
  [
    (dense, 6, {}),  # more than half is measured
    (dense, 1, {}),  # all that is left out are vectors
    (fn, 6, {'select': [('w', True)]}),  # who selects asked for it
  ],
)
def test_no_warning(plain, outputs, options):
  params = {'w': normal(4, outputs), 'b': normal(outputs), 'scale': normal(6)}
  if plain is fn:
    params |= {k: PARAMS[k] for k in ('table', 'small')}
  moments = ur.collect(plain, params, [X], progress=False, **options)
  assert moments.coverage.kernels == 4 * outputs


def test_selection_is_the_reason():
  chosen = ur.find_sites(fn, PARAMS, X, select=[('w', True)]).coverage
  assert {leaf.why for leaf in chosen.left_out} == {'not selected'}
  two = lambda p, x: (x @ p['w']) @ p['v']
  params = {'w': normal(4, 5), 'v': normal(5, 3)}
  moments = ur.capture(two)(params, X)[1]
  assert str(moments.coverage) == 'kernels hold 100.0% of the 35 parameters'
  assert str(moments.only(['v']).coverage) == (
    'kernels hold 42.9% of the 35 parameters; not measured: w (not selected)'
  )


def test_biases_of_several_axes_are_no_holes():
  """By what they do, not by what is said of them."""
  heads = lambda p, x: jnp.einsum('nd,dhe->nhe', x, p['w']) + p['b']
  params = {'w': normal(4, 2, 3), 'b': normal(2, 3)}
  for select in (None, [('w', True)]):
    sites = ur.find_sites(heads, params, X, select=select)
    assert sites.biases == {'b'} and not sites.coverage.left_out
  shared = lambda p, x: heads(p, x) * jnp.sum(p['b'])
  sites = ur.find_sites(shared, params, X)
  assert not sites.biases
  assert [leaf.path for leaf in sites.coverage.left_out] == ['b']


def test_many_leaves_are_counted_and_the_largest_named():
  params = {f't{i}': normal(3 + i, 2) for i in range(9)} | {'w': normal(4, 4)}
  lookups = lambda p, x: x @ p['w'] + sum(p[f't{i}'][0, 0] for i in range(9))
  line = str(ur.find_sites(lookups, params, X).coverage)
  assert 't8, t7, t6, t5, t4' in line and line.endswith('and 4 more')
  assert 't3' not in line


@pytest.mark.parametrize(
  'options',
  [
    {},
    {'accumulate': 'float64'},
    {'checkpoint_every': 1},
    {'mask': lambda batch: np.ones(len(batch), bool)},
  ],
)
def test_every_way_to_collect_has_it(options, tmp_path):
  if 'checkpoint_every' in options:
    options['checkpoint_dir'] = tmp_path / 'sums'
  assert str(collected(**options).coverage) == LINE


def test_several_passes_have_it():
  two = lambda p, x: jnp.tanh(x @ p['w']) @ p['v']
  params = {'w': normal(128, 96), 'v': normal(96, 128)}
  x = normal(8, 128)
  limit = int(ur.plan(two, params, x).peak_bytes * 0.9)
  moments = ur.collect(two, params, [x], memory_limit=limit, progress=False)
  assert {e.number for e in moments.table} == {0, 1}
  assert str(moments.coverage) == 'kernels hold 100.0% of the 24,576 parameters'


def test_jit_merge_and_files_keep_it(tmp_path):
  moments = collected()
  inside = jax.jit(ur.capture(fn))(PARAMS, X)[1]
  assert inside.coverage == moments.coverage
  ur.save(tmp_path / 'moments', moments)
  loaded = ur.load(tmp_path / 'moments')
  assert loaded.coverage == moments.coverage
  merged = ur.merge_moments(loaded, moments)
  assert merged.coverage == moments.coverage
  assert int(merged['w'].count) == 48


def test_moments_without_it_merge_with_those_that_have_it():
  moments = collected()
  without = ur.Moments(moments.table, moments.sums)
  for pair in (without, moments), (moments, without):
    merged = ur.merge_moments(*pair)
    assert merged.coverage == moments.coverage
    assert int(merged['w'].count) == 48
  double = jax.jit(lambda m: jax.tree.map(lambda a: a + a, m))
  assert int(double(without)['w'].count) == int(double(moments)['w'].count)


def test_files_of_before_load(tmp_path):
  moments = collected()
  arrays, structure = encoding.encode(moments, '')
  assert structure.pop('coverage')
  assert encoding.decode(arrays, structure).coverage is None
  report = ur.measure(PARAMS, moments, progress=False)
  report.save(tmp_path / 'report.json')
  record = json.loads((tmp_path / 'report.json').read_text())
  del record['coverage'], record['sha256']
  (tmp_path / 'report.json').write_text(json.dumps(record))
  old = type(report).load(tmp_path / 'report.json')
  assert old.coverage is None and old.json()['coverage'] is None
  assert 'kernels hold' not in str(old)


def test_the_report_holds_it(tmp_path):
  pytest.importorskip('matplotlib')
  report = ur.measure(PARAMS, collected(), progress=False)
  # Folded, as a terminal is 80 columns wide.
  assert ' '.join(s.strip() for s in str(report).splitlines()[-2:]) == LINE
  kept = json.loads(json.dumps(report.json()))['coverage']
  assert (kept['kernels'], kept['total']) == (24, 86)
  assert kept['left_out'][0]['path'] == 'table'
  assert 'not measured: table, small' in report.html()
  report.save(tmp_path / 'report.json')
  again = type(report).load(tmp_path / 'report.json')
  assert again.coverage == report.coverage


def test_compress_has_it_too():
  plain = lambda p, x: x @ p['w'] + p['table'][0, 0]
  params = {'w': normal(8, 8), 'table': normal(3, 3)}
  _, report = ur.compress(
    plain, params, [normal(64, 8)], params_fraction=0.75, progress=False
  )
  assert str(report.coverage).startswith('kernels hold 87.7% of the 73')

"""Kernels whose outputs are measured in place of their wide inputs."""

import functools

import forms
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references

import utilized_rank as ur
from utilized_rank.factorization.kernels import kernels

RNG = np.random.default_rng(0)
NAMES = ['matmul', 'conv_same', 'conv_nchw', 'conv_grouped']
ALL = [('.*', True)]


@pytest.mark.parametrize('name', NAMES)
def test_outputs_have_the_moment_that_inputs_imply(name):
  form = forms.FORMS[name]
  params, x = form.params(0), form.inputs(0)
  run = lambda **kw: jax.jit(ur.capture(form.fn, **kw))(params, x)[1]
  inputs, outputs = run(), run(from_outputs=ALL)
  for path, rows in form.rows(params, x).items():
    layout = inputs[path].layout
    w = layout.to_matrices(np.asarray(params[path], np.float64))
    y = rows @ w
    want = np.einsum('...nd,...ne->...de', y, y) / rows.shape[-2]
    got = outputs[path]
    np.testing.assert_allclose(
      got.output_second, want, rtol=1e-5, atol=1e-5 * np.abs(want).max()
    )
    np.testing.assert_allclose(got.mean, inputs[path].mean, rtol=1e-5)
    np.testing.assert_array_equal(got.count, inputs[path].count)
    assert inputs[path].output_second is None


def stacked(params, x):
  """A scan of layers with a wide hidden axis, and a head."""

  def layer(x, w):
    return x + jnp.tanh(x @ w['up']) @ w['down'], None

  return jax.lax.scan(layer, x, params['layers'])[0] @ params['head']


@pytest.fixture(scope='module')
def job():
  draw = lambda *s: (RNG.normal(size=s) / np.sqrt(s[-2])).astype(np.float32)
  layers = {'up': draw(3, 6, 40), 'down': draw(3, 40, 6)}
  params = {'layers': layers, 'head': draw(6, 5)}
  return params, [references.correlated_rows(RNG, 90, 6, mean=0.5)] * 2


RULES = [('layers/down', True)]


def collected(job, **kwargs):
  params, batches = job
  batches = [b.astype(np.float32) for b in batches]
  return ur.collect(stacked, params, batches, progress=False, **kwargs)


def test_factors_are_those_of_the_input_side(job):
  params, _ = job
  wide, thin = collected(job), collected(job, from_outputs=RULES)
  assert wide['layers/down'].second.shape == (3, 40, 40)
  assert thin['layers/down'].output_second.shape == (3, 6, 6)
  np.testing.assert_array_equal(thin['head'].second, wide['head'].second)
  ranks = {'layers/down': 3, 'layers/up': 2, 'head': 2}
  for compensate in (False, True):
    one, other = (
      ur.factorize(params, m, ranks, compensate_mean=compensate)['layers'][
        'down'
      ]
      for m in (wide, thin)
    )
    # float32 sums of S and of T differ in rounding.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4)
    close(one.a @ one.b, other.a @ other.b)
    if compensate:
      close(one.c, other.c)


def test_full_rank_gives_the_kernel_back():
  """Fewer rows than features: what no data saw is kept too."""
  w = RNG.normal(size=(5, 7)).astype(np.float32)
  fn = lambda w, x: x @ w
  moments = ur.capture(fn, from_outputs=ALL)(w, np.eye(5, dtype='f4')[:2])[1]
  with pytest.warns(UserWarning, match='2 rows for 7 output features'):
    small = ur.factorize(w, moments, {'': 5}, compensate_mean=False)
  np.testing.assert_allclose(ur.merge(small), w, atol=1e-4)


def test_budgets_need_no_inputs(job):
  params, _ = job
  wide, thin = (
    ur.budget_ranks(
      params, moments, params_fraction=0.5, metric='output', progress=False
    )
    for moments in (collected(job), collected(job, from_outputs=RULES))
  )
  assert wide == thin


def test_what_needs_the_inputs_is_refused(job):
  params, _ = job
  moments = collected(job, from_outputs=RULES)
  refused = pytest.raises(ValueError, match='layers/down.*from_outputs=')
  with refused:
    moments['layers/down'].second  # noqa: B018
  with refused:
    moments['layers/down'].covariance  # noqa: B018
  with refused:
    ur.project(params, moments)
  with refused:
    ur.energy_ranks(params, moments)
  for method in ('scaled', 'utilized'):
    with refused:
      ur.factorize(params, moments, {'layers/down': 2}, method=method)
  ((_, (kernel, *_)),) = kernels(params, moments, only=['layers/down'])
  with refused:
    kernel.in_basis  # noqa: B018
  with pytest.raises(ValueError, match='of its inputs in the first .* outputs'):
    ur.merge_moments(collected(job), moments)


def test_a_report_says_what_it_knows_from_the_outputs(job, tmp_path):
  params, _ = job
  moments = collected(job, from_outputs=RULES)
  report = ur.measure(params, moments, energy=0.9, progress=False)
  known = ur.measure(params, collected(job), energy=0.9, progress=False)
  seen = [report[name] for name in report if report[name].k_in is None]
  assert {layer.path for layer in seen} == {'layers/down'}
  for layer in seen:
    full = known[layer.name]
    assert full.rank <= layer.rank == layer.k_out == full.k_out
    assert layer.rows_per_feature == layer.count / layer.d_out
    assert full.rows_per_feature == full.count / full.d_in
    # The same T, from sums of y y^T and of x x^T, both float32.
    np.testing.assert_allclose(
      layer.spectrum_out, full.spectrum_out, atol=1e-5 * full.spectrum_out[0]
    )
    assert layer.error_projected is None and layer.error_bound <= 0.1
  text = '3 of 7 measured from the output side, where r is k_T: layers/down'
  assert text in str(report)
  assert text in report.html()
  report.save(tmp_path / 'report.json')
  assert str(ur.Report.load(tmp_path / 'report.json')) == str(report)
  assert [one['side'] for one in report.json()['layers']].count('output') == 3


def test_the_side_is_told_and_kept(job, tmp_path):
  params, batches = job
  x = batches[0].astype(np.float32)
  sites = ur.find_sites(stacked, params, x, from_outputs=RULES)
  assert sites['layers/down'].side == 'output'
  assert 'from its outputs' in str(sites)
  costs = ur.plan(stacked, params, x, from_outputs=RULES)
  assert costs.kernels['layers/down'].sums_bytes == 3 * 4 * (6 * 6 + 40 + 1)
  moments = collected(job, from_outputs=RULES)
  ur.save(tmp_path / 'moments', moments)
  loaded = ur.load(tmp_path / 'moments')
  np.testing.assert_array_equal(
    loaded['layers/down'].output_second, moments['layers/down'].output_second
  )
  ranks = ur.uniform_ranks(params, loaded, params_fraction=0.5)
  assert 'layers/down' in ranks

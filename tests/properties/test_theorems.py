"""What the mathematics promises, against float64 numpy on the raw data."""

import jax.numpy as jnp
import numpy as np
import pytest
import references

import utilized_rank as ur
from utilized_rank.linalg import subspace

pytestmark = pytest.mark.slow

SHAPES = [(12, 20), (20, 12), (16, 16)]
# Factors are float32. Their rounding, 1e-7 of the outputs y, meets the residual
# e in the squared error: 2e-7 |y| / |e| of it, with |y| / |e| up to 500 here.
ROUNDING = 2e-4


def problem(shape, seed=0, n=400, mean=0.5, decay=0.8):
  rng = np.random.default_rng(seed)
  d, m = shape
  x = references.correlated_rows(rng, n, d, decay, mean * rng.normal(size=d))
  x = x.astype(np.float32)
  w = (rng.normal(size=shape) / np.sqrt(d)).astype(np.float32)
  params = {'kernel': jnp.asarray(w), 'bias': jnp.zeros(m)}
  fn = lambda p, x: x @ p['kernel'] + p['bias']
  _, moments = ur.capture(fn)(params, jnp.asarray(x))
  return fn, params, moments, x.astype(np.float64), w.astype(np.float64)


@pytest.mark.parametrize('shape', SHAPES)
def test_spectra_and_ranks_equal_the_reference(shape):
  _, params, moments, x, w = problem(shape)
  s = references.second_moment(x)
  t = w.T @ s @ w
  for energy in (0.8, 0.9, 0.99, 0.999):
    layer = ur.measure(params, moments, energy=energy)['kernel']
    # Sums are float32: each eigenvalue is off by up to 1e-7 of the trace.
    np.testing.assert_allclose(
      layer.spectrum_in,
      np.linalg.eigvalsh(s)[::-1],
      rtol=1e-4,
      atol=2e-7 * np.trace(s),
    )
    lead = min(shape)
    np.testing.assert_allclose(
      layer.spectrum_out[:lead],
      np.linalg.eigvalsh(t)[::-1][:lead],
      rtol=1e-4,
      atol=2e-7 * np.trace(t),
    )
    assert layer.k_in == references.rank_at(s, energy)
    assert layer.k_out == references.rank_at(t, energy)
    assert layer.rank == min(layer.k_in, layer.k_out)
    assert layer.utilization == layer.rank / min(shape)


@pytest.mark.parametrize('shape', SHAPES)
def test_centered_spectra_equal_the_covariance(shape):
  _, params, moments, x, w = problem(shape, mean=2.0)
  covariance = np.cov(x.T, bias=True)
  layer = ur.measure(params, moments, energy=0.9, centered=True)['kernel']
  np.testing.assert_allclose(
    layer.spectrum_in,
    np.linalg.eigvalsh(covariance)[::-1],
    # S - mu mu^T cancels: float32 sums of S leave 1e-7 of its trace.
    rtol=1e-4,
    atol=3e-7 * np.sum(x**2) / len(x),
  )
  assert layer.k_in == references.rank_at(covariance, 0.9)
  assert layer.k_out == references.rank_at(w.T @ covariance @ w, 0.9)


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('compensate', [False, True])
def test_discarded_eigenvalues_are_the_measured_error(shape, compensate):
  """`output` reaches its bound, at every rank."""
  fn, params, moments, x, w = problem(shape)
  s = np.cov(x.T, bias=True) if compensate else references.second_moment(x)
  spectrum = np.maximum(np.linalg.eigvalsh(w.T @ s @ w)[::-1], 0)
  y = x @ w
  for rank in range(1, min(shape) + 1):
    small = ur.factorize(
      params, moments, {'kernel': rank}, compensate_mean=compensate
    )
    a, b = (
      np.asarray(f, np.float64) for f in (small['kernel'].a, small['kernel'].b)
    )
    error = references.squared_error(
      x, w, a @ b, np.asarray(small['bias'], np.float64)
    )
    # Factors are float32: their rounding alone is 1e-14 of the output energy.
    np.testing.assert_allclose(
      error, spectrum[rank:].sum(), rtol=1e-3, atol=1e-12 * np.sum(y**2)
    )


@pytest.mark.parametrize('shape', SHAPES)
def test_no_factorization_beats_the_bound_at_its_rank(shape):
  """Neither the paper's form, nor the SVD, nor random factors."""
  _, params, moments, x, w = problem(shape)
  t = w.T @ references.second_moment(x) @ w
  spectrum = np.linalg.eigvalsh(t)[::-1]
  rng = np.random.default_rng(1)
  for rank in range(1, min(shape)):
    bound = max(spectrum[rank:].sum(), 0) * (1 - ROUNDING)
    for method in ('weight', 'utilized'):
      small = ur.factorize(
        params, moments, {'kernel': rank}, method=method, compensate_mean=False
      )
      error = references.squared_error(
        x, w, np.asarray(small['kernel'].dense(), np.float64)
      )
      assert error >= bound, (method, rank)
    random = rng.normal(size=(shape[1], rank))
    best = np.linalg.lstsq(x @ w @ random, x @ w, rcond=None)[0]
    assert references.squared_error(x, w, w @ random @ best) >= bound


@pytest.mark.parametrize('shape', SHAPES)
def test_projection_is_the_paper_s_and_its_errors_are_reported(shape):
  _, params, moments, x, w = problem(shape)
  s = references.second_moment(x)
  t = w.T @ s @ w
  energy = np.mean(np.sum((x @ w) ** 2, axis=1))
  for share in (0.8, 0.95, 0.99):
    layer = ur.measure(params, moments, energy=share)['kernel']
    projected = ur.project(params, moments, energy=share)['kernel']
    expected = (
      references.projector(s, layer.k_in)
      @ w
      @ references.projector(t, layer.k_out)
    )
    np.testing.assert_allclose(projected, expected, atol=1e-5)
    error = references.squared_error(x, w, np.asarray(projected, np.float64))
    np.testing.assert_allclose(layer.error_projected, error / energy, rtol=1e-3)
    assert layer.error_bound <= layer.error_projected * (1 + 1e-6)
    rank = layer.rank
    np.testing.assert_allclose(
      layer.error_bound,
      np.linalg.eigvalsh(t)[::-1][rank:].sum() / energy,
      rtol=1e-3,
      atol=1e-9,
    )


@pytest.mark.parametrize('shape', SHAPES)
def test_utilized_factors_are_the_projection_at_the_utilized_rank(shape):
  _, params, moments, _, _ = problem(shape)
  layer = ur.measure(params, moments, energy=0.97)['kernel']
  small = ur.factorize(
    params,
    moments,
    {'kernel': layer.rank},
    method='utilized',
    compensate_mean=False,
  )
  # At the highest shared energy whose utilized rank is the rank asked for.
  highest = max(
    subspace.energy(layer.spectrum_in)[layer.rank - 1],
    subspace.energy(layer.spectrum_out)[layer.rank - 1],
  )
  projected = ur.project(params, moments, energy=highest * (1 - 1e-9))['kernel']
  np.testing.assert_allclose(small['kernel'].dense(), projected, atol=1e-5)


def test_projection_approaches_the_function_as_the_energy_rises():
  fn, params, moments, x, _ = problem((24, 24), decay=0.7)
  y = fn(params, x)
  errors = []
  for energy in (0.9, 0.95, 0.99, 0.995, 0.999, 0.9999):
    projected = ur.project(params, moments, energy=energy)
    errors.append(float(jnp.linalg.norm(fn(projected, x) - y)))
  assert errors == sorted(errors, reverse=True)
  assert errors[-1] < 0.02 * float(jnp.linalg.norm(y))


@pytest.mark.parametrize('method', ['weight', 'utilized', 'output'])
@pytest.mark.parametrize('shape', SHAPES)
def test_mean_compensation_never_raises_the_error(shape, method):
  fn, params, moments, x, w = problem(shape, mean=1.0)
  for rank in range(1, min(shape) + 1, 3):
    errors = []
    for compensate in (False, True):
      small = ur.factorize(
        params,
        moments,
        {'kernel': rank},
        method=method,
        compensate_mean=compensate,
      )
      errors.append(
        references.squared_error(
          x,
          w,
          np.asarray(small['kernel'].dense(), np.float64),
          np.asarray(small['bias'], np.float64),
        )
      )
    assert errors[1] <= errors[0] * (1 + ROUNDING) + 1e-10, (rank, errors)


def test_shared_energy_projection_per_path_and_per_side():
  _, params, moments, x, w = problem((16, 16))
  s = references.second_moment(x)
  t = w.T @ s @ w
  pair = ur.project(params, moments, energy={'kernel': (0.9, 0.99)})
  expected = (
    references.projector(s, references.rank_at(s, 0.9))
    @ w
    @ references.projector(t, references.rank_at(t, 0.99))
  )
  np.testing.assert_allclose(pair['kernel'], expected, atol=1e-5)
  same = ur.project(params, moments, energy={})
  np.testing.assert_array_equal(same['kernel'], params['kernel'])


def test_data_aware_beats_blind_on_outputs_and_loses_on_weights():
  _, params, moments, x, w = problem((16, 16), decay=0.6)
  errors = {}
  for method in ('weight', 'output'):
    small = ur.factorize(
      params, moments, {'kernel': 4}, method=method, compensate_mean=False
    )
    dense = np.asarray(small['kernel'].dense(), np.float64)
    errors[method] = (
      references.squared_error(x, w, dense),
      np.linalg.norm(w - dense),
    )
  assert errors['output'][0] < 0.5 * errors['weight'][0]
  assert errors['weight'][1] < errors['output'][1]


def test_rank_deficient_data_fall_back_on_the_weights():
  """Where data say nothing, the factors follow W: finite, and exact at full
  rank even off the data."""
  rng = np.random.default_rng(0)
  x = np.zeros((50, 12), np.float32)
  x[:, :3] = rng.normal(size=(50, 3))  # dead features, and 3 < 12 directions
  for m in (8, 20):
    w = rng.normal(size=(12, m)).astype(np.float32)
    params = {'w': jnp.asarray(w)}
    fn = lambda p, x: x @ p['w']
    _, moments = ur.capture(fn)(params, jnp.asarray(x))
    assert ur.measure(params, moments)['w'].k_in == 3
    full = ur.factorize(params, moments, {'w': min(12, m)})
    np.testing.assert_allclose(full['w'].dense(), w, atol=2e-5)
    part = ur.factorize(params, moments, {'w': 5})
    assert np.all(np.isfinite(part['w'].dense()))
    np.testing.assert_allclose(
      x @ np.asarray(part['w'].dense()), x @ w, atol=1e-4
    )


def test_a_layer_without_data_is_unused_and_still_factorizes():
  params = {'w': jnp.arange(12.0).reshape(3, 4)}
  fn = lambda p, x: x @ p['w']
  _, moments = ur.capture(fn)(params, jnp.zeros((12, 3)))
  layer = ur.measure(params, moments)['w']
  assert (layer.k_in, layer.k_out, layer.utilization) == (0, 0, 0.0)
  for method in ('weight', 'utilized', 'output'):
    small = ur.factorize(params, moments, {'w': 2}, method=method)
    assert np.all(np.isfinite(small['w'].dense()))
  assert ur.energy_ranks(params, moments) == {'w': 1}


@pytest.mark.parametrize('method', ['weight', 'scaled', 'utilized', 'output'])
def test_factors_have_equal_scale(method):
  """a^T a = b b^T, diagonal: what fine-tunes at one learning rate."""
  _, params, moments, _, _ = problem((20, 12))
  small = ur.factorize(params, moments, {'kernel': 5}, method=method)
  a, b = np.asarray(small['kernel'].a), np.asarray(small['kernel'].b)
  np.testing.assert_allclose(a.T @ a, b @ b.T, atol=1e-5)
  np.testing.assert_allclose(a.T @ a, np.diag(np.diagonal(a.T @ a)), atol=1e-5)


def with_gradients(shape, seed=0, n=600):
  fn, params, _, x, w = problem(shape, seed, n)
  rng = np.random.default_rng(seed + 1)
  g = references.correlated_rows(rng, n, shape[1], 0.7).astype(np.float32)
  batch = {'x': jnp.asarray(x, jnp.float32), 'g': jnp.asarray(g)}
  # A loss that is linear in the outputs has the gradient g, given.
  moments = ur.collect(
    lambda p, b: fn(p, b['x']),
    params,
    [batch],
    progress=False,
    loss=lambda out, b: jnp.sum(out * b['g'], axis=1),
  )
  return fn, params, moments, x, w, g.astype(np.float64)


@pytest.mark.parametrize('shape', SHAPES)
def test_the_loss_method_is_the_weighted_optimum(shape):
  """Against a Cholesky solution, and against every other method."""
  _, params, moments, x, w, g = with_gradients(shape)
  m = shape[1]
  s, fisher = references.second_moment(x), references.second_moment(g)
  damped = fisher + 0.01 * np.trace(fisher) / m * np.eye(m)
  left, right = np.linalg.cholesky(s).T, np.linalg.cholesky(damped)
  core = left @ w @ right
  u, sigma, v = np.linalg.svd(core, full_matrices=False)

  def damage(approximation):
    d = w - approximation
    return np.trace(d.T @ s @ d @ damped)

  for rank in range(1, min(shape)):
    best = np.linalg.solve(left, (u[:, :rank] * sigma[:rank]) @ v[:rank])
    best = best @ np.linalg.inv(right)
    found = {
      method: damage(
        np.asarray(
          ur.factorize(
            params,
            moments,
            {'kernel': rank},
            method=method,
            compensate_mean=False,
          )['kernel'].dense(),
          np.float64,
        )
      )
      for method in ('loss', 'output', 'weight')
    }
    want = np.sum(sigma[rank:] ** 2)
    np.testing.assert_allclose(damage(best), want, rtol=1e-6)
    np.testing.assert_allclose(found['loss'], want, rtol=1e-3)
    assert found['loss'] <= found['output'] * (1 + ROUNDING)
    assert found['loss'] <= found['weight'] * (1 + ROUNDING)


@pytest.mark.parametrize('method', ['weight', 'scaled', 'output', 'loss'])
def test_predicted_loss_is_the_quadratic_form_of_any_method(method):
  _, params, moments, x, w, g = with_gradients((12, 20))
  s, fisher = references.second_moment(x), references.second_moment(g)
  for rank in (2, 7, 12):
    small = ur.factorize(
      params, moments, {'kernel': rank}, method=method, compensate_mean=False
    )
    d = w - np.asarray(small['kernel'].dense(), np.float64)
    want = 0.5 * np.trace(d.T @ s @ d @ fisher)  # one row per example
    found = ur.predict_loss(
      params, moments, {'kernel': rank}, method=method, compensate_mean=False
    )
    np.testing.assert_allclose(found, want, rtol=1e-3, atol=1e-9)


def test_scaled_is_the_svd_of_scaled_weights():
  _, params, moments, x, w = problem((20, 12))
  scale = np.sqrt(np.mean(x**2, axis=0))
  u, sigma, v = np.linalg.svd(scale[:, None] * w, full_matrices=False)
  want = (u[:, :4] * sigma[:4]) @ v[:4] / scale[:, None]
  small = ur.factorize(
    params, moments, {'kernel': 4}, method='scaled', compensate_mean=False
  )
  np.testing.assert_allclose(small['kernel'].dense(), want, atol=1e-4)


def test_gradients_are_asked_for_by_name():
  _, params, moments, _, _ = problem((12, 12))
  for call in (
    lambda: ur.factorize(params, moments, {'kernel': 3}, method='loss'),
    lambda: ur.predict_loss(params, moments, {'kernel': 3}),
    lambda: ur.budget_ranks(
      params, moments, params_fraction=0.5, method='loss'
    ),
  ):
    with pytest.raises(ValueError, match="'kernel' have no gradients.*loss="):
      call()

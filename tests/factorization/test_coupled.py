"""The method 'coupled' against float64 numpy."""

import jax.numpy as jnp
import numpy as np
import pytest
import references

import utilized_rank as ur
from utilized_rank.factorization.coupled import dependence
from utilized_rank.factorization.kernels import kernels

pytestmark = pytest.mark.slow

N = 800


def problem(shape, seed=0):
  """Rows whose gradients are large where their inputs are."""
  d, m = shape
  rng = np.random.default_rng(seed)
  size = rng.exponential(size=(N, 1))
  x = size * references.correlated_rows(rng, N, d, 0.8) + 0.3
  g = size * references.correlated_rows(rng, N, m, 0.7)
  g[:, 0] += x[:, 0]
  w = rng.normal(size=shape) / np.sqrt(d)
  return (v.astype(np.float32) for v in (w, x, g))


def collected(w, x, g):
  return ur.collect(
    lambda p, b: b['x'] @ p['w'],
    {'w': jnp.asarray(w)},
    [{'x': x, 'g': g}],
    loss=lambda y, b: jnp.sum(y * b['g'], axis=1),
    coupled=True,
    progress=False,
  )


def traces(x, g, mean):
  """E[|g|^2 (x - mu) (x - mu)^T] and E[|x|^2 g g^T] over E[|x|^2 |g|^2]."""
  x, g = (v.astype(np.float64) for v in (x, g))
  by_x, by_g = ((v**2).sum(1) for v in (x, g))
  away = x - mean * x.mean(0)
  second = (by_g[:, None] * away).T @ away / N
  return second, (by_x[:, None] * g).T @ g / N / (by_x * by_g).mean()


@pytest.mark.parametrize('mean', [True, False])
@pytest.mark.parametrize('shape', [(6, 9), (9, 6)])
def test_it_minimises_in_the_weighed_moments(shape, mean):
  w, x, g = problem(shape)
  moments = collected(w, x, g)
  options = dict(
    method='coupled', damping=0.0, compensate_mean=mean, progress=False
  )
  families = ur.decompose({'w': w}, moments, **options)
  second, gradient = traces(x, g, mean)
  left, right = (np.linalg.cholesky(v) for v in (second, gradient))
  u, sigma, v = np.linalg.svd(left.T @ w @ right)
  for rank in (1, 3, 5):
    small = ur.factorize({'w': w}, moments, {'w': rank}, **options)
    want = (u[:, :rank] * sigma[:rank]) @ v[:rank]
    want = np.linalg.solve(left.T, want) @ np.linalg.inv(right)
    # Factors are float32, of float32 sums of 800 rows.
    np.testing.assert_allclose(small['w'].dense(), want, atol=1e-4)
    np.testing.assert_allclose(
      families.damages('w', 'loss')[rank],
      0.5 * np.sum(sigma[rank:] ** 2),
      rtol=1e-4,
    )
    away = x - mean * x.mean(0, dtype=np.float64)
    error = np.square(away @ (w - want)).sum(1).mean()
    np.testing.assert_allclose(
      families.damages('w', 'output')[rank], error, rtol=1e-3
    )


def test_dependence_is_none_where_sizes_are_one():
  """Rows of one length weigh nothing; the others are an angle of matrices."""
  w, x, g = problem((6, 9))
  ((_, (kernel,)),) = kernels({'w': w}, collected(w, x, g), centered=True)
  second, gradient = traces(x, g, False)
  cosine = lambda a, b: np.sum(a * b) / np.linalg.norm(a) / np.linalg.norm(b)
  same = cosine(second, references.second_moment(x)) * cosine(
    gradient, references.second_moment(g)
  )
  np.testing.assert_allclose(dependence(kernel), 1 - same, rtol=1e-3)
  assert dependence(kernel) > 0.02
  x, g = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (x, g))
  ((_, (kernel,)),) = kernels({'w': w}, collected(w, x, g))
  assert dependence(kernel) < 1e-5  # rounding of float32 sums


def test_it_is_tried_where_moments_hold_it_and_the_report_says_how_far_off():
  w, x, g = problem((6, 9))
  moments = collected(w, x, g)
  params, batch = {'w': jnp.asarray(w)}, {'x': x, 'g': g}
  options = dict(params_fraction=0.7, progress=False)
  small, report = ur.compress(
    lambda p, b: b['x'] @ p['w'], params, [batch], moments=moments, **options
  )
  ((_, (kernel,)),) = kernels(params, moments)
  assert report['w'].dependence == pytest.approx(dependence(kernel))
  assert 'dependence of inputs and gradients: median' in str(report)
  ranks = ur.tune_ranks(
    lambda p, b: b['x'] @ p['w'],
    params,
    moments,
    [batch],
    divergence=ur.squared_error,
    **options,
  )
  assert 'coupled' in {trial.method for trial in ranks.trials}
  assert small['w'].rank >= 1


def test_kernels_of_one_input_cannot_share_a_left_factor():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(64, 6)).astype(np.float32)
  params = {k: rng.normal(size=(6, 4)).astype(np.float32) for k in 'qk'}
  moments = ur.collect(
    lambda p, x: jnp.concatenate([x @ p['q'], x @ p['k']], 1),
    params,
    [x],
    loss=ur.sampled_cross_entropy(),
    coupled=True,
    progress=False,
  )
  with pytest.raises(ValueError, match="left factor by the method 'coupled'"):
    ur.factorize(params, moments, {('q', 'k'): 2}, method='coupled')


def test_sums_are_asked_for_by_name():
  w, x, g = problem((6, 4))
  moments = ur.collect(
    lambda p, x: x @ p, w, [x], loss=ur.sampled_squared_error(), progress=False
  )
  with pytest.raises(ValueError, match='loss= and coupled=True'):
    ur.factorize(w, moments, {'': 2}, method='coupled')

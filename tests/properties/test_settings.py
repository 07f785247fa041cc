"""The whole path under settings that users make; `conftest` runs all tests."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import utilized_rank as ur

pytestmark = pytest.mark.slow

SETTINGS = {
  'rank_promotion': ('jax_numpy_rank_promotion', 'raise'),
  'dtype_promotion': ('jax_numpy_dtype_promotion', 'strict'),
  'transfer_guard': ('jax_transfer_guard', 'disallow'),
}
RANKS = {'w': 4, 'o': 2}


@pytest.fixture(params=SETTINGS)
def data(request):
  """Parameters and batches, made before the setting is in force."""
  rng = np.random.default_rng(0)
  draw = lambda *s: jnp.asarray(rng.normal(size=s) / 3, jnp.float32)
  params = {'w': draw(8, 8), 'o': draw(8, 4)}
  batches = [np.asarray(draw(64, 8)) for _ in range(2)]
  name, value = SETTINGS[request.param]
  before = getattr(jax.config, name)
  jax.config.update(name, value)
  yield params, batches
  jax.config.update(name, before)


def fn(p, x):
  return jnp.tanh(x @ p['w']) @ p['o']


LOSS = ur.sampled_cross_entropy()


@pytest.mark.parametrize('accumulate', ['float32', 'compensated', 'float64'])
def test_sites_moments_and_ranks(data, accumulate):
  params, batches = data
  assert list(ur.find_sites(fn, params, batches[0])) == ['w', 'o']
  moments = ur.collect(
    fn, params, batches, loss=LOSS, accumulate=accumulate, progress=False
  )
  assert ur.measure(params, moments)['w'].d_in == 8
  assert ur.uniform_ranks(params, moments, params_fraction=0.6)
  assert ur.budget_ranks(params, moments, params_fraction=0.6)
  assert ur.energy_ranks(params, moments, energy=0.9) is not None
  ur.project(params, moments, energy=0.9)


@pytest.mark.parametrize('gauge', [None, 'identity'])
def test_factors_their_gradients_and_files(data, gauge, tmp_path):
  params, batches = data
  moments = ur.collect(fn, params, batches, loss=LOSS, progress=False)
  x = jax.device_put(batches[0])
  for method in ('weight', 'output', 'loss', 'utilized'):
    small = ur.factorize(
      params, moments, RANKS, method=method, gauge=gauge, progress=False
    )
    jax.jit(ur.low_rank(fn))(small, x)
    jax.jit(jax.grad(lambda s, x: ur.low_rank(fn)(s, x).sum()))(small, x)
  ur.save(tmp_path / 'small', small)
  loaded = ur.load(tmp_path / 'small')
  assert jax.tree.structure(loaded) == jax.tree.structure(small)
  again = ur.refine(fn, params, small, batches, steps=3, progress=False)
  assert again['w'].rank == 4


def test_anchor(data):
  params, batches = data
  small = ur.anchor(fn, params, batches, RANKS, progress=False)
  assert small['w'].rank == 4


@pytest.mark.parametrize('loss', [None, LOSS])
def test_compress(data, loss):
  params, batches = data
  small, _ = ur.compress(
    fn, params, batches, params_fraction=0.6, loss=loss, progress=False
  )
  assert ur.count_params(small) <= 0.6 * ur.count_params(params)

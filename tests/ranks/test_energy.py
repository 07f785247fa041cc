"""Ranks by energy and by a uniform share."""

import jax.numpy as jnp
import numpy as np
import pytest

import utilized_rank as ur


@pytest.fixture(scope='module')
def measured():
  rng = np.random.default_rng(0)
  params = {
    'wide': jnp.asarray(rng.normal(size=(10, 40)), jnp.float32),
    'tall': jnp.asarray(rng.normal(size=(40, 10)), jnp.float32),
    'stack': jnp.asarray(rng.normal(size=(3, 10, 10)), jnp.float32),
  }

  def fn(p, x):
    x = jnp.tanh(jnp.tanh(x @ p['wide']) @ p['tall'])
    for i in range(3):
      x = jnp.tanh(x @ p['stack'][i])
    return x

  x = jnp.asarray(rng.normal(size=(200, 10)), jnp.float32)
  return params, ur.capture(fn)(params, x)[1]


@pytest.mark.parametrize('fraction', [0.2, 0.5, 0.9])
def test_uniform_ranks_stay_below_the_budget_and_come_close(measured, fraction):
  params, moments = measured
  ranks = ur.uniform_ranks(params, moments, params_fraction=fraction)
  small = ur.factorize(params, moments, ranks, compensate_mean=False)
  kept, total = ur.count_params(small), ur.count_params(params)
  assert kept <= fraction * total
  # Below by less than one rank of every kernel.
  one_rank = (10 + 40) * 2 + 3 * (10 + 10)
  assert kept > fraction * total - one_rank


def test_uniform_ranks_can_be_multiples(measured):
  params, moments = measured
  plain = ur.uniform_ranks(params, moments, params_fraction=0.5)
  even = ur.uniform_ranks(params, moments, params_fraction=0.5, multiple_of=2)
  assert even == {path: rank // 2 * 2 for path, rank in plain.items()}
  with pytest.raises(ValueError, match='multiple_of must be at least 1'):
    ur.uniform_ranks(params, moments, params_fraction=0.5, multiple_of=0)


def test_uniform_ranks_of_everything_is_dense(measured):
  assert ur.uniform_ranks(*measured, params_fraction=1.0) == {}


@pytest.mark.parametrize('fraction', [0.0, -1, 1.5, 0.001])
def test_uniform_ranks_refuses_impossible_fractions(measured, fraction):
  with pytest.raises(ValueError, match='params_fraction'):
    ur.uniform_ranks(*measured, params_fraction=fraction)


@pytest.mark.quick
def test_energy_ranks_are_the_measured_ones_where_they_save(measured):
  params, moments = measured
  for energy in (0.5, 0.9, 0.99):
    ranks = ur.energy_ranks(params, moments, energy=energy)
    report = ur.measure(params, moments, energy=energy)
    for path in moments:
      layers = [x for x in report.layers if x.path == path]
      rank = max(layer.rank for layer in layers)
      d, m = layers[0].d_in, layers[0].d_out
      if rank * (d + m) < d * m:
        assert ranks[path] == rank
      else:
        assert path not in ranks


@pytest.mark.parametrize('energy', [0.0, 1.01, -0.5, float('nan')])
def test_energies_outside_their_range_are_refused(measured, energy):
  for call in (ur.energy_ranks, ur.measure, ur.project):
    with pytest.raises(ValueError, match=r'energy is a share in \(0, 1\]'):
      call(*measured, energy=energy)


def test_ranks_that_no_kernel_can_have_are_refused(measured):
  params, moments = measured
  for ranks, message in [
    ({'wide': 11}, 'from 1 to 10'),
    ({'wide': 0}, 'from 1 to 10'),
    ({'wide': 2.5}, 'from 1 to 10'),
    ({'wyde': 2}, "'wyde'; did you mean ['wide']"),
  ]:
    with pytest.raises(ValueError) as error:
      ur.factorize(params, moments, ranks)
    assert message in str(error.value)

"""Ranks within a share of the time, by a table given and by one timed."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

import utilized_rank as ur
from utilized_rank.ranks.latency import Curve
from utilized_rank.ranks.latency import Product


@pytest.fixture(scope='module')
def problem():
  rng = np.random.default_rng(0)
  params = {
    'a': jnp.asarray(rng.normal(size=(6, 8)), jnp.float32),
    'b': jnp.asarray(rng.normal(size=(2, 8, 8)), jnp.float32),
  }

  def fn(p, x):
    x = jnp.tanh(x @ p['a'])
    for i in range(2):
      x = jnp.tanh(x @ p['b'][i])
    return x

  x = jnp.asarray(rng.normal(size=(64, 6)) * 0.6 ** np.arange(6), jnp.float32)
  moments = ur.collect(fn, params, [x], progress=False)
  return params, moments, ur.find_sites(fn, params, x)


TABLE = ur.LatencyTable(
  {'a': Product(1, 6, 8, 64), 'b': Product(2, 8, 8, 64)},
  {
    # Slower as a pair from rank 4 on; 3 was timed slower than 4 can be.
    (6, 8, 64): Curve(5e-6, (1, 2, 3, 4, 6), (2e-6, 2e-6, 6e-6, 5e-6, 7e-6)),
    (8, 8, 64): Curve(9e-6, (2, 4, 8), (3e-6, 5e-6, 8e-6)),
  },
  {'device': 'made up', 'dtype': 'float32', 'jax': '0'},
)


def test_times_never_fall_with_rank_and_are_interpolated():
  np.testing.assert_array_equal(
    TABLE.pairs('a', range(1, 7)), [2000, 2000, 5000, 5000, 6000, 7000]
  )
  # Two members; below the lowest rank that was timed, its time.
  np.testing.assert_array_equal(
    TABLE.pairs('b', range(1, 9)),
    [6000, 6000, 8000, 10000, 11500, 13000, 14500, 16000],
  )
  assert TABLE.dense('a') == 5000 and TABLE.dense('b') == 18000


@pytest.mark.parametrize('fraction', [0.35, 0.5, 0.7, 0.95])
def test_no_ranks_within_the_time_do_less_damage(problem, fraction):
  params, moments, _ = problem
  families = ur.decompose(params, moments, progress=False)
  offers = []
  for path, full in (('a', 6), ('b', 8)):
    damage = families.damages(path, 'relative')
    pairs = TABLE.pairs(path, range(1, full + 1))
    options = [(pairs[r - 1], damage[r], r) for r in range(1, full + 1)]
    offers.append([*options, (TABLE.dense(path), 0.0, 0)])
  budget = int(fraction * 23000)
  want = min(
    sum(e for _, e, _ in pick)
    for pick in itertools.product(*offers)
    if sum(c for c, _, _ in pick) <= budget
  )
  ranks = ur.budget_ranks(
    params, moments, latency_fraction=fraction, latency=TABLE
  )
  damage = sum(families.damages(p, 'relative')[r] for p, r in ranks.items())
  np.testing.assert_allclose(damage, want, rtol=1e-9)
  # As a pair it would be no faster: then it stays dense.
  assert ranks.get('a', 1) <= 2


def test_a_table_is_measured_saved_and_used(problem, tmp_path):
  params, moments, sites = problem
  table = ur.measure_latency(
    sites, multiple_of=2, points=3, repeats=1, progress=False
  )
  assert table.products == TABLE.products
  assert set(table.curves) == set(TABLE.curves)
  assert table.curves[6, 8, 64].ranks == (2, 4, 6)
  assert all(
    s > 0 for c in table.curves.values() for s in (c.dense, *c.seconds)
  )
  table.save(tmp_path / 'table.json')
  assert ur.LatencyTable.load(tmp_path / 'table.json') == table
  text = str(TABLE)
  assert 'made up' in text and '3 (equal FLOPs 3)' in text and 'none' in text
  # Whatever the times, the budget of all of it is met.
  ur.budget_ranks(params, moments, latency_fraction=1.0, latency=table)


def test_impossible_requests_are_named(problem, tmp_path):
  params, moments, sites = problem
  call = lambda **kwargs: ur.budget_ranks(params, moments, **kwargs)
  with pytest.raises(ValueError, match='go together'):
    call(latency_fraction=0.5)
  with pytest.raises(ValueError, match='go together'):
    call(params_fraction=0.5, latency=TABLE)
  with pytest.raises(ValueError, match='give one of them'):
    call(params_fraction=0.5, latency_fraction=0.5, latency=TABLE)
  for more in ({'gauge': 'identity'}, {'share': True}):
    with pytest.raises(ValueError, match='were timed, without a gauge'):
      call(latency_fraction=0.5, latency=TABLE, **more)
  less = ur.LatencyTable({'b': TABLE.products['b']}, TABLE.curves, {})
  with pytest.raises(ValueError, match="no latency was measured for 'a'"):
    call(latency_fraction=0.5, latency=less)
  for kwargs in ({'points': 0}, {'multiple_of': 0}, {'repeats': 0}):
    with pytest.raises(ValueError, match='each at least 1'):
      ur.measure_latency(sites, **kwargs)
  (tmp_path / 'x.json').write_text('{"curves": 3}')
  with pytest.raises(ValueError, match='holds no latency table'):
    ur.LatencyTable.load(tmp_path / 'x.json')

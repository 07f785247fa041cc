"""Ranks within a budget: the optimum, costs, alignment, limits."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

import utilized_rank as ur
from utilized_rank.factorization import kernels
from utilized_rank.factorization import methods

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def problem():
  rng = np.random.default_rng(0)
  params = {
    'a': jnp.asarray(rng.normal(size=(6, 8)), jnp.float32),
    'b': jnp.asarray(rng.normal(size=(8, 5)), jnp.float32),
    'c': jnp.asarray(rng.normal(size=(2, 5, 5)), jnp.float32),
  }

  def fn(p, x):
    x = jnp.tanh(jnp.tanh(x @ p['a']) @ p['b'])
    # Twice the rows for the stack: what counts for FLOPs.
    x = jnp.concatenate([x, x[:, ::-1]])
    for i in range(2):
      x = jnp.tanh(x @ p['c'][i])
    n = len(x) // 2
    return x[:n] + x[n:]

  x = jnp.asarray(rng.normal(size=(64, 6)) * 0.6 ** np.arange(6), jnp.float32)
  moments = ur.collect(
    fn, params, [x], progress=False, loss=ur.sampled_cross_entropy()
  )
  return params, moments


def exhaustive(params, moments, fraction, method, metric, flops):
  offers, total = [], 0
  for path, members in kernels.kernels(params, moments):
    layout = moments[path].layout
    d, m = layout.matrix_shape
    rows = int(np.sum(moments[path].count)) if flops else layout.num_groups
    damage = sum(methods.family(k, method).damages[metric] for k in members)
    options = [
      (rows * r * (d + m), damage[r]) for r in range(1, layout.full_rank + 1)
    ]
    offers.append([*options, (rows * d * m, 0.0)])
    total += rows * d * m
  return min(
    sum(e for _, e in pick)
    for pick in itertools.product(*offers)
    if sum(c for c, _ in pick) <= int(fraction * total)
  )


@pytest.mark.parametrize('flops', [False, True])
@pytest.mark.parametrize(
  'method, metric',
  [
    ('loss', 'loss'),
    ('output', 'relative'),
    ('weight', 'output'),
    ('output', 'loss'),
  ],
)
@pytest.mark.parametrize('fraction', [0.45, 0.6, 0.8])
def test_no_allocation_within_the_budget_does_less_damage(
  problem, fraction, method, metric, flops
):
  params, moments = problem
  name = 'flops_fraction' if flops else 'params_fraction'
  ranks = ur.budget_ranks(
    params,
    moments,
    method=method,
    metric=metric,
    compensate_mean=False,
    **{name: fraction},
  )
  damage = sum(
    methods.family(k, method).damages[metric][ranks[path]]
    for path, members in kernels.kernels(params, moments, only=ranks)
    for k in members
  )
  want = exhaustive(params, moments, fraction, method, metric, flops)
  np.testing.assert_allclose(damage, want, rtol=1e-9, atol=1e-12)
  if not flops:
    small = ur.factorize(
      params, moments, ranks, method=method, compensate_mean=False
    )
    assert ur.count_params(small) <= fraction * ur.count_params(params)


@pytest.mark.parametrize('flops', [False, True])
@pytest.mark.parametrize('fraction', [0.45, 0.6, 0.8])
def test_without_gradients_shares_and_energy_are_weighed_by_cost(
  problem, fraction, flops
):
  """The default metric, in full: no choice within the budget does better."""
  params, moments = problem
  plain = ur.Moments(moments.table, moments.sums)
  name = 'flops_fraction' if flops else 'params_fraction'
  ranks = ur.budget_ranks(
    params, plain, compensate_mean=False, **{name: fraction}
  )
  options, total = {}, 0
  for path, members in kernels.kernels(params, plain):
    layout = plain[path].layout
    d, m = layout.matrix_shape
    times = int(np.sum(plain[path].count)) if flops else layout.num_groups
    lost = []
    for kernel in members:
      t = np.linalg.eigvalsh(kernel.w.T @ kernel.second @ kernel.w)[::-1]
      lost.append([t[r:].sum() / t.sum() for r in range(layout.full_rank)])
    lost = np.mean(lost, axis=0)
    share = lambda r, d=d, m=m: r * (d + m) / (d * m)
    options[path] = {
      r: (
        times * r * (d + m),
        times * d * m * (lost[r] + 0.3 * (1 - share(r)) ** 2),
      )
      for r in range(1, layout.full_rank)
      if share(r) < 1
    } | {0: (times * d * m, 0.0)}
    total += times * d * m
  damage_of = lambda pick: sum(
    options[path][r][1] for path, r in zip(options, pick, strict=True)
  )
  least = min(
    damage_of(pick)
    for pick in itertools.product(*options.values())
    if sum(options[path][r][0] for path, r in zip(options, pick, strict=True))
    <= int(fraction * total)
  )
  # Energies are of float32 sums, eigenvalues of float64 ones: the choice is
  # one and the same unless two are as good.
  found = damage_of([ranks.get(path, 0) for path in options])
  np.testing.assert_allclose(found, least, rtol=1e-6)


def test_constants_of_compensated_means_are_paid_for(problem):
  """These products add no bias, so each constant is a leaf of its own."""
  params, moments = problem
  for fraction in (0.6, 0.75, 0.9):
    ranks = ur.budget_ranks(params, moments, params_fraction=fraction)
    small = ur.factorize(params, moments, ranks, method='loss')
    assert ur.count_params(small) <= fraction * ur.count_params(params)


def test_ranks_are_multiples_and_within_limits(problem):
  params, moments = problem
  ranks = ur.budget_ranks(params, moments, params_fraction=0.9, multiple_of=2)
  assert ranks and all(r % 2 == 0 for r in ranks.values())
  ranks = ur.budget_ranks(
    params,
    moments,
    params_fraction=0.9,
    limits=[('a', (3, 3)), ('a|b', (1, 2))],
  )
  assert ranks['a'] == 3
  assert ranks['b'] <= 2


def test_everything_stays_dense_within_the_whole_budget(problem):
  assert ur.budget_ranks(*problem, params_fraction=1.0) == {}


def test_impossible_requests_are_named(problem):
  params, moments = problem
  for kwargs, message in [
    ({}, 'give one of them'),
    ({'params_fraction': 0.5, 'flops_fraction': 0.5}, 'give one of them'),
    ({'params_fraction': 1.5}, 'give one of them'),
    (
      {'params_fraction': 0.01},
      # Pairs of rank 1: 13 + 6 + 2 * 10, and constants of 8 + 5 + 2 * 5.
      r'budget is 1, but the cheapest choices cost 70, of 3 kernels '
      r'\(c at rank 1: 30; a at rank 1: 22; b at rank 1: 18\): give a',
    ),
    (
      # At rank 4 a pair costs 57, and b itself 40.
      {'params_fraction': 0.2, 'limits': [('b', (4, 5))]},
      r'budget is 27, .* cost 92, .* \(b dense: 40; c at rank 1: 30; a at',
    ),
    (
      {'params_fraction': 0.01, 'share': True},
      r'budget is 1, .*, of 3 kernels \(c at rank 1: 30; ',
    ),
    ({'params_fraction': 0.5, 'multiple_of': 0}, 'multiple_of=0'),
    ({'params_fraction': 0.5, 'metric': 'nats'}, "unknown metric 'nats'"),
    ({'params_fraction': 0.5, 'method': 'utilized'}, 'unknown method'),
    ({'params_fraction': 0.5, 'limits': [('z', (1, 2))]}, "'z' matches no"),
    ({'params_fraction': 0.5, 'limits': [('a', (3, 2))]}, '1 <= low'),
    (
      {'params_fraction': 0.5, 'multiple_of': 4, 'limits': [('a', (1, 3))]},
      'no rank that is a multiple of 4',
    ),
  ]:
    with pytest.raises(ValueError, match=message):
      ur.budget_ranks(params, moments, **kwargs)


def test_compress_keeps_to_its_budget_and_beats_uniform_svd(problem):
  params, _ = problem
  rng = np.random.default_rng(1)
  x = rng.normal(size=(256, 6)) * 0.6 ** np.arange(6)
  batches = [jnp.asarray(b, jnp.float32) for b in np.split(x, 4)]
  fn = lambda p, x: jnp.tanh(x @ p['a']) @ p['b']
  two = {name: params[name] for name in 'ab'}
  small, report = ur.compress(
    fn, two, batches, params_fraction=0.75, progress=False
  )
  assert ur.count_params(small) <= 0.75 * ur.count_params(two)
  assert set(report) == {'a', 'b'}
  moments = ur.collect(fn, two, batches, progress=False)
  ranks = ur.uniform_ranks(two, moments, params_fraction=0.75)
  blind = ur.factorize(two, moments, ranks, method='weight')
  y = fn(two, jnp.asarray(x, jnp.float32))
  error = lambda tree: float(
    jnp.sum((ur.low_rank(fn)(tree, jnp.asarray(x, jnp.float32)) - y) ** 2)
  )
  assert error(small) < error(blind)

"""`compress` makes hidden layers narrower where that is nearest."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import utilized_rank as ur

pytestmark = pytest.mark.slow

D, K, SEEN, M = 6, 32, 7, 4
RNG = np.random.default_rng(0)
X = RNG.normal(size=(256, D)).astype(np.float32)
OPTIONS = dict(
  params_fraction=0.3, loss=ur.sampled_cross_entropy(), progress=False
)


class Net(nn.Module):
  """Its first kernel and its head stay; its width is given."""

  @nn.compact
  def __call__(self, x):
    h = nn.gelu(nn.Dense(K, name='up')(x))
    return nn.Dense(M, name='down')(h)


def by_hand(p, x):
  p = p['params']
  h = nn.gelu(x @ p['up']['kernel'] + p['up']['bias'])
  return h @ p['down']['kernel'] + p['down']['bias']


def copies():
  """Parameters of which only the first units differ."""
  params = Net().init(jax.random.key(0), X)
  up = params['params']['up']
  up['bias'] = jnp.asarray(RNG.normal(size=K), jnp.float32)
  for name in up:
    up[name] = up[name][..., np.arange(K) % SEEN]
  return params


@pytest.fixture(scope='module')
def params():
  return copies()


@pytest.mark.parametrize('fn', [Net().apply, by_hand])
def test_copies_of_units_go(fn, params, tmp_path):
  small, report = ur.compress(fn, params, [X], **OPTIONS)
  kernel = small['params']['up']['kernel']
  if fn is by_hand:  # its width is the leaves'
    assert isinstance(kernel, jax.Array) and SEEN <= kernel.shape[1] <= 9
    assert fn(small, X).shape == (len(X), M)
  else:
    assert isinstance(kernel, ur.NarrowHeads) and SEEN <= kernel.rank <= 9
  # A ridge of a millionth of the variance, and sums in float32.
  np.testing.assert_allclose(
    ur.low_rank(fn)(small, X), fn(params, X), rtol=2e-3, atol=2e-3
  )
  kernels = [small['params'][n]['kernel'] for n in ('up', 'down')]
  assert sum(map(ur.count_params, kernels)) <= 0.3 * K * (D + M)
  shapes = report.recipe.abstract(params)
  assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, small)


def test_they_are_not_tried_without(params):
  small, _ = ur.compress(by_hand, params, [X], layers=False, **OPTIONS)
  assert small['params']['up']['bias'].shape == (K,)
  # Damages of layers need gradients.
  moments = ur.collect(by_hand, params, [X], progress=False)
  options = {k: v for k, v in OPTIONS.items() if k != 'loss'}
  small, _ = ur.compress(by_hand, params, [X], moments=moments, **options)
  assert small['params']['up']['bias'].shape == (K,)


def test_other_kernels_get_what_is_left(params):
  """One budget: the layer gives what the head takes."""
  low = RNG.normal(size=(M, 2)) @ RNG.normal(size=(2, 24))
  whole = {'net': params, 'head': jnp.asarray(low, jnp.float32)}
  fn = lambda p, x: by_hand(p['net'], x) @ p['head']
  small, report = ur.compress(fn, whole, [X], **OPTIONS)
  layer = small['net']['params']['up']['kernel']
  head = small['head']
  kept = ur.count_params(
    [layer, small['net']['params']['down']['kernel'], head]
  )
  assert kept <= 0.3 * (K * (D + M) + M * 24)
  assert set(report.recipe.leaves) == {'head'} or layer.shape[1] == K
  change = np.abs(ur.low_rank(fn)(small, X) - fn(whole, X)).mean()
  plain, _ = ur.compress(fn, whole, [X], layers=False, **OPTIONS)
  before = np.abs(ur.low_rank(fn)(plain, X) - fn(whole, X)).mean()
  assert change < before / 2


def test_narrow_first_then_pairs():
  """Copies go, and what is left of the kernels is of low rank."""
  params = copies()
  net = params['params']
  low = RNG.normal(size=(40, 2)) @ RNG.normal(size=(2, K))
  net['up']['kernel'] = jnp.asarray(low, jnp.float32)[:, np.arange(K) % SEEN]
  x = RNG.normal(size=(512, 40)).astype(np.float32) / 4
  options = OPTIONS | {'params_fraction': 0.15}
  small, report = ur.compress(by_hand, params, [x], **options)
  kernel = small['params']['up']['kernel']
  assert isinstance(kernel, ur.LowRank) and kernel.shape[1] < K
  shapes = report.recipe.abstract(params)
  assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, small)
  np.testing.assert_allclose(
    ur.low_rank(by_hand)(small, x), by_hand(params, x), rtol=2e-2, atol=2e-2
  )

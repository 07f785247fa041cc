"""What `compress` returns, and that `merge` takes it."""

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import utilized_rank as ur

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(0)
X = (RNG.normal(size=(64, 6)) * np.arange(1, 7) / 3 + 0.5).astype(np.float32)


def draw(*shape):
  return RNG.normal(size=shape).astype(np.float32) / 2


class ConvNet(nn.Module):
  """Convolutions without biases before norms with running statistics."""

  @nn.compact
  def __call__(self, x):
    for _ in range(2):
      x = nn.Conv(6, (3, 3), use_bias=False)(x)
      x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
    return nn.Dense(3)(x.mean((1, 2)))


def gated(p, x):
  """A block of Llama: no kernel has a bias."""
  return x + (jax.nn.silu(x @ p['gate']) * (x @ p['up'])) @ p['down']


GATED = {'gate': draw(6, 8), 'up': draw(6, 8), 'down': draw(8, 6)}


def recurrent(p, x):
  """Two products of a sum, and one bias."""
  steps = jnp.stack(jnp.split(x, 2, axis=1))
  step = lambda h, x: (jnp.tanh(x @ p['in'] + (h @ p['own'] + p['b'])), None)
  return jax.lax.scan(step, jnp.ones((len(x), 8)), steps)[0]


RECURRENT = {'in': draw(3, 8), 'own': draw(8, 8), 'b': draw(8)}


def norms(p, x):
  """Running means behind a product, a residual sum and a number."""
  h = jnp.tanh((x @ p['a'] - p['mean_a']) * jax.lax.rsqrt(p['var'] + 1e-3))
  return (h - (h @ p['b']) / 2 - p['mean_b']) * p['var']


def normed():
  p = {'a': draw(6, 8), 'b': draw(8, 8), 'mean_b': draw(8)}
  return p | {'mean_a': draw(8), 'var': np.exp(draw(8))}


def residual(p, x):
  return x + jnp.tanh(x @ p['a'] + p['b']) @ p['c'] + p['d']


RESIDUAL = {'a': draw(6, 8), 'b': draw(8), 'c': draw(8, 6), 'd': draw(6)}


def addmm(p, x):
  """As PyTorch writes a linear layer: beta b + alpha x W."""
  y = jnp.tanh(1.0 * p['b'] + 1.0 * (x @ p['a']))
  return p['d'] + 0.5 * (y @ p['c'])


def network(name):
  """(function, parameters, examples)."""
  if name == 'convolutions':
    x = RNG.normal(size=(32, 8, 8, 3)).astype(np.float32) + 0.5
    return ConvNet().apply, ConvNet().init(jax.random.key(0), x), x
  fn, params = {
    'gated': (gated, GATED),
    'recurrent': (recurrent, RECURRENT),
    'residual': (residual, RESIDUAL),
    'addmm': (addmm, RESIDUAL),
  }[name]
  return fn, params, X


def compressed(name, **options):
  fn, params, x = network(name)
  half = len(x) // 2
  # Pairs alone, which have constants.
  given = {'params_fraction': 0.5, 'layers': False, 'progress': False}
  options = given | options
  small, report = ur.compress(fn, params, [x[:half], x[half:]], **options)
  assert any(report.recipe.ranks)
  return fn, params, x, small


@pytest.mark.parametrize(
  'name', ['convolutions', 'recurrent', 'residual', 'addmm']
)
def test_merge_takes_what_has_a_leaf_for_every_constant(name):
  fn, params, x, small = compressed(name)
  merged = ur.merge(small)
  assert jax.tree.map(jnp.shape, merged) == jax.tree.map(jnp.shape, params)
  # One function, multiplied in two orders in float32.
  np.testing.assert_allclose(
    fn(merged, x), ur.low_rank(fn)(small, x), rtol=1e-4, atol=1e-5
  )


def test_merge_says_what_makes_a_tree_that_it_takes():
  fn, params, x, small = compressed('gated')
  advice = 'compress or factorize with compensate_mean=False'
  with pytest.raises(ValueError, match=advice):
    ur.merge(small)
  fn, _, x, small = compressed('gated', compensate_mean=False)
  np.testing.assert_allclose(
    fn(ur.merge(small), x), ur.low_rank(fn)(small, x), rtol=1e-4, atol=1e-5
  )


def test_a_recipe_knows_that_means_were_left():
  fn, params, x = network('gated')
  _, report = ur.compress(
    fn,
    params,
    [x],
    params_fraction=0.5,
    compensate_mean=False,
    progress=False,
  )
  assert not report.recipe.compensate_mean


def test_constants_in_running_means_are_those_at_the_outputs():
  """Against numpy: truncated SVDs, and their mean errors added in float64."""
  params = normed()
  moments = ur.collect(norms, params, [X], progress=False)
  found = {p: moments[p].entry for p in moments}
  assert (found['a'].bias, found['a'].bias_scale) == ('mean_a', -1.0)
  assert (found['b'].bias, found['b'].bias_scale) == ('mean_b', 0.5)
  small = ur.factorize(
    params, moments, {'a': 3, 'b': 3}, method='weight', progress=False
  )
  p = {k: np.asarray(v, np.float64) for k, v in params.items()}
  cut, lost = {}, {}
  for name in 'ab':
    u, s, v = np.linalg.svd(p[name])
    cut[name] = (u[:, :3] * s[:3]) @ v[:3]
    mean = np.asarray(moments[name].mean, np.float64)
    lost[name] = mean @ (p[name] - cut[name])
  y = X.astype(np.float64) @ cut['a'] + lost['a']
  h = np.tanh((y - p['mean_a']) / np.sqrt(p['var'] + 1e-3))
  y = h @ cut['b'] + lost['b']
  want = (h - y / 2 - p['mean_b']) * p['var']
  # Sums of 8 products in float32.
  np.testing.assert_allclose(norms(ur.merge(small), X), want, atol=2e-5)


def constants(tree, names):
  """At the outputs, from leaves that hold them."""
  return sum(np.asarray(tree[name].c, np.float64) for name in names)


@pytest.mark.parametrize('make', ['factorize', 'anchor'])
def test_one_bias_takes_the_constants_of_two_products(make):
  fn = lambda p, x: jnp.tanh(jnp.sin(x) @ p['v'] + x @ p['w'] - p['b']) @ p['o']
  bare = lambda p, x: fn(p | {'b': jnp.zeros(8)}, x)
  params = {'v': draw(6, 8), 'w': draw(6, 8), 'o': draw(8, 3), 'b': draw(8)}

  def small(fn, params):
    batches, ranks = [X[:32], X[32:]], {'v': 2, 'w': 3}
    moments = ur.collect(fn, params, batches, progress=False)
    if make == 'anchor':
      return ur.anchor(
        fn, params, batches, ranks, moments=moments, progress=False
      )
    return ur.factorize(params, moments, ranks, progress=False)

  shared = small(fn, params)
  alone = small(bare, {k: params[k] for k in 'vwo'})
  want = params['b'] - constants(alone, 'vw')
  # The same factors, up to the order of float32 sums.
  np.testing.assert_allclose(shared['b'], want, rtol=1e-4, atol=1e-5)


def test_ranks_are_tried_with_the_constants_that_factors_will_have():
  params = normed()
  moments = ur.collect(norms, params, [X], progress=False)
  ranks = ur.tune_ranks(
    norms,
    params,
    moments,
    [X],
    divergence=ur.squared_error,
    params_fraction=0.6,
    progress=False,
  )
  families = ranks.families
  small = ur.factorize(
    params, moments, ranks, families=families, method=families.method
  )
  want = ur.squared_error(norms(params, X), norms(ur.merge(small), X), X)
  # Differences of outputs near 1 in float32.
  np.testing.assert_allclose(ranks.divergences, want, rtol=1e-3, atol=1e-6)


def test_the_chosen_tree_is_trained_unless_that_is_not_wanted():
  fn, params, _ = network('residual')
  rng = np.random.default_rng(1)
  x = rng.normal(size=(320, 6)).astype(np.float32) * np.arange(1, 7) / 3
  options = dict(params_fraction=0.5, anchored=False, progress=False)
  trees = [
    ur.compress(fn, params, np.split(x[:256], 4), refine=steps, **options)[0]
    for steps in (0, 200)
  ]
  shapes = lambda tree: jax.tree.map(lambda v: (v.shape, v.dtype), tree)
  assert shapes(trees[0]) == shapes(trees[1])
  before, after = (
    np.mean(np.square(ur.low_rank(fn)(tree, x[256:]) - fn(params, x[256:])))
    for tree in trees
  )
  assert after < before

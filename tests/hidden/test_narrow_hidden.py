"""Narrower trees: exact where units say nothing new, else as predicted."""

import flax.linen as nn
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest

import utilized_rank as ur
from utilized_rank.hidden import narrow_hidden

pytestmark = pytest.mark.slow

D, K, M, N = 5, 8, 3, 200
RNG = np.random.default_rng(0)
# float32 sums, and a ridge of a millionth of the mean variance.
EXACT = dict(rtol=2e-3, atol=2e-3)


def draw(*shape):
  return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


X = draw(N, D)


def mlp(p, x):
  return jax.nn.gelu(x @ p['up'] + p['bias']) @ p['down'] + p['last']


def gated(p, x):
  hidden = jax.nn.silu(x @ p['gate']) * (x @ p['up'] + p['bias'])
  return hidden @ p['down'] + p['last']


def convolve(x, w):
  return lax.conv_general_dilated(
    x, w, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
  )


def convolutions(p, x):
  h = convolve(x.reshape(-1, 5, 5, 4), p['one'])
  h = (h - p['mean']) / jnp.sqrt(p['var'] + 1e-5) * p['scale'] + p['bias']
  return convolve(jax.nn.relu(h), p['two']) + p['last']


def scanned(p, x):
  def step(x, p):
    return x + mlp(p, x), None

  return lax.scan(step, x, p)[0]


def tree(**sizes):
  return {k: draw(*s) for k, s in sizes.items()}


MLP = tree(up=(D, K), bias=(K,), down=(K, M), last=(M,))
GATED = MLP | tree(gate=(D, K))
STACK = tree(up=(3, D, K), bias=(3, K), down=(3, K, D), last=(3, D))
CONV = tree(
  one=(3, 3, 4, K),
  mean=(K,),
  scale=(K,),
  bias=(K,),
  two=(3, 3, K, M),
  last=(M,),
) | {'var': jnp.asarray(RNG.uniform(0.5, 2, K), jnp.float32)}


def copied(params, axes):
  """The same with units 6 and 7 copies of units 0 and 1, in all they read."""
  new = dict(params)
  for name, axis in axes.items():
    leaf = jnp.moveaxis(params[name], axis, -1)
    leaf = leaf.at[..., 6:].set(leaf[..., :2])
    new[name] = jnp.moveaxis(leaf, -1, axis)
  return new


CASES = {
  'mlp': (mlp, MLP, {'up': 1, 'bias': 0}, X),
  'gated': (gated, GATED, {'up': 1, 'bias': 0, 'gate': 1}, X),
  'stack': (scanned, STACK, {'up': 2, 'bias': 1}, X),
  'convolutions': (
    convolutions,
    CONV,
    {'one': 3, 'mean': 0, 'scale': 0, 'bias': 0, 'var': 0},
    draw(40, 100),
  ),
}


def moments_of(fn, params, x, **options):
  return ur.collect(fn, params, [x], progress=False, **options)


@pytest.mark.parametrize('form', ['narrower', 'padded'])
@pytest.mark.parametrize('case', CASES)
def test_copies_go_without_a_trace(case, form):
  fn, params, axes, x = CASES[case]
  params = copied(params, axes)
  hidden = ur.find_hidden(fn, params, x)
  if form == 'padded':
    hidden = hidden.fixed()
  (name,) = hidden
  moments = moments_of(fn, params, x)
  small = ur.narrow_hidden(params, moments, hidden, {name: 6})
  dense = fn(params, x)
  close = dict(EXACT, atol=EXACT['atol'] * float(jnp.std(dense)))
  layer = hidden[name]
  if form == 'narrower':
    np.testing.assert_allclose(fn(small, x), dense, **close)
    assert {small[k].shape[axis] for k, axis in axes.items()} == {6}
    assert small[layer.second.path].shape[layer.second.axis] == 6
  else:
    run = jax.jit(ur.low_rank(fn))
    np.testing.assert_allclose(run(small, x), dense, **close)
    merged = ur.merge(small)
    np.testing.assert_allclose(fn(merged, x), dense, **close)
    assert jax.tree.map(jnp.shape, merged) == jax.tree.map(jnp.shape, params)
  kernels = {k.path for k in layer.kernels}
  count = lambda t: sum(ur.count_params(t[k]) for k in kernels)
  assert count(params) - count(small) == 2 * layer.cost


@pytest.mark.parametrize('case', CASES)
def test_without_the_zeros_both_forms_are_one(case):
  fn, params, _, x = CASES[case]
  hidden = ur.find_hidden(fn, params, x)
  (name,) = hidden
  moments = moments_of(fn, params, x)
  small = ur.narrow_hidden(params, moments, hidden, {name: 3})
  padded = ur.narrow_hidden(params, moments, hidden.fixed(), {name: 3})
  again = padded | narrow_hidden.shrunk(hidden[name], padded)
  jax.tree.map(np.testing.assert_array_equal, again, small)


def test_dead_units_and_sums_of_others_go_without_a_trace():
  fn = lambda p, x: x @ p['up'] @ p['down']  # units are linear
  params = tree(up=(D, K), down=(K, M))
  params['up'] = params['up'].at[:, 2].set(0)
  hidden = ur.find_hidden(fn, params, X)
  moments = moments_of(fn, params, X)
  # D numbers are all that X has: of eight units five are enough.
  small = ur.narrow_hidden(params, moments, hidden, {'up': D})
  np.testing.assert_allclose(fn(small, X), fn(params, X), **EXACT)
  assert small['up'].shape == (D, D) and small['down'].shape == (D, M)


def test_it_is_the_least_squares_fit_on_the_rows():
  hidden = ur.find_hidden(mlp, MLP, X)
  moments = moments_of(mlp, MLP, X)
  small = ur.narrow_hidden(MLP, moments, hidden, {'up': 4})
  kept = [
    int(np.flatnonzero(np.asarray(MLP['bias']) == b)[0])
    for b in np.asarray(small['bias'])
  ]
  assert kept == sorted(kept)
  np.testing.assert_array_equal(small['up'], MLP['up'][:, np.array(kept)])
  h = np.asarray(jax.nn.gelu(X @ MLP['up'] + MLP['bias']), np.float64)
  rows = np.hstack([h[:, kept], np.ones((N, 1))])
  want = h @ np.asarray(MLP['down'], np.float64) + np.asarray(MLP['last'])
  best, *_ = np.linalg.lstsq(rows, want, rcond=None)
  np.testing.assert_allclose(small['down'], best[:-1], **EXACT)
  np.testing.assert_allclose(small['last'], best[-1], **EXACT)
  left = np.mean(np.sum((rows @ best - want) ** 2, -1))
  damages = ur.hidden_damages(MLP, moments, hidden, method='output')['up']
  np.testing.assert_allclose(damages[4], left, rtol=1e-2)
  got = np.mean(np.sum((np.asarray(mlp(small, X)) - want) ** 2, -1))
  np.testing.assert_allclose(got, left, rtol=1e-2)


def test_damages_in_nats_are_the_loss_of_a_quadratic():
  """Gauss-Newton is exact where outputs are linear and the loss a square."""
  scales = jnp.array([3.0, 1.0, 0.1])
  # Noise as far as the loss is curved: its gradient has E[g g^T] = curvature.
  noise = draw(4000, M) * scales

  def loss(outputs, batch):
    error = outputs * scales
    target = lax.stop_gradient(error) + batch['noise'] / scales
    return jnp.sum((error - target) ** 2, -1) / 2

  fn = lambda p, batch: mlp(p, batch['x'])
  batch = {'x': draw(4000, D), 'noise': noise}
  hidden = ur.find_hidden(fn, MLP, batch)
  moments = moments_of(fn, MLP, batch, loss=loss)
  small = ur.narrow_hidden(MLP, moments, hidden, {'up': 5}, method='loss')
  change = (fn(small, batch) - fn(MLP, batch)) * scales
  got = float(jnp.mean(jnp.sum(change**2, -1))) / 2
  damages = ur.hidden_damages(MLP, moments, hidden)['up']
  # G is estimated from 4000 draws: two hundredths and a half each way.
  np.testing.assert_allclose(damages[5], got, rtol=0.1)
  assert np.all(np.diff(damages) <= 0) and damages[-1] == 0


def test_widths_of_least_damage_within_a_budget():
  def fn(p, x):
    h = jnp.tanh(x @ p['a']) @ p['b']
    return h + jnp.tanh(x @ p['c']) @ p['d']

  params = tree(a=(D, 4), b=(4, M), c=(D, 6), d=(6, M))
  params['d'] *= 0.1  # hardly counts
  loss = ur.sampled_cross_entropy()
  moments = moments_of(fn, params, X, loss=loss)
  hidden = ur.find_hidden(fn, params, X)
  damages = ur.hidden_damages(params, moments, hidden)
  for share in (0.4, 0.7):
    widths = ur.budget_widths(params, moments, hidden, params_fraction=share)
    most = int(share * 10 * (D + M))
    best = min(
      damages['a'][i] + damages['c'][j]
      for i in range(1, 5)
      for j in range(1, 7)
      if (i + j) * (D + M) <= most
    )
    full = {'a': 4, 'c': 6} | widths
    got = sum(damages[n][k] for n, k in full.items())
    np.testing.assert_allclose(got, best)
  assert not ur.budget_widths(params, moments, hidden, params_fraction=1.0)
  even = ur.budget_widths(
    params, moments, hidden, params_fraction=0.5, multiple_of=2
  )
  assert all(k % 2 == 0 for k in even.values())


class Net(nn.Module):
  @nn.compact
  def __call__(self, x):
    h = nn.BatchNorm(use_running_average=True)(nn.Dense(K, name='one')(x))
    return nn.Dense(M, name='two')(nn.gelu(h))


def test_a_framework_that_fixes_the_width(tmp_path):
  params = Net().init(jax.random.key(0), X)
  fn = Net().apply
  hidden = ur.find_hidden(fn, params, X)
  name = 'params/one/kernel'
  assert not hidden[name].resizes and len(hidden[name].vectors) == 5
  moments = moments_of(fn, params, X)
  small = ur.narrow_hidden(params, moments, hidden, {name: 5})
  kernel = small['params']['one']['kernel']
  assert isinstance(kernel, ur.NarrowHeads) and kernel.a.shape == (D, 5)
  run = jax.jit(ur.low_rank(fn))
  got = run(small, X)
  np.testing.assert_allclose(got, fn(ur.merge(small), X), rtol=1e-5, atol=1e-5)
  ur.save(tmp_path / 'small', small)
  np.testing.assert_array_equal(run(ur.load(tmp_path / 'small'), X), got)
  ranks = {name: 5, 'params/two/kernel': 5}
  recipe = ur.Recipe.of(small, moments, ranks, params=params)
  recipe.save(tmp_path / 'recipe.json')
  shapes = ur.Recipe.load(tmp_path / 'recipe.json').abstract(params)
  assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, small)
  assert jax.tree.structure(ur.write_out(small)) == jax.tree.structure(small)


def test_a_recipe_knows_narrower_arrays(tmp_path):
  hidden = ur.find_hidden(mlp, MLP, X)
  moments = moments_of(mlp, MLP, X)
  small = ur.narrow_hidden(MLP, moments, hidden, {'up': 3})
  recipe = ur.Recipe.of(small, moments, {}, params=MLP)
  recipe.save(tmp_path / 'recipe.json')
  shapes = ur.Recipe.load(tmp_path / 'recipe.json').abstract(MLP)
  assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, small)
  ur.save(tmp_path / 'small', small)
  loaded = ur.load(tmp_path / 'small')
  np.testing.assert_array_equal(mlp(loaded, X), mlp(small, X))


def test_layers_in_a_row_are_narrowed_together():
  fn = lambda p, x: jnp.tanh(jnp.tanh(x @ p['a']) @ p['b'] + p['e']) @ p['c']
  params = tree(a=(D, 6), b=(6, 7), c=(7, M), e=(7,))
  # Copies in both layers.
  params['a'] = params['a'].at[:, 5].set(params['a'][:, 0])
  params['b'] = params['b'].at[:, 6].set(params['b'][:, 1])
  params['e'] = params['e'].at[6].set(params['e'][1])
  hidden = ur.find_hidden(fn, params, X)
  moments = moments_of(fn, params, X)
  small = ur.narrow_hidden(params, moments, hidden, {'a': 5, 'b': 6})
  assert small['b'].shape == (5, 6)
  np.testing.assert_allclose(fn(small, X), fn(params, X), **EXACT)
  with pytest.raises(ValueError, match="'b' is of the hidden layers 'a' and"):
    ur.narrow_hidden(params, moments, hidden.fixed(), {'a': 5, 'b': 6})


def test_errors_say_what_is_wrong():
  hidden = ur.find_hidden(mlp, MLP, X)
  moments = moments_of(mlp, MLP, X)
  narrow = lambda widths, tree=MLP, **options: ur.narrow_hidden(
    tree, moments, hidden, widths, **options
  )
  with pytest.raises(ValueError, match="width is given for 'upp'; did you"):
    narrow({'upp': 3})
  with pytest.raises(ValueError, match="width 9 for 'up': it has 8 units"):
    narrow({'up': 9})
  with pytest.raises(ValueError, match="unknown method 'weight'"):
    narrow({'up': 3}, method='weight')
  with pytest.raises(ValueError, match="'down' have no gradients"):
    narrow({'up': 3}, method='loss')
  with pytest.raises(ValueError, match="'bias' has 3 units, its hidden layer"):
    narrow({'up': 3}, MLP | {'bias': jnp.ones(3)})
  with pytest.raises(ValueError, match='no parameter'):
    narrow({'up': 3}, {'up': MLP['up'], 'down': MLP['down']})
  pair = ur.factorize(MLP, moments, {'up': 2}, progress=False)
  with pytest.raises(ValueError, match="'up' is low-rank already"):
    narrow({'up': 3}, pair)
  with pytest.raises(ValueError, match='params_fraction=2'):
    ur.budget_widths(MLP, moments, hidden, params_fraction=2)

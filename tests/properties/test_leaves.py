"""Every public call takes trees whose leaves are not all arrays.

The right value is that of the arrays alone, the other leaves closed over.
"""

import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import utilized_rank as ur

pytestmark = pytest.mark.slow

OTHERS = {
  'act': jnp.tanh,
  'flag': True,
  'layers': 3,
  'name': 'gelu',
  'none': None,
  'rate': 0.5,
}
QUIET = dict(progress=False)


def normal(*shape, seed=0):
  of = np.random.default_rng(seed + sum(shape))
  return jnp.asarray(of.normal(size=shape) / shape[0] ** 0.5, jnp.float32)


ARRAYS = {
  'b': normal(16),
  'down': normal(16, 8),
  'k': normal(8, 2, 4),
  'o': normal(2, 4, 8),
  'q': normal(8, 2, 4, seed=1),
  'up': normal(8, 16),
  'v': normal(8, 2, 4, seed=2),
}
PARAMS = ARRAYS | OTHERS
BATCHES = [4 * normal(16, 12, 8, seed=i) for i in range(3)]
LOSS = ur.sampled_cross_entropy()


def fn(params, x):
  assert params['flag'] is True and params['name'] == 'gelu'
  assert params['none'] is None and params['layers'] == 3
  q, k, v = (jnp.einsum('bsd,dhe->bshe', x, params[n]) for n in 'qkv')
  weights = jax.nn.softmax(jnp.einsum('bshe,bthe->bhst', q, k))
  mixed = jnp.einsum('bhst,bthe->bshe', weights, v)
  x = x + jnp.einsum('bshe,hed->bsd', mixed, params['o'])
  y = params['act'](x @ params['up'] + params['b']) @ params['down']
  return x + y * params['rate']


def plain(arrays, x):
  return fn(arrays | OTHERS, x)


@pytest.fixture(scope='module')
def moments():
  return ur.collect(plain, ARRAYS, BATCHES, loss=LOSS, **QUIET)


def _trees(f, params, m):
  ranks = ur.uniform_ranks(params, m, params_fraction=0.5)
  return ur.factorize(params, m, ranks, **QUIET), ranks


def _pairs(f, params, m):
  return ur.find_attention(f, params, BATCHES[0])


CALLS = {
  'collect': lambda f, p, m: ur.collect(f, p, BATCHES, **QUIET),
  'capture': lambda f, p, m: ur.capture(f)(p, BATCHES[0])[1],
  'find_sites': lambda f, p, m: str(ur.find_sites(f, p, BATCHES[0])),
  'plan': lambda f, p, m: str(ur.plan(f, p, BATCHES[0])),
  'find_attention': lambda f, p, m: str(_pairs(f, p, m)),
  'measure': lambda f, p, m: str(ur.measure(p, m, **QUIET)),
  'budget_ranks': lambda f, p, m: ur.budget_ranks(
    p, m, params_fraction=0.5, **QUIET
  ),
  'energy_ranks': lambda f, p, m: ur.energy_ranks(p, m, energy=0.9),
  'predict_loss': lambda f, p, m: ur.predict_loss(p, m, {'up': 2}),
  'factorize': lambda f, p, m: _trees(f, p, m)[0],
  'project': lambda f, p, m: ur.project(p, m, energy=0.9),
  'write_out': lambda f, p, m: ur.write_out(_trees(f, p, m)[0]),
  'count_params': lambda f, p, m: ur.count_params(p),
  'merge': lambda f, p, m: ur.merge(
    ur.factorize(p, m, {'up': 2}, compensate_mean=False, **QUIET)
  ),
  'factorize_heads': lambda f, p, m: ur.factorize_heads(
    p,
    m,
    _pairs(f, p, m),
    ur.uniform_head_ranks(_pairs(f, p, m), params_fraction=0.5),
  ),
  'tune_ranks': lambda f, p, m: ur.tune_ranks(
    f,
    p,
    m,
    BATCHES,
    divergence=ur.squared_error,
    params_fraction=0.5,
    rounds=1,
    **QUIET,
  ),
  'search_ranks': lambda f, p, m: ur.search_ranks(
    lambda tree: -float(jnp.mean(f(tree, BATCHES[0]) ** 2)),
    p,
    m,
    steps=2,
    **QUIET,
  ),
  'anchor': lambda f, p, m: ur.anchor(f, p, BATCHES, {'up': 2}, **QUIET),
  'refine': lambda f, p, m: ur.refine(
    f, p, _trees(f, p, m)[0], BATCHES, steps=2, **QUIET
  ),
  'compress': lambda f, p, m: ur.compress(
    f, p, BATCHES, params_fraction=0.5, loss=LOSS, moments=m, **QUIET
  )[0],
  'recipe': lambda f, p, m: ur.compress(
    f, p, BATCHES, params_fraction=0.5, moments=m, **QUIET
  )[1].recipe.abstract(p),
}


def _arrays(found):
  if not isinstance(found, dict):
    return found
  return {k: v for k, v in found.items() if k not in OTHERS}


@pytest.mark.parametrize('name', CALLS)
def test_leaves_that_are_no_arrays(name, moments):
  with warnings.catch_warnings():
    # Few rows, on purpose: what is fitted is compared, not how well.
    warnings.simplefilter('ignore', UserWarning)
    found = CALLS[name](fn, PARAMS, moments)
    right = CALLS[name](plain, ARRAYS, moments)
  if isinstance(found, dict) and 'name' in found:
    others = {k: found[k] for k in OTHERS}
    assert others == OTHERS
  found, right = _arrays(found), _arrays(right)
  if isinstance(found, str):
    assert found.split('\n')[-1] == right.split('\n')[-1]
    return
  leaves = jax.tree.leaves(found)
  others = jax.tree.leaves(right)
  assert len(leaves) == len(others) and leaves
  for leaf, other in zip(leaves, others):
    if hasattr(leaf, 'dtype') and not hasattr(leaf, 'sharding'):
      np.testing.assert_allclose(leaf, other, rtol=1e-5)
    elif isinstance(leaf, jax.Array):
      # The same programs on the same numbers; XLA may fuse them otherwise.
      np.testing.assert_allclose(leaf, other, rtol=2e-4, atol=2e-5)
    else:
      assert leaf == other


def test_they_are_saved(tmp_path, moments):
  small, _ = _trees(fn, PARAMS, moments)
  with pytest.raises(TypeError, match="at 'act'.*leave functions out"):
    ur.save(tmp_path / 'all', small)
  del small['act']
  ur.save(tmp_path / 'rest', small)
  again = ur.load(tmp_path / 'rest')
  for name in OTHERS.keys() - {'act'}:
    assert again[name] == OTHERS[name] and type(again[name]) is type(
      OTHERS[name]
    )
  x = BATCHES[0]
  run = jax.jit(
    lambda tree, x: ur.low_rank(plain)(
      {k: v for k, v in tree.items() if k not in OTHERS}, x
    )
  )
  arrays = lambda tree: {k: v for k, v in tree.items() if k not in OTHERS}
  np.testing.assert_array_equal(run(arrays(again), x), run(arrays(small), x))


def test_low_rank_under_filtered_transforms(moments):
  small, _ = _trees(fn, PARAMS, moments)
  run, x = ur.low_rank(fn), BATCHES[0]
  total = lambda tree: jnp.sum(run(tree, x) ** 2)
  np.testing.assert_allclose(
    eqx.filter_jit(run)(small, x), run(small, x), rtol=2e-4, atol=2e-5
  )
  grads = eqx.filter_jit(eqx.filter_grad(total))(small)
  right = jax.grad(lambda t: jnp.sum(ur.low_rank(plain)(t, x) ** 2))(
    _arrays(small)
  )
  for leaf, other in zip(
    jax.tree.leaves(_arrays(grads)), jax.tree.leaves(right), strict=True
  ):
    np.testing.assert_allclose(leaf, other, rtol=1e-3, atol=1e-3)


def modules():
  key = jax.random.key(1)
  linear = lambda a, b, i: eqx.nn.Linear(a, b, key=jax.random.fold_in(key, i))
  yield eqx.nn.MLP(8, 4, 16, 2, key=key)
  yield eqx.nn.Sequential(
    [linear(8, 16, 0), eqx.nn.Lambda(jnp.tanh), linear(16, 4, 1)]
  )
  yield eqx.nn.Sequential(
    [
      linear(8, 16, 0),
      eqx.nn.Lambda(jax.nn.gelu),
      eqx.nn.Dropout(0.1, inference=True),
    ]
  )


@pytest.mark.parametrize('i', range(3))
def test_equinox_modules_are_compressed(i):
  module = list(modules())[i]
  fn = lambda module, x: jax.vmap(module)(x)
  x = jax.random.normal(jax.random.key(0), (200, 8))
  with warnings.catch_warnings():
    warnings.simplefilter('ignore', UserWarning)
    small, report = ur.compress(
      fn, module, [x[:100], x[100:]], params_fraction=0.5, **QUIET
    )
  assert type(small) is type(module)
  assert ur.count_params(small) < ur.count_params(module)
  run = ur.low_rank(fn)
  dense = np.asarray(fn(module, x), np.float64)
  found = np.asarray(run(small, x), np.float64)
  # Float32 products in another order.
  np.testing.assert_allclose(
    found, fn(ur.merge(small), x), rtol=1e-4, atol=1e-5
  )
  assert np.sum((found - dense) ** 2) < np.sum((dense - dense.mean(0)) ** 2)

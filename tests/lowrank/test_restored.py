"""Factors that were restored as dictionaries, given to `low_rank`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import utilized_rank as ur

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(20, 8)), jnp.float32)
PARAMS = {
  'one': {'w': jnp.asarray(RNG.normal(size=(8, 6)), jnp.float32)},
  'two': {'w': jnp.asarray(RNG.normal(size=(6, 6)), jnp.float32)},
}


def fn(params, x):
  return jnp.tanh(x @ params['one']['w']) @ params['two']['w']


def method(params, x):
  # Fails by an attribute, before any product.
  return x @ params['one']['w'].astype(x.dtype)


def stacked(params, x):
  return jax.lax.scan(lambda h, w: (h @ w, None), x, params['w'])[0]


def as_dictionaries(tree):
  """What orbax restores without a target."""
  return jax.tree.map(
    lambda leaf: (
      {'a': leaf.a, 'b': leaf.b, 'c': leaf.c}
      if isinstance(leaf, ur.LowRank)
      else leaf
    ),
    tree,
    is_leaf=lambda leaf: isinstance(leaf, ur.LowRank),
  )


@pytest.mark.parametrize('gauge', [None, 'identity'])
@pytest.mark.parametrize('run', [fn, method, jax.jit(fn)])
def test_dictionaries_of_factors_are_told(run, gauge):
  moments = ur.capture(fn)(PARAMS, X)[1]
  ranks = {'one/w': 2, 'two/w': 3}
  tree = ur.factorize(PARAMS, moments, ranks, gauge=gauge, progress=False)
  restored = as_dictionaries(tree)
  match = r"\['one/w', 'two/w'\] are dictionaries of their factors.*ur\.load"
  with pytest.raises(ValueError, match=match):
    ur.low_rank(run)(restored, X)
  with pytest.raises(ValueError, match=match):
    jax.jit(ur.low_rank(run))(restored, X)


def test_a_stack_and_one_of_many():
  params = {'w': jnp.stack([jnp.eye(8)] * 3)}
  moments = ur.capture(stacked)(params, X)[1]
  tree = ur.factorize(params, moments, {'w': 2}, progress=False)
  with pytest.raises(ValueError, match=r"\['w'\] are dictionaries"):
    ur.low_rank(stacked)(as_dictionaries(tree), X)


@pytest.mark.parametrize('gauge', [None, 'identity'])
def test_what_orbax_restores(gauge, tmp_path):
  v1 = pytest.importorskip('orbax.checkpoint').v1
  moments = ur.capture(fn)(PARAMS, X)[1]
  ranks = {'one/w': 2}
  tree = ur.factorize(PARAMS, moments, ranks, gauge=gauge, progress=False)
  v1.save(tmp_path / 'tree', tree)
  with pytest.raises(ValueError, match=r"\['one/w'\] are dictionaries"):
    ur.low_rank(fn)(v1.load(tmp_path / 'tree'), X)


def test_dictionaries_that_are_the_models_own():
  # Adapters have such names too: they run, and errors are their own.
  params = {'w': {'a': jnp.ones((8, 2)), 'b': jnp.ones((2, 3))}}
  own = lambda p, x: x @ p['w']['a'] @ p['w']['b']
  np.testing.assert_allclose(ur.low_rank(own)(params, X), own(params, X))
  with pytest.raises(ValueError, match='does not accept these parameters'):
    ur.low_rank(fn)({'one': {'a': X, 'b': jnp.ones(3)}}, X)

"""Stock layers: run by the framework alone, they give what the pairs give."""

import equinox as eqx
from flax import linen as nn
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import utilized_rank as ur

X = np.random.default_rng(0).normal(size=(96, 12)).astype(np.float32) + 0.5
# Float32 products of the same factors, in the same order.
CLOSE = dict(rtol=1e-5, atol=1e-5)


def factorized(fn, params, x=X, **how):
  moments = ur.collect(fn, params, [x], progress=False)
  ranks = {path: 3 for path in moments}
  return ur.factorize(params, moments, ranks, progress=False, **how)


class Pair(nn.Module):
  """What a user writes in place of `nn.Dense(features)`."""

  rank: int
  features: int
  use_bias: bool = True

  @nn.compact
  def __call__(self, x):
    x = nn.Dense(self.rank, use_bias=False)(x)
    return nn.Dense(self.features, use_bias=self.use_bias)(x)


class Stock(nn.Module):
  @nn.compact
  def __call__(self, x, small=False):
    dense = lambda n, bias, name: (
      Pair(3, n, name=name) if small else nn.Dense(n, bias, name=name)
    )
    return dense(8, False, 'out')(nn.gelu(dense(16, True, 'up')(x)))


@pytest.mark.quick
@pytest.mark.parametrize('gauge', [None, 'identity'])
def test_linen(gauge):
  model = Stock()
  params = model.init(jax.random.key(0), X)
  small = factorized(model.apply, params, gauge=gauge)
  plain = ur.two_layers(small)
  assert small['params']['out']['kernel'].c is not None  # a bias of its own
  shapes = jax.tree.map(jnp.shape, plain)
  want = jax.eval_shape(lambda: model.init(jax.random.key(0), X, True))
  assert shapes == jax.tree.map(jnp.shape, want)
  np.testing.assert_allclose(
    model.apply(plain, X, True), ur.low_rank(model.apply)(small, X), **CLOSE
  )


def test_linen_convolutions():
  images = X.reshape(-1, 2, 2, 3)
  one = nn.Conv(8, (2, 2), padding='VALID', name='conv')
  params = {'params': {'conv': one.init(jax.random.key(0), images)['params']}}
  fn = lambda p, x: one.apply({'params': p['params']['conv']}, x)
  small = factorized(fn, params, images)
  layers = ur.two_layers(small)['params']['conv']
  first = nn.Conv(3, (2, 2), padding='VALID', use_bias=False)
  inside = first.apply({'params': layers['Conv_0']}, images)
  got = nn.Conv(8, (1, 1)).apply({'params': layers['Conv_1']}, inside)
  np.testing.assert_allclose(got, ur.low_rank(fn)(small, images), **CLOSE)


class Module(nnx.Module):
  def __init__(self, rngs):
    self.up = nnx.Linear(12, 16, rngs=rngs)
    self.down = nnx.Linear(16, 8, use_bias=False, rngs=rngs)

  def __call__(self, x):
    return self.down(nnx.gelu(self.up(x)))


@pytest.mark.parametrize('gauge', [None, 'identity'])
def test_nnx(gauge):
  run = lambda module, x: module(x)
  small = factorized(run, Module(nnx.Rngs(0)), gauge=gauge)
  plain = ur.two_layers(small)
  assert isinstance(plain, Module)
  assert [type(v) for v in plain.up.layers] == [nnx.Linear] * 2
  np.testing.assert_allclose(plain(X), ur.low_rank(run)(small, X), **CLOSE)
  # Known to NNX: its parameters are found, trained and counted.
  assert len(jax.tree.leaves(nnx.state(plain, nnx.Param))) == 6
  grads = nnx.grad(lambda m: jnp.sum(m(X) ** 2))(plain)
  assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(grads))


@pytest.mark.parametrize('gauge', [None, 'identity'])
def test_equinox(gauge):
  keys = jax.random.split(jax.random.key(0))
  module = eqx.nn.Sequential(
    [
      eqx.nn.Linear(12, 16, key=keys[0]),
      eqx.nn.Lambda(jax.nn.gelu),
      eqx.nn.Linear(16, 8, use_bias=False, key=keys[1]),
    ]
  )
  run = lambda module, x: jax.vmap(module)(x)
  small = factorized(run, module, gauge=gauge)
  plain = ur.two_layers(small)
  assert [type(v) for v in plain[0].layers] == [eqx.nn.Linear] * 2
  np.testing.assert_allclose(
    jax.vmap(plain)(X), ur.low_rank(run)(small, X), **CLOSE
  )


def test_shared_left_factors_are_given_to_each():
  fn = lambda p, x: jnp.tanh(x @ p['q']['kernel']) + x @ p['k']['kernel']
  draw = lambda i: {'kernel': jax.random.normal(jax.random.key(i), (12, 8))}
  params = {'q': draw(0), 'k': draw(1)}
  moments = ur.collect(fn, params, [X], progress=False)
  small = ur.factorize(
    params, moments, {('q/kernel', 'k/kernel'): 3}, progress=False
  )
  plain = ur.two_layers(small)
  for name in 'qk':
    np.testing.assert_array_equal(
      plain[name]['Dense_0']['kernel'], plain['q']['Dense_0']['kernel']
    )
  run = lambda d: X @ d['Dense_0']['kernel'] @ d['Dense_1']['kernel']
  bias = lambda d: d['Dense_1'].get('bias', 0)
  q, k = (run(plain[n]) + bias(plain[n]) for n in 'qk')
  np.testing.assert_allclose(np.tanh(q) + k, ur.low_rank(fn)(small, X), **CLOSE)


def test_what_is_no_stock_layer_is_named():
  small = factorized(lambda p, x: x @ p['w'], {'w': jnp.ones((12, 8))})
  with pytest.raises(ValueError, match=r"'w' is a pair of the shape \(12, 8\)"):
    ur.two_layers(small)

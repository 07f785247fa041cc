"""Functions without a derivative, or a batching rule, are compressed."""

import warnings

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp
import numpy as np
import pytest

import utilized_rank as ur

RNG = np.random.default_rng(0)
X = (RNG.normal(size=(200, 12)) + 0.2).astype('f')
PARAMS = {
  'w': RNG.normal(size=(12, 12)).astype('f') / 4,
  'o': RNG.normal(size=(12, 5)).astype('f'),
}


def pallas(p, x):
  """An inference kernel behind the first product."""

  def kernel(a, o):
    o[...] = jnp.maximum(a[...], 0)

  y = x @ p['w']
  shape = jax.ShapeDtypeStruct(y.shape, y.dtype)
  return pl.pallas_call(kernel, out_shape=shape, interpret=True)(y) @ p['o']


def adaptive(p, x):
  step = lambda s: (s[0] + 1, jnp.tanh(s[1] @ p['w']))
  return jax.lax.while_loop(lambda s: s[0] < 2, step, (0, x))[1] @ p['o']


def counted(p, x):
  n = jnp.int32(2) + (x.sum() > 1e9)
  return jax.lax.fori_loop(0, n, lambda i, s: jnp.tanh(s @ p['w']), x) @ p['o']


def callback(p, x):
  """No derivative, and no batching rule."""
  y = x @ p['w']
  shape = jax.ShapeDtypeStruct(y.shape, y.dtype)
  return jax.pure_callback(lambda v: np.maximum(v, 0), shape, y) @ p['o']


def one_at_a_time(p, x):
  return callback(p, x) + jnp.sort(x @ p['w'], 1) @ p['o']


FUNCTIONS = [pallas, adaptive, counted, callback, one_at_a_time]


@pytest.mark.parametrize('fn', FUNCTIONS)
def test_compress_goes_on_without_slopes(fn):
  with pytest.warns(UserWarning, match='without slopes: the function has no'):
    small, _ = ur.compress(
      fn, PARAMS, [X[:100], X[100:]], params_fraction=0.6, progress=False
    )
  moments = ur.collect(fn, PARAMS, [X], progress=False)
  ranks = ur.uniform_ranks(PARAMS, moments, params_fraction=0.6)
  blind = ur.factorize(PARAMS, moments, ranks, method='weight', progress=False)
  error, before = (
    jnp.mean((ur.low_rank(fn)(tree, X) - fn(PARAMS, X)) ** 2)
    for tree in (small, blind)
  )
  assert error < before


@pytest.mark.parametrize('fn', FUNCTIONS)
def test_a_loss_is_one_error_before_the_work(fn):
  read = []

  def batches():
    for i in range(3):
      read.append(i)
      yield X[:100]

  with (
    warnings.catch_warnings(),
    pytest.raises(ValueError, match='which has none: .* without a loss'),
  ):
    ur.collect(
      fn,
      PARAMS,
      batches(),
      loss=lambda y, x: (y**2).sum(-1),
      progress=False,
    )
  assert len(read) <= 2  # the first one's shapes, and the one behind it


def test_an_error_of_the_loss_itself_is_its_own():
  def loss(y, x):
    raise KeyError('labels')

  with pytest.raises(KeyError, match='labels'):
    ur.collect(adaptive, PARAMS, [X], loss=loss, progress=False)


def test_ranks_are_the_same_tried_together_or_one_by_one():
  """`pure_callback` has a batching rule where it is told to run in turn."""
  ranks = lambda fn, n: ur.tune_ranks(
    fn,
    PARAMS,
    ur.collect(fn, PARAMS, [X], progress=False),
    [X],
    divergence=ur.squared_error,
    params_fraction=0.6,
    at_once=n,
    rounds=0,
    progress=False,
  )
  want = ranks(lambda p, x: jax.nn.relu(x @ p['w']) @ p['o'], 1)
  for n in (1, 3):
    got = ranks(callback, n)
    assert dict(got) == dict(want)
    np.testing.assert_allclose(got.divergences, want.divergences, rtol=1e-4)

"""Sums, what they say, and adding them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import utilized_rank as ur
from utilized_rank.linalg import eigh
from utilized_rank.linalg import gram

RNG = np.random.default_rng(0)
X = RNG.normal(size=(7, 4)).astype(np.float32)
W = RNG.normal(size=(4, 4)).astype(np.float32)


def moments(fn=lambda p, x: x @ p['w'], names='w', x=X):
  # Of several kernels each has an array of its own: one would be tied.
  return ur.capture(fn)({name: W.copy() for name in names}, x)[1]


@pytest.mark.quick
def test_moments_are_a_pytree_of_sums():
  m = moments()
  assert repr(m) == 'Moments(1 kernels, 1 distinct inputs)'
  twice = jax.jit(lambda m: jax.tree.map(lambda a: a + a, m))(m)
  assert int(twice['w'].count) == 14
  np.testing.assert_allclose(twice['w'].second, m['w'].second, rtol=1e-6)
  np.testing.assert_allclose(
    m['w'].covariance, np.cov(X.T, bias=True), rtol=1e-4, atol=1e-6
  )


def test_no_rows_are_no_nan():
  m = jax.tree.map(jnp.zeros_like, moments())
  assert not np.any(m['w'].mean) and not np.any(m['w'].covariance)


def test_unknown_path():
  with pytest.raises(KeyError, match="no moments for 'v'"):
    moments()['v']


def test_merging_what_does_not_belong_together():
  both = lambda p, x: x @ p['w'] + x @ p['v']
  apart = lambda p, x: x @ p['w'] + jnp.sin(x) @ p['v']
  with pytest.raises(ValueError, match='in the first argument and not in'):
    ur.merge_moments(moments(both, 'wv'), moments())
  with pytest.raises(ValueError, match='in the second argument and not in'):
    ur.merge_moments(moments(), moments(both, 'wv'))
  with pytest.raises(ValueError, match='share inputs differently'):
    ur.merge_moments(moments(both, 'wv'), moments(apart, 'wv'))
  turned = moments(lambda p, x: x @ p['w'].T)
  with pytest.raises(ValueError, match='are over'):
    ur.merge_moments(moments(), turned)
  merged = ur.merge_moments(moments(), moments(x=2 * X))
  np.testing.assert_allclose(
    merged['w'].sums.second, 5 * X.T @ X, rtol=1e-5, atol=1e-5
  )


def test_gram_accumulates_in_float32():
  x = jnp.full((3000, 2), 1.0, jnp.float16)
  total, second = gram.gram(x)
  assert total.tolist() == [3000.0, 3000.0]
  assert second.dtype == jnp.float32 and second[0, 1] == 3000.0
  total, _ = gram.gram(jnp.arange(6).reshape(3, 2))
  assert total.dtype == jnp.float32
  with jax.enable_x64(True):
    assert gram.gram(jnp.ones((2, 2), jnp.float64))[1].dtype == jnp.float64


def test_eigh():
  values, vectors = eigh.eigh(X.T @ X)
  assert (np.diff(values) <= 0).all()
  np.testing.assert_allclose(
    vectors * values @ vectors.T, X.T @ X, rtol=1e-5, atol=1e-5
  )
  one = np.ones((1, 4))
  assert (eigh.eigh(one.T @ one)[0][1:] == 0).all()
  with pytest.raises(FloatingPointError, match='NaN or infinite'):
    eigh.eigh(np.full((2, 2), np.nan))

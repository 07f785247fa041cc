"""How far outputs are apart, against float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import utilized_rank as ur


def test_kl_divergence_adds_positions_up():
  rng = np.random.default_rng(0)
  dense, other = rng.normal(size=(2, 3, 4, 5)) * 2
  p, q = (np.exp(v) / np.exp(v).sum(-1, keepdims=True) for v in (dense, other))
  expected = (p * np.log(p / q)).sum((1, 2))
  wrap = lambda v: {'logits': jnp.asarray(v, jnp.float32)}
  found = ur.kl_divergence(lambda o: o['logits'])(
    wrap(dense), wrap(other), None
  )
  # float32 logits of size 2 carry 1e-7 each; twenty terms.
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  assert ur.kl_divergence()(dense[:, 0], dense[:, 0], None).max() == 0


@pytest.mark.parametrize('size', [1e-6, 1e-4, 1e-2, 0.3, 3.0, 30.0])
def test_kl_divergence_of_what_is_near_and_far(size):
  """Also far below the rounding of the logits themselves, and never less
  than nothing."""
  rng = np.random.default_rng(0)
  dense = rng.normal(size=(50, 7)).astype(np.float32) * 4
  other = dense + size * rng.normal(size=dense.shape).astype(np.float32)
  wide = [v.astype(np.float64) for v in (dense, other)]
  # float64's own rounding is far below: its KL is 1e-12 at the least.
  p, q = (v - np.log(np.exp(v).sum(-1, keepdims=True)) for v in wide)
  expected = (np.exp(p) * (np.expm1(q - p) - (q - p))).sum(-1)
  found = np.asarray(ur.kl_divergence()(dense, other, None))
  assert (found >= 0).all()
  # log p and log q are rounded, to 5e-7 of logits of size 8: so much of D.
  slack = expected**0.5 * 1e-6 + 1e-12
  np.testing.assert_array_less(
    np.abs(found - expected) - slack, 1e-5 * expected
  )


def test_kl_divergence_of_excluded_classes():
  dense = jnp.array([[0.0, 1.0, -jnp.inf]])
  divergence = ur.kl_divergence()
  gradient = jax.grad(lambda z: divergence(dense, z, None).sum())
  p, q = jax.nn.softmax(dense), jax.nn.softmax(jnp.array([[1.0, 0, -jnp.inf]]))
  other = jnp.array([[1.0, 0.0, -jnp.inf]])
  want = (p * jnp.log(p / q))[0, :2].sum()
  np.testing.assert_allclose(divergence(dense, other, None), want, rtol=1e-6)
  np.testing.assert_allclose(gradient(other), q - p, rtol=1e-6)
  assert divergence(dense, other.at[0, 1].set(-jnp.inf), None) == jnp.inf
  near = jnp.array([[1e-3, 1.0, 2.0]])
  np.testing.assert_allclose(
    divergence(dense, near, None),
    (p * (jnp.log(p) - jax.nn.log_softmax(near)))[0, :2].sum(),
    rtol=1e-5,
  )
  np.testing.assert_allclose(
    gradient(near), jax.nn.softmax(near) - p, rtol=1e-5, atol=1e-7
  )


@pytest.mark.quick
def test_squared_error_is_a_share_of_each_output():
  rng = np.random.default_rng(0)
  y, z = rng.normal(size=(2, 6, 3, 2))
  u, v = 1e3 * rng.normal(size=(2, 6))
  expected = sum(
    ((a - b) ** 2).reshape(6, -1).sum(1) / (a**2).reshape(6, -1).sum(1).mean()
    for a, b in ((y, z), (u, v))
  )
  count = jnp.arange(6)
  found = ur.squared_error(
    (jnp.asarray(y), jnp.asarray(u), count),
    (jnp.asarray(z), jnp.asarray(v), count + 1),
    None,
  )
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_outputs_without_floats_cannot_be_compared():
  with pytest.raises(ValueError, match='no floating output'):
    ur.squared_error(jnp.arange(3), jnp.arange(3), None)

"""How far outputs are apart, against float64 numpy."""

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

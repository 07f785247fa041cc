"""Losses without labels, against Jacobians worked out in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import utilized_rank as ur

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(0)
X = RNG.normal(size=(4096, 5)).astype(np.float32)
PARAMS = {
  'a': RNG.normal(size=(5, 4)).astype(np.float32),
  'b': RNG.normal(size=(4, 6)).astype(np.float32) / 2,
}


def features(p, x):
  """Two floating outputs of unlike sizes, and one that is no number of it."""
  h = jnp.tanh(x @ p['a'])
  y = h @ p['b']
  wide = 10 * jnp.stack([jnp.sin(y), y], 1)
  return {'wide': wide, 'count': jnp.arange(len(x)), 'y': y}


def jacobians():
  """Of an example's outputs (12 of 'wide', 6 of 'y') by x A and by h B."""
  a, b = (PARAMS[k].astype(np.float64) for k in 'ab')
  h = np.tanh(X.astype(np.float64) @ a)
  y = h @ b
  slope = 10 * np.cos(y)[:, :, None] * np.eye(6)
  steady = np.broadcast_to(np.eye(6), slope.shape)
  by_y = {'wide': np.concatenate([slope, 10 * steady], 1), 'y': steady}
  # h B = tanh(x A) B, so dy / d(x A) = B^T diag(1 - h^2).
  inner = b.T * (1 - h**2)[:, None, :]
  by_a = {name: j @ inner for name, j in by_y.items()}
  return by_a, by_y, y


def wanted(energies):
  by_a, by_y, _ = jacobians()
  for found in (by_a, by_y):
    yield sum(
      2 / e * np.einsum('nki,nkj->nij', found[name], found[name])
      for name, e in zip(('wide', 'y'), energies, strict=True)
    )


@pytest.mark.parametrize('energies', [None, (500.0, 3.0)])
def test_its_gradient_moments_are_gauss_newton(energies):
  moments = ur.collect(
    features,
    PARAMS,
    np.split(X, 4),
    loss=ur.sampled_squared_error(energies=energies),
    progress=False,
  )
  for name, each in zip('ab', wanted(energies or (2.0, 2.0)), strict=True):
    want = each.mean(0)
    # The product of two normal numbers of covariance C = J^T J has a variance
    # of C_ii C_jj + C_ij^2; of 4,096 draws, four standard errors.
    sizes = np.diagonal(each, axis1=1, axis2=2)
    variance = sizes[:, :, None] * sizes[:, None] + each**2
    error = 4 * np.sqrt(variance.mean(0) / len(X))
    found = np.asarray(moments[name].grad_second)
    assert np.all(np.abs(found - want) < error)
    assert np.trace(want) > 5 * np.trace(error)  # it can tell one from another


def test_damages_are_in_the_unit_of_the_divergence():
  """A small change of the last kernel, predicted and measured."""
  _, _, y = jacobians()
  wide = 10 * np.stack([np.sin(y), y], 1)
  energies = [
    float((v.reshape(len(X), -1) ** 2).sum(1).mean()) for v in (wide, y)
  ]
  loss = ur.sampled_squared_error(energies=energies)
  moments = ur.collect(features, PARAMS, [X], loss=loss, progress=False)
  small = RNG.normal(size=(4, 6)).astype(np.float32) / 100
  moment = moments['b']
  predicted = 0.5 * np.einsum(
    'dm,de,en,mn->',
    *(
      np.asarray(v, np.float64)
      for v in (small, moment.second, small, moment.grad_second)
    ),
  )
  other = features({**PARAMS, 'b': PARAMS['b'] + small}, X)
  measured = loss.divergence(features(PARAMS, X), other, X).mean()
  # S and G apart know nothing of how x and g go together; draws are 4,096.
  np.testing.assert_allclose(predicted, measured, rtol=0.1)


def test_an_example_draws_the_same_in_any_batch():
  loss = ur.sampled_squared_error()
  out = features(PARAMS, X[:64])
  whole = loss(out, X[:64])
  cut = lambda tree, part: jax.tree.map(lambda v: v[part], tree)
  parts = slice(0, 7), slice(7, 64)
  apart = [loss(cut(out, p), X[:64][p]) for p in parts]
  # Sums of 18 in another order.
  np.testing.assert_allclose(np.concatenate(apart), whole, rtol=1e-5)
  assert len(np.unique(loss(out, X[:64]))) == 64
  other = ur.sampled_squared_error(seed=1)(out, X[:64])
  assert not np.any(np.asarray(other) == whole)


def test_padding_draws_nothing():
  """Tokens that are padding leave no trace, whatever they hold."""
  x = RNG.normal(size=(8, 6, 5)).astype(np.float32)
  real = np.arange(6) < RNG.integers(2, 7, size=8)[:, None]
  noisy = np.where(real[..., None], x, 100.0).astype(np.float32)
  fn = lambda p, b: jnp.tanh(b['x'] @ p['a']) @ p['b']

  def grads(values):
    # What an example draws is of all its arrays: those are the same.
    batch = {'x': values, 'real': real, 'key': x[:, 0]}
    loss = ur.sampled_squared_error()
    moments = ur.collect(
      fn,
      PARAMS,
      [batch],
      loss=lambda y, b: loss(y, b['key']),
      mask='real',
      progress=False,
    )
    return moments['a'].grad_second

  # Float32 sums of 48 rows.
  np.testing.assert_allclose(grads(noisy), grads(x), rtol=1e-4, atol=1e-5)


def test_it_needs_numbers_and_as_many_energies():
  with pytest.raises(ValueError, match='no floating output to draw for'):
    ur.sampled_squared_error()(jnp.arange(3), None)
  with pytest.raises(ValueError, match='has 1 numbers, and there are 2'):
    ur.sampled_squared_error(energies=[1.0])((jnp.ones(3), jnp.ones(3)), None)

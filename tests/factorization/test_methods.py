"""The published baselines, each against numpy code of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references

import utilized_rank as ur

pytestmark = pytest.mark.slow

SHAPES = [(12, 20), (20, 12), (16, 16)]


def problem(shape, positions=5, examples=120, seed=0):
  """A kernel that reads sequences, and a loss of known gradient."""
  d, m = shape
  rng = np.random.default_rng(seed)
  n = examples * positions
  x = references.correlated_rows(rng, n, d, 0.8, 0.3).astype(np.float32)
  g = references.correlated_rows(rng, n, m, 0.7).astype(np.float32)
  x = x.reshape(examples, positions, d)
  # Gradients of an example's positions go together: squares of their sum are
  # not the sum of their squares.
  g = g.reshape(examples, positions, m) + g[::positions, None]
  params = {'w': jnp.asarray(rng.normal(size=shape) / np.sqrt(d), jnp.float32)}
  fn = lambda p, b: b['x'] @ p['w']
  loss = lambda out, b: jnp.sum(out * b['g'], axis=(1, 2))
  return params, fn, loss, {'x': jnp.asarray(x), 'g': jnp.asarray(g)}


@pytest.mark.parametrize('shape', SHAPES)
def test_baselines_are_what_their_papers_say(shape):
  params, fn, loss, batch = problem(shape)
  halves = [
    jax.tree.map(lambda a, s=s: a[s], batch)
    for s in (slice(0, 70), slice(70, None))
  ]
  moments = ur.collect(
    fn, params, halves, loss=loss, fisher_rows=True, progress=False
  )
  w = np.asarray(params['w'], np.float64)
  rows = np.asarray(batch['x'], np.float64).reshape(-1, shape[0])
  s = references.second_moment(rows)
  fisher = references.row_fisher(batch['x'], batch['g'])
  np.testing.assert_allclose(moments['w'].row_fisher, fisher, rtol=1e-5)
  # In disguise it would be ASVD; it is not.
  assert np.ptp(fisher / np.diag(s)) > 0.3 * np.mean(fisher / np.diag(s))
  for rank in (1, 4, min(shape) - 1):
    want = {
      'weight': references.weighted_rows(w, np.ones(shape[0]), rank),
      'scaled': references.weighted_rows(w, np.diag(s), rank),
      'fisher_rows': references.weighted_rows(w, fisher, rank),
      'output': references.whitened(w, s, rank),
    }
    for method, expected in want.items():
      small = ur.factorize(
        params, moments, {'w': rank}, method=method, compensate_mean=False
      )
      # Factors are float32; singular vectors, of float32 sums, are known to
      # the sums' rounding over the gaps between singular values.
      np.testing.assert_allclose(
        small['w'].dense(),
        expected,
        atol=2e-5 * np.abs(w).max(),
        err_msg=method,
      )


def test_squared_gradients_are_asked_for_by_name():
  params, fn, loss, batch = problem((6, 4), examples=20)
  with pytest.raises(ValueError, match='fisher_rows=True.*give loss='):
    ur.collect(fn, params, [batch], fisher_rows=True, progress=False)
  moments = ur.collect(fn, params, [batch], loss=loss, progress=False)
  assert moments['w'].row_fisher is None
  with pytest.raises(ValueError, match="'w' have no squared gradients.*rows=T"):
    ur.factorize(params, moments, {'w': 2}, method='fisher_rows')


def test_squared_gradients_are_merged_and_saved(tmp_path):
  params, fn, loss, batch = problem((6, 4), examples=20)
  collect = lambda b, rows=True: ur.collect(
    fn, params, [b], loss=loss, fisher_rows=rows, progress=False
  )
  whole = collect(batch)
  first = collect(jax.tree.map(lambda a: a[:8], batch))
  rest = collect(jax.tree.map(lambda a: a[8:], batch))
  merged = ur.merge_moments(first, rest)
  np.testing.assert_allclose(
    merged['w'].row_fisher, whole['w'].row_fisher, rtol=1e-5
  )
  ur.save(tmp_path / 'moments', whole)
  loaded = ur.load(tmp_path / 'moments')
  np.testing.assert_array_equal(loaded['w'].row_fisher, whole['w'].row_fisher)
  with pytest.raises(
    ValueError, match='squared gradients of rows.*fisher_rows='
  ):
    ur.merge_moments(whole, collect(batch, rows=False))

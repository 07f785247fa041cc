"""Long sums do not drift."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import utilized_rank as ur
from utilized_rank.collection import accumulation

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(0)


def test_two_sums_survive_the_compiler():
  """A hundred thousand additions under jit, against float64."""
  x = (100 + RNG.normal(size=(100_000, 3))).astype(np.float32) ** 2

  @jax.jit
  def run(x, low):
    step = lambda c, x: (accumulation.add(*c, x), None)
    return jax.lax.scan(step, (jnp.zeros(3), low), x)[0]

  want = x.astype(np.float64).sum(0)
  plain, none = run(x, None)
  high, low = run(x, jnp.zeros(3))
  assert none is None
  assert np.max(np.abs(plain - want)) > 1e-6 * want.max()
  got = np.asarray(high, np.float64) + np.asarray(low, np.float64)
  # What `low` itself rounds off: 1e-5 of 1e-7.
  np.testing.assert_allclose(got, want, rtol=1e-11)


def collected(batches, **kwargs):
  fn = lambda params, x: x @ params['w']
  params = {'w': np.eye(2, dtype=np.float32)}
  return ur.collect(fn, params, batches, progress=False, **kwargs)['w']


def test_a_million_rows_do_not_drift():
  """Rows of a large mean: the variance is a small difference of large sums."""
  batch = (30 + RNG.normal(size=(2000, 2))).astype(np.float32)
  wide = batch.astype(np.float64)
  mean, second = wide.mean(0), wide.T @ wide / len(wide)
  batches = [batch] * 500
  error = lambda moment: np.abs(
    moment.covariance - np.cov(wide.T, ddof=0)
  ).max()
  plain = collected(batches)
  assert plain.second.dtype == np.float32
  for how in ('compensated', 'float64'):
    moment = collected(batches, accumulate=how)
    assert int(moment.count) == 10**6
    assert moment.second.dtype == np.float64
    # What is left is the float32 rounding within one batch.
    np.testing.assert_allclose(moment.mean, mean, rtol=1e-6)
    np.testing.assert_allclose(moment.second, second, rtol=1e-6)
    assert error(moment) < error(plain) / 3
  one = collected([batch], accumulate='compensated')
  np.testing.assert_allclose(moment.second, one.second, rtol=1e-12)


@pytest.mark.parametrize('how', ['compensated', 'float64'])
def test_interrupted_sums_go_on(how, tmp_path):
  batches = [RNG.normal(size=(5, 2)).astype(np.float32) for _ in range(6)]

  def killed():
    yield from batches[:4]
    raise KeyboardInterrupt

  options = dict(accumulate=how, checkpoint_every=2)
  options['checkpoint_dir'] = tmp_path / 'sums'
  with pytest.raises(KeyboardInterrupt):
    collected(killed(), **options)
  if how == 'compensated':
    with pytest.raises(ValueError, match="accumulate='float32'"):
      collected(batches, checkpoint_dir=tmp_path / 'sums')
  got = collected(batches, **options)
  want = collected(batches, accumulate=how)
  np.testing.assert_array_equal(got.second, want.second)


def test_an_unknown_way_is_refused():
  with pytest.raises(ValueError, match="accumulate must be one of .*'f16'"):
    collected([np.ones((2, 2), np.float32)], accumulate='f16')

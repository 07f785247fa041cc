"""Rows of one example are worth what they say, not what they count."""

import jax.numpy as jnp
import numpy as np
import pytest

import utilized_rank as ur
from utilized_rank.compression import independence

RNG = np.random.default_rng(0)
D = 24
PARAMS = {'w': jnp.asarray(RNG.normal(size=(D, 16)), jnp.float32)}


def fn(params, x):
  return x @ params['w']


def positions(examples, each, alike):
  """Rows (examples, each, D), `alike` of whose variance an example shares."""
  own = RNG.normal(size=(examples, each, D)) * (1 - alike) ** 0.5
  shared = RNG.normal(size=(examples, 1, D)) * alike**0.5
  scales = np.linspace(0.5, 1.5, D)
  return jnp.asarray((own + shared) * scales + 0.3, jnp.float32)


@pytest.mark.parametrize(
  'each, alike, low, high',
  [
    (1, 0.0, 0.8, 1.0),
    (16, 0.0, 0.8, 1.0),
    (16, 1.0, 0.8 / 16, 1.25 / 16),
    # The covariance of two rows is half of theirs: of the squares a quarter,
    # and 1 + 15 / 4 rows are worth one.
    (16, 0.5, 0.6 / 4.75, 1.5 / 4.75),
  ],
)
def test_rows_are_worth_their_independence(each, alike, low, high):
  """A variance of 8 parts over 300 squares: a tenth or so by chance."""
  x = positions(64, each, alike)
  share = independence.independent_share(fn, PARAMS, x, ['w'])
  assert low <= share['w'] <= high


def test_one_example_is_worth_one_row():
  share = independence.independent_share(
    fn, PARAMS, positions(1, 10, 0.0), ['w']
  )
  assert share['w'] == 0.1


def test_inputs_that_never_vary_are_known():
  same = jnp.ones((8, 4, D))
  assert independence.independent_share(fn, PARAMS, same, ['w'])['w'] == 1.0


def looked_at(x, look):
  moments = ur.collect(fn, PARAMS, [x], progress=False)
  return independence.few(look, PARAMS, moments, [x])


def test_few_is_what_independent_rows_say():
  def never(params, x):
    raise AssertionError('it was run')

  # 6 rows for a feature, of examples enough without looking.
  assert not looked_at(positions(6 * D, 1, 0.0), never)
  assert not looked_at(positions(D, 16, 1.0), never)
  # Too few rows, however they are.
  assert looked_at(positions(3 * D, 1, 0.0), never)
  # 16 examples of 32 positions: 21 rows for a feature, or less than one.
  assert not looked_at(positions(16, 32, 0.0), fn)
  assert looked_at(positions(16, 32, 1.0), fn)

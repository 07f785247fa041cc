"""Moments of narrower kernels are parts of the dense kernels' moments."""

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

import utilized_rank as ur
from utilized_rank.hidden.cut_moments import cut_moments
from utilized_rank.hidden.narrow_hidden import Cut

RNG = np.random.default_rng(0)


def draw(*shape):
  return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


def convolve(x, w):
  return lax.conv_general_dilated(
    x, w, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
  )


def convolutions(p, x):
  h = jnp.tanh(convolve(x, p['one']))
  return convolve(h, p['two']).mean((1, 2)) @ p['head']


def stacked(p, x):
  def step(x, p):
    return x + jnp.tanh(x @ p['one']) @ p['two'], None

  return lax.scan(step, x, {k: p[k] for k in ('one', 'two')})[0] @ p['head']


def moments_of(fn, params, x):
  loss = ur.sampled_cross_entropy()
  return ur.collect(fn, params, [x], loss=loss, progress=False)


def check(fn, params, x, units, first, second):
  """`first` and `second` say which features of either kernel stay."""
  moments = moments_of(fn, params, x)
  hidden = ur.find_hidden(fn, params, x)
  found = cut_moments(moments, [Cut(hidden['one'], np.array(units))])
  small = ur.narrow_hidden(params, moments, hidden, {'one': len(units[0])})
  assert {p: m.layout.shape for p, m in found.items()} == {
    p: small[p].shape for p in found
  }

  def parts(array, at):
    array = np.asarray(array).reshape(len(at), *np.shape(array)[-2:])
    return [m[np.ix_(i, i)] for m, i in zip(array, at, strict=True)]

  flat = lambda a: np.asarray(a).reshape(-1, *np.shape(a)[-2:])
  for got, dense, at in (
    (found['two'].second, moments['two'].second, second),
    (found['one'].grad_second, moments['one'].grad_second, first),
  ):
    # In another order of units it is the other triangle of a float32 sum.
    np.testing.assert_allclose(flat(got), parts(dense, at), rtol=1e-5)
  np.testing.assert_array_equal(found['one'].second, moments['one'].second)
  np.testing.assert_array_equal(
    found['two'].grad_second, moments['two'].grad_second
  )
  # They are moments of the narrower kernels for all that takes such.
  ranks = ur.uniform_ranks(small, found, params_fraction=0.7)
  pairs = ur.factorize(small, found, ranks, method='loss', progress=False)
  assert ur.low_rank(fn)(pairs, x).shape == fn(params, x).shape


def test_channels_of_a_convolution():
  params = {
    'one': draw(3, 3, 2, 4),
    'two': draw(3, 3, 4, 5),
    'head': draw(5, 3),
  }
  second = [[4 * place + unit for place in range(9) for unit in (1, 2)]]
  check(convolutions, params, draw(20, 4, 4, 2), [[1, 2]], [[1, 2]], second)


def test_units_of_a_stack():
  params = {'one': draw(3, 4, 6), 'two': draw(3, 6, 4), 'head': draw(4, 3)}
  units = [[0, 1, 2], [3, 4, 5], [0, 2, 5]]
  check(stacked, params, draw(100, 4), units, units, units)


def test_kernels_that_share_an_input_still_do():
  def fn(p, x):
    return jax.nn.silu(x @ p['one']) * (x @ p['gate']) @ p['two'] @ p['head']

  params = {
    'one': draw(4, 6),
    'gate': draw(4, 6),
    'two': draw(6, 4),
    'head': draw(4, 3),
  }
  x = draw(100, 4)
  moments = moments_of(fn, params, x)
  layer = ur.find_hidden(fn, params, x)['one']
  found = cut_moments(moments, [Cut(layer, np.array([[0, 4]]))])
  assert found['one'].entry.index == found['gate'].entry.index
  assert found['gate'].layout.shape == (4, 2)
  assert found['gate'].grad_second.shape == (2, 2)

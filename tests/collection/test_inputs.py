"""What is given in place of batches of arrays: one line, and which entry."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import utilized_rank as ur

RNG = np.random.default_rng(0)
X = RNG.normal(size=(6, 4)).astype(np.float32)
PARAMS = {'w': RNG.normal(size=(4, 3)).astype(np.float32)}


def fn(params, batch):
  return jax.tree.leaves(batch)[0] @ params['w']


class Tensor:
  """An array of another framework: a shape and a type, and no array."""

  shape, dtype, ndim = (6, 4), 'float32', 2


Tensor.__module__ = 'torch'


@pytest.mark.parametrize(
  'batch, said',
  [
    ({'x': X.tolist()}, "at 'x/0/0' there is the float"),
    (X.tolist(), "at '0/0' there is the float"),
    ({'x': X, 'n': 6}, "at 'n' there is the int 6"),
    ({'x': X, 'train': True}, "at 'train' there is the bool True"),
    ({'x': X, 'text': ['a'] * 6}, "at 'text/0' there is a str"),
    ('text', 'and there is a str'),
    ({'x': X, 'text': np.array(['a'] * 6)}, "at 'text' there is an array of"),
    ({'x': X, 'o': np.array([None] * 6)}, "at 'o' there is an array of object"),
    ({'x': Tensor()}, "at 'x' there is a Tensor of torch: make a numpy array"),
    ([X, Tensor()], "at '1' there is a Tensor of torch"),
    ({'x': X, 'scale': np.float32(1)}, "at 'scale' there is an array without"),
    ({}, 'this dict holds none'),
    (None, 'this NoneType holds none'),
  ],
)
def test_a_batch_of_something_else(batch, said):
  for number, batches in ((0, [batch]), (1, [X, batch])):
    # None ends a stream that has not begun.
    if batch is None and not number:
      continue
    with pytest.raises(ValueError, match=f'^batch {number} must be') as error:
      ur.collect(fn, PARAMS, batches, progress=False)
    assert said in str(error.value)
    assert '\n' not in str(error.value) and len(str(error.value)) < 200


def test_a_large_list_is_still_one_line():
  with pytest.raises(ValueError) as error:
    ur.collect(fn, PARAMS, [np.ones((1000, 30)).tolist()], progress=False)
  assert len(str(error.value)) < 200


@pytest.mark.parametrize(
  'batches, said',
  [
    (X, r'an array of shape \(6, 4\)'),
    (jnp.asarray(X), r'an array of shape \(6, 4\)'),
    (Tensor(), r'an array of shape \(6, 4\)'),
    ({'x': X}, 'a dict'),
    (types.MappingProxyType({'x': X}), 'a mappingproxy'),
    ('train', 'a str'),
  ],
)
def test_one_batch_for_several(batches, said):
  match = rf'batches is {said}, not several.*\[batch\]'
  with pytest.raises(ValueError, match=match):
    ur.collect(fn, PARAMS, batches, progress=False)
  with pytest.raises(ValueError, match=match):
    ur.compress(fn, PARAMS, batches, params_fraction=0.5, progress=False)
  moments = ur.collect(fn, PARAMS, [X], progress=False)
  with pytest.raises(ValueError, match=match):
    ur.tune_ranks(
      fn,
      PARAMS,
      moments,
      batches,
      divergence=ur.squared_error,
      params_fraction=0.5,
      progress=False,
    )
  with pytest.raises(ValueError, match=match):
    ur.anchor(fn, PARAMS, batches, {'w': 1}, progress=False)


@pytest.mark.parametrize('select', [['.*w'], '.*w', ('.*w', True), ['ab']])
def test_rules_that_are_strings(select):
  with pytest.raises(ValueError, match=r"is a string: .* \[\('.*', True\)\]"):
    ur.collect(fn, PARAMS, [X], select=select, progress=False)


def test_a_sketch_rule_that_is_a_string():
  with pytest.raises(ValueError, match=r'sketch rule .*\(regex, int\).* 64'):
    ur.collect(fn, PARAMS, [X], sketch=['.*w'], progress=False)


@pytest.mark.parametrize('accumulate', ['float32', 'compensated', 'float64'])
@pytest.mark.parametrize(
  'value, said',
  [
    (1e20, 'is finite, but its squares .* overflow float32'),
    (-3e19, 'is finite, but its squares .* overflow float32'),
    (np.nan, 'is NaN or infinite'),
    (np.inf, 'is NaN or infinite'),
  ],
)
def test_large_inputs_are_not_nan(value, said, accumulate):
  bad = X.copy()
  bad[2, 1] = value
  with pytest.raises(
    FloatingPointError, match=rf"the input of \['w'\] {said}.*batch 1"
  ):
    ur.collect(fn, PARAMS, [X, bad], accumulate=accumulate, progress=False)


def test_large_inputs_of_one_kernel_of_two():
  two = lambda p, x: (x @ p['w']).sum() + (1e20 * jnp.tanh(x) @ p['v']).sum()
  params = {'w': PARAMS['w'], 'v': PARAMS['w'] + 1}
  with pytest.raises(FloatingPointError, match=r"\['v'\] is finite, but"):
    ur.collect(two, params, [X], progress=False)


@pytest.mark.parametrize(
  'value, said', [(1e20, 'is finite, but'), (np.nan, 'is NaN or infinite')]
)
def test_moments_of_large_inputs(value, said):
  moments = ur.capture(fn)(PARAMS, X * np.float32(value))[1]
  with pytest.raises(
    ValueError, match=f"moments of 'w' .*what it reads {said}"
  ):
    ur.measure(PARAMS, moments, progress=False)


def test_large_inputs_that_fit_are_measured():
  # Squares of 1e18 add up to less than 3e38.
  moments = ur.collect(fn, PARAMS, [X * np.float32(1e18)], progress=False)
  plain = ur.collect(fn, PARAMS, [X], progress=False)
  np.testing.assert_allclose(
    moments['w'].second, 1e36 * plain['w'].second, rtol=1e-5
  )

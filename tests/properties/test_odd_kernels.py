"""Kernels of any numbers and types, given to every public call.

What comes out is finite, of the kernel's type and no further from it than the
truncated SVD is in float64, or one error names a kernel.
"""

import re

from every_call import BATCHES
from every_call import CALLS
from every_call import HALF
from every_call import LOSS
from every_call import QUIET
from every_call import examples
from every_call import float32
from every_call import network
from every_call import numbers
from every_call import small_of
from hypothesis import given
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import utilized_rank as ur

pytestmark = pytest.mark.slow

NOT_FINITE = {'NaN': np.nan, 'infinite': np.inf}
SCALES = {f'times {s:g}': s for s in (1e30, 1e20, 1e-20, 1e-30, 1e-38, 0.0)}
TYPES = {'float16': np.float16, 'bfloat16': jnp.bfloat16, 'float64': np.float64}


@pytest.fixture(scope='module')
def moments():
  return ur.collect(network, float32(), BATCHES, **QUIET)


def _odd(name, how):
  """The kernels, one of which is of another type, or of odd numbers."""
  kernels = float32()
  array = np.asarray(kernels[name])
  if how in NOT_FINITE:
    array = array.copy()
    array.flat[3] = NOT_FINITE[how]
  elif how in SCALES:
    array = array * np.float32(SCALES[how])
  else:  # numpy's float64 too, which JAX would cut
    return kernels | {name: array.astype(TYPES[how])}
  return kernels | {name: jnp.asarray(array)}


@examples
@given(
  name=st.sampled_from(['up', 'down']),
  how=st.sampled_from([*NOT_FINITE, *SCALES, *TYPES]),
  call=st.sampled_from(sorted(CALLS)),
)
def test_odd_numbers_are_kept_or_named(name, how, call):
  params = _odd(name, how)
  try:
    moments = ur.collect(network, params, BATCHES, loss=LOSS, **QUIET)
    result = CALLS[call](network, params, moments)
  except (ValueError, FloatingPointError) as error:
    assert len(str(error)) < 400 and re.search("'(up|down)'", str(error))
    # The gradients' squares are what can be too large.
    large = name == 'down' and how in ('times 1e+20', 'times 1e+30')
    assert how in NOT_FINITE or large
    return
  if how not in NOT_FINITE:
    for number in numbers(result):
      assert np.all(np.isfinite(np.asarray(number, np.float64)))
  if call in ('factorize', 'project', 'merge', 'save'):
    for path in ('up', 'down'):
      wanted = jax.dtypes.canonicalize_dtype(params[path].dtype)
      assert result[path].dtype == wanted


@pytest.mark.parametrize('how', [*SCALES, *TYPES])
@pytest.mark.parametrize('name', ['up', 'down'])
def test_factors_of_odd_numbers_are_no_further_than_the_svds(name, how):
  params = _odd(name, how)
  moments = ur.collect(network, params, BATCHES, **QUIET)
  ranks = {'up': 3, 'down': 2}
  small = ur.factorize(params, moments, ranks, **QUIET)
  exact = {k: np.asarray(v, np.float64) for k, v in params.items()}
  x = np.concatenate(BATCHES).astype(np.float64)
  inputs = {'up': x, 'down': np.tanh(x @ exact['up'] + exact['bias'])}
  for path, rank in ranks.items():
    w = exact[path]
    u, s, v = np.linalg.svd(w, full_matrices=False)
    cut = (u[:, :rank] * s[:rank]) @ v[:rank]
    leaf = small[path]
    a, b = (np.asarray(f, np.float64) for f in (leaf.a, leaf.b))
    c = 0 if leaf.c is None else np.asarray(leaf.c, np.float64)
    ours = np.linalg.norm(inputs[path] @ (w - a @ b) - c)
    theirs = np.linalg.norm(inputs[path] @ (w - cut))
    # The factors are rounded to the kernel's own type once.
    eps = float(jnp.finfo(leaf.a.dtype).eps)
    assert ours <= theirs + 8 * eps * np.linalg.norm(inputs[path] @ w)


def test_ten_thousand_leaves():
  others = [np.full((2,), i, np.float32) for i in range(10_000)]
  params = {'net': float32(), 'others': others}
  fn = lambda params, x: network(params['net'], x)
  sites = ur.find_sites(fn, params, BATCHES[0])
  assert len(sites) == 2 and len(sites.unseen) >= 10_000
  moments = ur.collect(fn, params, BATCHES, **QUIET)
  assert len(str(ur.measure(params, moments, **QUIET))) < 4000
  small = small_of(params, moments)
  assert all(v is o for v, o in zip(small['others'], others, strict=True))
  assert ur.count_params(small) < ur.count_params(params)
  found = ur.low_rank(fn)(small, BATCHES[0])
  assert found.shape == (64, 4)


@pytest.mark.parametrize('params', [{}, [], None, {'up': 'x'}, 3, ()])
@pytest.mark.parametrize('call', ['find_sites', 'plan', 'collect', 'capture'])
def test_without_arrays_there_is_nothing_to_run(call, params):
  with pytest.raises(ValueError, match='params holds no array'):
    CALLS[call](network, params, None)


@pytest.mark.parametrize(
  'call', ['measure', 'budget_ranks', 'energy_ranks', 'project', 'factorize']
)
@pytest.mark.parametrize('params', [{}, None, {'up': 'x'}, {'up': np.ones(3)}])
def test_kernels_that_are_not_there_are_named(moments, call, params):
  with pytest.raises(ValueError, match="'(up|down)'"):
    CALLS[call](network, params, moments)


@pytest.mark.parametrize(
  'call',
  ['collect', 'measure', 'factorize', 'anchor', 'tune_ranks', 'finetune'],
)
def test_shapes_alone_are_named(moments, call):
  params = jax.eval_shape(float32)
  with pytest.raises(ValueError, match="'(bias|up|down)' is a shape"):
    CALLS[call](network, params, moments)


@pytest.mark.parametrize('loss', [None, LOSS])
def test_parameters_that_do_not_fit_are_said_to(moments, loss):
  params = float32()
  del params['bias']
  with pytest.raises(ValueError, match='does not accept .* KeyError: .bias'):
    CALLS['tune_ranks'](network, params, moments)
  with pytest.raises(ValueError, match='does not accept .* KeyError: .bias'):
    ur.compress(network, params, BATCHES, loss=loss, **HALF, **QUIET)


def test_a_kernel_of_no_rows_or_columns_is_named_and_left():
  fn = lambda params, x: network(params, x) @ params['none'] @ params['more']
  none = {'none': jnp.zeros((4, 0)), 'more': jnp.zeros((0, 3))}
  params = float32() | none
  sites = ur.find_sites(fn, params, BATCHES[0])
  assert set(sites) == {'down', 'up'}
  for path in none:
    assert 'an axis of size 0' in sites.unseen[path]
  moments = ur.collect(fn, params, BATCHES, **QUIET)
  small = small_of(params, moments)
  assert ur.low_rank(fn)(small, BATCHES[0]).shape == (64, 3)

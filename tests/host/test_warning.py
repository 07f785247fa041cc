"""Warnings of every depth point at the line of who called."""

import functools
import warnings

import jax
import jax.numpy as jnp
import pytest

import utilized_rank as ur

W = {'w': jnp.eye(8)}
X = jnp.eye(8)[:3]


def fn(params, x):
  return x @ params['w']


def moments():
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    return ur.collect(fn, W, [X], progress=False)


FEW = moments()
PAIR = {
  'w': ur.LowRank(
    jnp.ones((8, 2)), jnp.ones((2, 8)), None, FEW['w'].entry.layout
  )
}
SMALL = {'w': 2}
CALLS = {
  'measure': lambda: ur.measure(W, FEW, progress=False),
  'decompose': lambda: ur.decompose(W, FEW, progress=False),
  'factorize': lambda: ur.factorize(W, FEW, SMALL, progress=False),
  'budget_ranks': lambda: ur.budget_ranks(
    W, FEW, params_fraction=0.5, progress=False
  ),
  'compress': lambda: ur.compress(
    fn, W, [X], params_fraction=0.5, refine=0, progress=False
  ),
  'low_rank in jit': lambda: jax.jit(ur.low_rank(lambda p: jnp.sin(p['w'])))(
    PAIR
  ),
}


@pytest.mark.quick
@pytest.mark.parametrize('name', CALLS)
def test_the_callers_line(name):
  with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter('always')
    CALLS[name]()
  assert seen
  assert {one.filename for one in seen} == {__file__}


def test_once_for_a_line_however_often():
  with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter('default')
    for _ in range(3):
      functools.partial(ur.measure, W, FEW, progress=False)()
  assert len(seen) == 1

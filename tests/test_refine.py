"""Refinement of blocks on the dense outputs."""

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest
import references

import utilized_rank as ur


def mlp(p, x):
  h = jnp.tanh(x @ p['w'] + p['b'])
  return jnp.tanh(h @ p['v']) @ p['head']


def network():
  rng = np.random.default_rng(0)
  draw = lambda *s: rng.normal(size=s).astype(np.float32) / s[0] ** 0.5
  return {'w': draw(6, 9), 'b': draw(9), 'v': draw(9, 9), 'head': draw(9, 4)}


def data(count=10, size=24, seed=0):
  rng = np.random.default_rng(seed)
  rows = references.correlated_rows(rng, count * size, 6, 0.7, 0.5)
  return np.split(rows.astype(np.float32), count)


RANKS = {'w': 3, 'v': 3}


def start(params, batches):
  return ur.anchor(mlp, params, batches, RANKS, progress=False)


def error(params, small, x):
  return float(np.mean(np.square(ur.low_rank(mlp)(small, x) - mlp(params, x))))


@pytest.mark.parametrize('group', [None, lambda path: 'all'])
def test_blocks_come_nearer_to_the_dense_ones(group):
  params, batches = network(), data()
  small = start(params, batches)
  better = ur.refine(
    mlp, params, small, batches, steps=100, learning_rate=0.03, group=group,
    progress=False,
  )  # fmt: skip
  others = np.concatenate(data(seed=1))
  assert error(params, better, others) < 0.95 * error(params, small, others)
  kinds = lambda tree: jax.tree.map(lambda v: (v.shape, v.dtype), tree)
  assert kinds(better) == kinds(small)
  # The kernels' own bias is trained; what is no kernel's stays as it is.
  assert np.any(better['b'] != small['b'])
  assert better['head'] is small['head']


def test_a_block_that_gets_worse_is_left_alone():
  params, batches = network(), data()
  small = start(params, batches)
  same = ur.refine(
    mlp, params, small, batches, steps=3, learning_rate=100.0, progress=False
  )
  for a, b in zip(jax.tree.leaves(small), jax.tree.leaves(same), strict=True):
    np.testing.assert_array_equal(a, b)


def test_what_is_exact_stays():
  params, batches = network(), data(count=2)
  full = ur.anchor(mlp, params, batches, {'w': 6, 'v': 9}, progress=False)
  same = ur.refine(mlp, params, full, batches, steps=2, progress=False)
  x = np.concatenate(batches)
  assert error(params, same, x) <= error(params, full, x) + 1e-10


def test_layers_of_a_stack_are_refined_one_after_another():
  rng = np.random.default_rng(0)
  w = (rng.normal(size=(2, 6, 6)) / 2).astype(jnp.bfloat16)
  fn = lambda p, x: lax.scan(
    lambda x, w: (jnp.tanh(x @ w.astype(x.dtype)), None), x, p['w']
  )[0]
  params, batches = {'w': w}, data()
  small = ur.anchor(fn, params, batches, {'w': 2}, progress=False)
  better = ur.refine(
    fn, params, small, batches, steps=60, learning_rate=0.03, progress=False
  )
  assert better['w'].a.dtype == better['w'].c.dtype == jnp.bfloat16
  x = np.concatenate(batches)
  run = ur.low_rank(fn)
  distance = lambda tree: float(
    np.mean(np.square(run(tree, x) - fn(params, x)))
  )
  assert distance(better) < distance(small)


def test_refusals():
  params, batches = network(), data(count=2)
  small = start(params, batches)
  again = lambda *args, **kwargs: ur.refine(
    mlp, *args, progress=False, **kwargs
  )
  with pytest.raises(ValueError, match='two batches: one trains'):
    again(params, small, batches[:1])
  with pytest.raises(ValueError, match='no kernel is named'):
    again(params, params, batches)
  with pytest.raises(ValueError, match=r"differ in their paths: \['more'\]"):
    again(params | {'more': params['b']}, small, batches)
  for wrong in (dict(steps=0), dict(learning_rate=0.0)):
    with pytest.raises(ValueError, match='must be positive'):
      again(params, small, batches, **wrong)

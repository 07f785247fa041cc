"""Refinement of blocks on the dense outputs."""

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest
import references

import utilized_rank as ur
from utilized_rank.refit.streams import Streams

pytestmark = pytest.mark.slow


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


def test_gradients_where_a_block_ends():
  params, batches = network(), data(count=2)
  loss = lambda outputs, batch: jnp.sum(jnp.sin(outputs), 1) * batch[:, 0]
  sites = ur.find_sites(mlp, params, batches[0], select=[('[wv]', True)])
  layouts = {path: site.layout for path, site in sites.items()}
  streams = Streams(mlp, params, batches, layouts, None)
  x = np.concatenate(batches)
  for number, tail in (
    (1, lambda h: jnp.tanh(h @ params['v']) @ params['head']),
    (2, lambda y: y),
  ):
    if number == 1:
      streams.advance(0, params, streams.dense)
    streams.advance(number, params, streams.dense)
    (g,) = streams.gradients(number, params, loss, batches)
    value = mlp(params, x)
    if number == 1:
      value = jnp.tanh(x @ params['w'] + params['b'])
    rows = jax.grad(lambda v, tail=tail: jnp.sum(loss(tail(v), x)))(value)
    want = references.second_moment(rows)
    np.testing.assert_allclose(g, want, rtol=1e-4, atol=1e-6)


def test_a_loss_says_which_errors_count():
  params, batches = network(), data()
  small = start(params, batches)
  loss = lambda outputs, batch: 3 * outputs[:, 0]
  better = ur.refine(
    mlp, params, small, batches, loss=loss, steps=100, learning_rate=0.03,
    progress=False,
  )  # fmt: skip
  x = np.concatenate(data(seed=1))
  run = ur.low_rank(mlp)
  column = lambda tree: float(
    np.mean(np.square(run(tree, x) - mlp(params, x))[:, 0])
  )
  assert column(better) < 0.9 * column(small)


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

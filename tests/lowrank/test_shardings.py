"""Specs of factors from specs of kernels, against where factors are put."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

import utilized_rank as ur

SPECS = {
  'in': P(None, 'model'),
  'out': P('model'),
  'stack': P(None, 'model', 'data'),
  'bias': P('model'),
  'scale': None,
}


def params():
  rng = np.random.default_rng(0)
  draw = lambda *s: jnp.asarray(rng.normal(size=s), jnp.float32)
  return {
    'in': draw(6, 8), 'stack': draw(3, 8, 8), 'out': draw(8, 4),
    'bias': draw(8), 'scale': draw(4),
  }  # fmt: skip


def fn(p, x):
  h = jnp.tanh(x @ p['in'] + p['bias'])
  h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, p['stack'])
  return (h @ p['out']) * p['scale']


def small(gauge=None, tree=None):
  tree = params() if tree is None else tree
  x = np.random.default_rng(1).normal(size=(64, 6)).astype(np.float32)
  moments = ur.collect(fn, tree, [x + 1], progress=False)
  ranks = {path: 2 for path in moments}
  return ur.factorize(tree, moments, ranks, gauge=gauge, progress=False)


def mesh():
  shape = (jax.device_count() // 2, 2)
  return jax.make_mesh(
    shape, ('data', 'model'), axis_types=(jax.sharding.AxisType.Auto,) * 2
  )


@pytest.mark.quick
def test_each_axis_is_spread_as_the_kernels():
  found = ur.shardings(small(), SPECS)
  assert (found['in'].a, found['in'].b) == (P(None, None), P(None, 'model'))
  assert (found['out'].a, found['out'].b) == (P('model', None), P(None, None))
  assert found['out'].c == P(None)
  assert found['stack'].a == P(None, 'model', None)
  assert found['stack'].b == P(None, None, 'data')
  assert (found['bias'], found['scale']) == (P('model'), P())


@pytest.mark.parametrize('gauge', [None, 'identity'])
def test_they_are_those_that_factors_of_spread_kernels_have(gauge):
  """`factorize` puts them there; 'out' and its axis of 3 do not divide."""
  over = mesh()
  put = lambda v, s: jax.device_put(v, NamedSharding(over, s or P()))
  spread = {n: put(v, SPECS[n]) for n, v in params().items()}
  want = small(gauge, spread)
  found = ur.shardings(small(gauge), SPECS, over)
  again = ur.shardings(small(gauge), {n: v.sharding for n, v in spread.items()})
  assert jax.tree.structure(found) == jax.tree.structure(want)
  for tree in (found, again):
    jax.tree.map(
      lambda s, v: (
        s.is_equivalent_to(v.sharding, v.ndim) or pytest.fail(f'{s} {v}')
      ),
      tree,
      {n: want[n] for n in want},
    )
  tree = small(gauge)
  placed = jax.device_put(tree, found)
  shapes = jax.eval_shape(lambda: tree)
  assert jax.tree.leaves(ur.shardings(shapes, SPECS, over)) == (
    jax.tree.leaves(found)
  )
  x = jnp.ones((4, 6))
  run = jax.jit(ur.low_rank(fn), in_shardings=(found, None))
  # One reduction in another order.
  np.testing.assert_allclose(
    run(placed, x), ur.low_rank(fn)(tree, x), atol=1e-5
  )


def test_trees_that_differ_are_named():
  tree = small()
  with pytest.raises(ValueError, match="'more' is in the specs alone"):
    ur.shardings(tree, {**SPECS, 'more': None})
  with pytest.raises(ValueError, match="'bias' is in the parameters alone"):
    ur.shardings(tree, {n: s for n, s in SPECS.items() if n != 'bias'})
  with pytest.raises(ValueError, match=r"'in' has the shape \(6, 8\) and"):
    ur.shardings(tree, {**SPECS, 'in': P(None, None, 'model')})
  with pytest.raises(ValueError, match="specs has a str at 'in', where a Part"):
    ur.shardings(tree, {**SPECS, 'in': 'model'})


def test_what_is_no_array_has_no_axes():
  more = {'act': jnp.tanh, 'name': 'gelu', 'none': None, 'rate': 0.5}
  specs = {'act': None, 'name': P(), 'none': None, 'rate': None}
  found = ur.shardings({**small(), **more}, {**SPECS, **specs})
  assert found['act'] == found['name'] == found['rate'] == P()
  assert found['none'] is None
  with pytest.raises(ValueError, match=r"'name' has the shape \(\) and"):
    ur.shardings({**small(), **more}, {**SPECS, **specs, 'name': P('model')})

"""Stacked layers taken apart and put together; uneven ranks in one stack."""

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest

import utilized_rank as ur
from utilized_rank.lowrank import stack as layers_lib

RNG = np.random.default_rng(0)
TREE = {
  'params': {
    'blocks': {
      'w': RNG.normal(size=(3, 4, 4)).astype(np.float32),
      'b': RNG.normal(size=(3, 4)).astype(np.float32),
    },
    'head': RNG.normal(size=(4, 2)).astype(np.float32),
  },
  'stats': np.zeros(2, np.float32),
}
WHERE = ('params/blocks', 'block_{}')


def scanned(tree, x):
  def block(x, p):
    return jnp.tanh(x @ p['w'] + p['b']), None

  x, _ = lax.scan(block, x, tree['params']['blocks'])
  return x @ tree['params']['head']


def unrolled(tree, x):
  for i in range(3):
    p = tree['params'][f'block_{i}']
    x = jnp.tanh(x @ p['w'] + p['b'])
  return x @ tree['params']['head']


def uneven():
  """The three kernels at ranks 1, 3 and 2, padded in one stack."""
  pairs = [
    (RNG.normal(size=(4, r)), RNG.normal(size=(r, 4))) for r in (1, 3, 2)
  ]
  a, b = layers_lib.pad_factors(pairs)
  layout = ur.Layout.of((3, 4, 4), groups=(0,), inputs=(1,), outputs=(2,))
  leaf = ur.LowRank(np.float32(a), np.float32(b), None, layout)
  dense = np.stack([a @ b for a, b in pairs]).astype(np.float32)
  put = lambda w: {
    **TREE,
    'params': {
      **TREE['params'],
      'blocks': {**TREE['params']['blocks'], 'w': w},
    },
  }
  return put(leaf), put(dense)


def test_round_trip_loses_nothing():
  apart = layers_lib.unstack(TREE, *WHERE)
  assert list(apart['params']) == ['block_0', 'block_1', 'block_2', 'head']
  again = layers_lib.stack(apart, *WHERE)
  assert jax.tree.structure(again) == jax.tree.structure(TREE)
  jax.tree.map(np.testing.assert_array_equal, again, TREE)
  jax.tree.map(
    np.testing.assert_array_equal, layers_lib.unstack(again, *WHERE), apart
  )


def test_both_trees_compute_the_same():
  x = RNG.normal(size=(5, 4)).astype(np.float32)
  np.testing.assert_allclose(
    unrolled(layers_lib.unstack(TREE, *WHERE), x),
    scanned(TREE, x),
    rtol=1e-6,
    atol=1e-6,
  )


def test_padded_factors_of_uneven_rank_compute_the_same():
  x = RNG.normal(size=(5, 4)).astype(np.float32)
  small, dense = uneven()
  assert small['params']['blocks']['w'].rank == 3
  want = scanned(dense, x)
  np.testing.assert_allclose(
    jax.jit(ur.low_rank(scanned))(small, x), want, rtol=1e-5, atol=1e-5
  )
  apart = layers_lib.unstack(small, *WHERE)
  np.testing.assert_allclose(
    jax.jit(ur.low_rank(unrolled))(apart, x), want, rtol=1e-5, atol=1e-5
  )
  again = layers_lib.stack(apart, *WHERE)
  assert jax.tree.structure(again) == jax.tree.structure(small)
  jax.tree.map(np.testing.assert_array_equal, again, small)


def test_low_rank_layers_of_different_rank_are_padded():
  layout = ur.Layout.of((4, 3), inputs=(0,), outputs=(1,))
  layers = {
    f'block_{i}': ur.LowRank(
      np.ones((4, r)), np.ones((r, 3)), np.full(3, r), layout
    )
    for i, r in enumerate((2, 1))
  }
  leaf = layers_lib.stack(layers, 'blocks', 'block_{}')['blocks']
  assert leaf.rank == 2
  assert leaf.c.tolist() == [[2] * 3, [1] * 3]
  np.testing.assert_array_equal(
    leaf.dense(), np.stack([np.full((4, 3), 2), np.full((4, 3), 1)])
  )
  first = layers_lib.unstack({'blocks': leaf}, 'blocks', 'block_{}')['block_0']
  assert first.layout == layout


LAYOUT = ur.Layout.of((4, 3), inputs=(0,), outputs=(1,))
PAIR = ur.LowRank(np.ones((4, 1)), np.ones((1, 3)), None, LAYOUT)


@pytest.mark.parametrize(
  'call, error, message',
  [
    (
      lambda: layers_lib.unstack(TREE, 'params/layers', 'l{}'),
      KeyError,
      "nothing at 'params/layers'",
    ),
    (
      lambda: layers_lib.unstack(TREE, 'stats/layers', 'l{}'),
      KeyError,
      'ndarray',
    ),
    (
      lambda: layers_lib.unstack(TREE, 'params', 'l{}'),
      ValueError,
      'same number of layers',
    ),
    (
      lambda: layers_lib.unstack(TREE, 'params/blocks', 'layer'),
      ValueError,
      'does not name 3',
    ),
    (
      lambda: layers_lib.unstack(TREE, 'params/head', 'blocks'),
      ValueError,
      'are taken',
    ),
    (
      lambda: layers_lib.unstack({'w': PAIR}, 'w', 'l{}'),
      ValueError,
      'no stack of kernels',
    ),
    (
      lambda: layers_lib.stack(TREE, 'params/blocks', 'block_{}'),
      KeyError,
      'no layers named',
    ),
    (
      lambda: layers_lib.stack(
        {'l0': np.ones(2), 'l1': np.ones(3)}, 'l', 'l{}'
      ),
      ValueError,
      "'l1' differs from 'l0'",
    ),
    (
      lambda: layers_lib.stack({'l0': PAIR, 'l1': np.ones((4, 3))}, 'l', 'l{}'),
      ValueError,
      'factored over the same axes',
    ),
    (lambda: layers_lib.pad_factors([]), ValueError, 'no factors'),
    (
      lambda: layers_lib.pad_factors([(np.ones((4, 2)), np.ones((1, 3)))]),
      ValueError,
      'do not meet',
    ),
  ],
)
def test_errors(call, error, message):
  with pytest.raises(error, match=message):
    call()


def test_leaves_that_are_no_arrays_are_every_layers():
  tree = {'blocks': {'w': np.zeros((2, 4, 3)), 'act': jnp.tanh, 'flag': True}}
  layers = ur.unstack(tree, 'blocks', 'block_{}')
  assert layers['block_1']['act'] is jnp.tanh and layers['block_0']['flag']
  again = ur.stack(layers, 'blocks', 'block_{}')['blocks']
  assert again['w'].shape == (2, 4, 3) and again['act'] is jnp.tanh
  layers['block_1']['flag'] = False
  with pytest.raises(ValueError, match="'block_1' differs"):
    ur.stack(layers, 'blocks', 'block_{}')

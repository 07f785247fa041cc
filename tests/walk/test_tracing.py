"""Trees whose leaves are not all arrays, as what takes arrays alone."""

import jax
import jax.numpy as jnp
import numpy as np

from utilized_rank.walk import tracing


def test_what_is_no_array_stays():
  act = jax.nn.relu
  tree = {'act': act, 'n': 2, 'none': None, 'w': (jnp.ones(2), np.zeros(3))}
  arrays, join = tracing.split(tree)
  assert [a.shape for a in arrays] == [(2,), (3,)]
  again = join([a + 1 for a in arrays])
  assert (again['act'], again['n'], again['none']) == (act, 2, None)
  assert again['w'][0].tolist() == [2, 2]
  assert join(arrays)['w'][1] is tree['w'][1]


def test_a_flag_is_branched_on_under_jit():
  tree = {'w': jnp.ones(2), 'bias': True, 'act': jnp.tanh, 'name': 'x'}

  def fn(tree):
    return tree['act'](tree['w'] + (1.0 if tree['bias'] else 0.0))

  arrays, join = tracing.split(tree)
  found = jax.jit(lambda arrays: fn(join(arrays)))(arrays)
  np.testing.assert_array_equal(found, jax.jit(jnp.tanh)(jnp.full(2, 2.0)))


def test_shapes_are_arrays():
  shape = jax.ShapeDtypeStruct((2, 3), jnp.float32)
  arrays, join = tracing.split([shape, 'a'])
  assert arrays == [shape] and join(['b']) == ['b', 'a']

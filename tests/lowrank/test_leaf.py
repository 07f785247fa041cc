"""Trees of `LowRank` leaves as other tools see them: keys, and what they say.

The order of an identity block's outputs is no array. A tree whose arrays are
read into one of another order must not compute something else in silence.
"""

import io

import jax
import jax.numpy as jnp
import numpy as np
import optax
from orbax import checkpoint as ocp
from orbax.checkpoint import v1
import pytest

import utilized_rank as ur

X = np.random.default_rng(0).normal(size=(32, 6)).astype(np.float32)
RANKS = {'w': 3, 'stack': 4, 'experts': 2}


def fn(p, x):
  h = jnp.tanh(x @ p['w'] + p['b'])
  h = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, p['stack'])[0]
  return jnp.einsum('nd,edm->nem', h, p['experts'])


def draw(seed):
  rng = np.random.default_rng(seed)
  shapes = dict(w=(6, 8), b=(8,), stack=(3, 8, 8), experts=(2, 8, 5))
  return {
    k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()
  }


def small(seed, gauge='identity'):
  params = draw(seed)
  moments = ur.collect(fn, params, [X], progress=False)
  return ur.factorize(params, moments, RANKS, gauge=gauge, progress=False)


@pytest.fixture(scope='module')
def trees():
  """Two of the same ranks, of other orders."""
  one, two = small(1), small(2)
  assert all(one[k].order != two[k].order for k in RANKS)
  return one, two


def named(tree):
  leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
  name = lambda path: jax.tree_util.keystr(path, simple=True, separator='/')
  return {name(path): leaf for path, leaf in leaves}, treedef


def through_standard(folder, tree, target):
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(folder / 'tree', tree)
    checkpointer.wait_until_finished()
    return checkpointer.restore(folder / 'tree', target)


def through_pytree(folder, tree, target):
  with ocp.PyTreeCheckpointer() as checkpointer:
    checkpointer.save(folder / 'tree', tree)
    return checkpointer.restore(folder / 'tree', item=target)


def through_v1(folder, tree, target):
  v1.save(folder / 'tree', tree)
  return v1.load(folder / 'tree', target)


def through_npz(folder, tree, target):
  """By key paths, as tools without orbax do."""
  del folder
  file = io.BytesIO()
  np.savez(file, **named(tree)[0])
  file.seek(0)
  with np.load(file) as arrays:
    leaves, treedef = named(target)
    return jax.tree.unflatten(treedef, [arrays[name] for name in leaves])


THROUGH = [through_standard, through_pytree, through_v1, through_npz]


@pytest.mark.parametrize('through', THROUGH)
def test_arrays_come_back_into_a_tree_of_their_order(trees, through, tmp_path):
  one, _ = trees
  zeros = jax.tree.map(jnp.zeros_like, one)
  again = through(tmp_path, one, zeros)
  run = jax.jit(ur.low_rank(fn))
  np.testing.assert_array_equal(run(again, X), run(one, X))


@pytest.mark.parametrize('through', THROUGH)
@pytest.mark.parametrize('leaf', RANKS)
def test_and_into_no_tree_of_another(trees, through, leaf, tmp_path):
  """Of one leaf alone."""
  one, two = trees
  target = {**one, leaf: two[leaf]}
  assert jax.tree.leaves(jax.tree.map(jnp.shape, one)) == jax.tree.leaves(
    jax.tree.map(jnp.shape, target)
  )
  with pytest.raises((ValueError, KeyError), match='b_'):
    through(tmp_path, one, target)


def test_plain_pairs_have_plain_keys():
  names, _ = named(small(1, gauge=None))
  assert sorted(k for k in names if k.startswith('w')) == ['w/a', 'w/b']


def test_keys_are_of_the_order_alone(trees):
  one, _ = trees
  changed = jax.tree.map(lambda v: v + 1, one)
  shapes = jax.eval_shape(lambda tree: tree, one)
  assert (
    list(named(one)[0]) == list(named(changed)[0]) == list(named(shapes)[0])
  )
  assert list(named(ur.write_out(one))[0]) == list(
    named(small(1, gauge=None))[0]
  )


def test_a_tree_trains_as_before(trees):
  """AdamW with a mask by path, jitted and donated; orders stay."""
  one, _ = trees
  decays = lambda path: jax.tree_util.keystr(path, simple=True).endswith('a')
  adam = optax.adamw(
    1e-2,
    weight_decay=0.1,
    mask=lambda tree: jax.tree_util.tree_map_with_path(
      lambda path, _: decays(path), tree
    ),
  )
  run = ur.low_rank(fn)
  loss = lambda tree: jnp.mean((run(tree, X) - 1) ** 2)

  def step(tree, state):
    gradient = jax.grad(loss)(tree)
    change, state = adam.update(gradient, state, tree)
    return optax.apply_updates(tree, change), state

  step = jax.jit(step, donate_argnums=(0, 1))
  tree = jax.tree.map(jnp.copy, one)
  state = adam.init(tree)
  before = float(loss(tree))
  for _ in range(20):
    tree, state = step(tree, state)
  assert float(loss(tree)) < before
  assert jax.tree.structure(tree) == jax.tree.structure(one)
  # The moments of Adam have the keys of their parameters.
  assert set(named(one)[0]) == {
    name.removeprefix('0/mu/')
    for name in named(state)[0]
    if name.startswith('0/mu/')
  }

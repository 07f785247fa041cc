"""What is one object at two places of a tree, and what stays apart."""

import collections

import equinox as eqx
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import utilized_rank as ur
from utilized_rank.tree import paths


def names(tree):
  return list(paths.flatten(tree)[0])


def matrix(seed=0, n=4):
  return jnp.asarray(np.random.default_rng(seed).normal(size=(n, n)))


def test_one_array_at_two_places_is_one():
  w = matrix()
  assert names({'a': w, 'b': {'c': w}}) == ['a']
  w = np.asarray(w)
  assert names({'a': w, 'b': [w, w.copy()]}) == ['a', 'b/1']


def test_equal_arrays_are_two():
  assert names({'a': jnp.eye(3), 'b': jnp.eye(3)}) == ['a', 'b']


@pytest.mark.parametrize(
  'leaf',
  [jnp.zeros(4), jnp.ones(()), None, 3, True, 'gelu', jnp.tanh, np.float32(2)],
)
def test_vectors_and_constants_are_given_to_many(leaf):
  tree = {'a': leaf, 'b': leaf, 'w': matrix()}
  found = names(tree)
  assert found == (['w'] if leaf is None else ['a', 'b', 'w'])
  named, treedef = paths.flatten(tree)
  assert paths.unflatten(treedef, named) == tree


def test_shapes_describe_many():
  shape = jax.ShapeDtypeStruct((4, 4), jnp.float32)
  assert names({'a': shape, 'b': shape}) == ['a', 'b']


def test_containers_at_two_places_are_one_afterwards():
  layer = {'w': matrix(), 'b': jnp.zeros(4)}
  tree = [layer, {'again': layer}, (), ()]
  named, treedef = paths.flatten(tree)
  assert list(named) == ['0/b', '0/w']
  again = paths.unflatten(treedef, named | {'0/b': jnp.ones(4)})
  assert again[0] is again[1]['again'] and again[0] is not layer
  assert again[0]['b'].tolist() == [1.0] * 4 and again[2:] == [(), ()]


def test_what_is_shared_may_hold_what_is():
  inner = [matrix()]
  outer = {'x': inner, 'y': inner}
  named, treedef = paths.flatten([outer, outer, inner])
  assert list(named) == ['0/x/0']
  again = paths.unflatten(treedef, named)
  assert again[0] is again[1] and again[0]['x'] is again[2]


def test_equinox_layers():
  linear = eqx.nn.Linear(4, 4, key=jax.random.key(0))
  tree = eqx.nn.Sequential([linear, eqx.nn.Lambda(jnp.tanh), linear])
  named, treedef = paths.flatten(tree)
  assert ur.count_params(tree) == 20
  again = paths.unflatten(treedef, named)
  assert again.layers[0] is again.layers[2]


def test_nnx_variables():
  class Tied(nnx.Module):
    def __init__(self):
      self.a = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
      self.b = nnx.Linear(4, 4, rngs=nnx.Rngs(1))
      self.b.kernel = self.a.kernel
      self.c = self.a

  model = Tied()
  named, treedef = paths.flatten(model)
  assert list(named) == ['a/bias/value', 'a/kernel/value', 'b/bias/value']
  again = paths.unflatten(treedef, named)
  assert again.a.kernel is again.b.kernel and again.c is again.a
  shapes = nnx.eval_shape(Tied)
  assert names(shapes) == list(named)


def test_tracers_are_tied_by_identity():
  found = []

  def fn(w, v):
    found.append(names({'a': w, 'b': w, 'c': v}))
    return w

  jax.jit(fn)(matrix(), matrix(1))
  assert found == [['a', 'c']]


# --- tied kernels, against the same function of one kernel ---


def tied_dict(w):
  return {'first': w, 'last': w}


def dict_fn(params, x):
  return jnp.tanh(x @ params['first']) @ params['last']


def tied_equinox(w):
  linear = eqx.nn.Linear(4, 4, use_bias=False, key=jax.random.key(0))
  linear = eqx.tree_at(lambda m: m.weight, linear, w.T)
  return eqx.nn.Sequential([linear, eqx.nn.Lambda(jnp.tanh), linear])


class Tied(nnx.Module):
  def __init__(self, w):
    self.a = nnx.Linear(4, 4, use_bias=False, rngs=nnx.Rngs(0))
    self.b = nnx.Linear(4, 4, use_bias=False, rngs=nnx.Rngs(0))
    self.a.kernel[...] = w
    self.b.kernel = self.a.kernel

  def __call__(self, x):
    return self.b(jnp.tanh(self.a(x)))


CASES = {
  'dict': (tied_dict, dict_fn),
  'list': (lambda w: [w, w], lambda p, x: jnp.tanh(x @ p[0]) @ p[1]),
  'equinox': (tied_equinox, lambda m, x: jax.vmap(m)(x)),
  'nnx': (Tied, lambda m, x: m(x)),
}


@pytest.mark.parametrize('name', CASES)
def test_a_tied_kernel_is_measured_and_compressed_once(name):
  make, fn = CASES[name]
  w = jnp.asarray(matrix(), jnp.float32)
  x = jax.random.normal(jax.random.key(0), (300, 4))
  tree = make(w)
  assert ur.count_params(tree) == 16
  moments = ur.collect(fn, tree, [x[:150], x[150:]], progress=False)
  ((path, moment),) = moments.items()
  # Rows of both uses, in float64.
  x64, w64 = np.asarray(x, np.float64), np.asarray(w, np.float64)
  rows = np.concatenate([x64, np.tanh(x64 @ w64)])
  np.testing.assert_allclose(
    moment.second,
    rows.T @ rows / len(rows),
    rtol=1e-5,
    atol=1e-6,
  )
  small = ur.factorize(
    tree, moments, {path: 2}, compensate_mean=False, progress=False
  )
  assert ur.count_params(small) == 2 * (4 + 4)
  merged = ur.merge(small)
  assert ur.count_params(merged) == 16
  leaves = [v for v in jax.tree.leaves(merged) if hasattr(v, 'shape')]
  assert len(leaves) == 2 and leaves[0] is leaves[1]
  # The best rank-2 kernel for those rows: W behind S^1/2, cut.
  root = np.linalg.cholesky(rows.T @ rows / len(rows)).T
  matrix_w = np.asarray(leaves[0], np.float64)
  if name == 'equinox':
    matrix_w = matrix_w.T
  values = np.linalg.svd(root @ w64, compute_uv=False)
  error = np.linalg.norm(root @ (w64 - matrix_w))
  np.testing.assert_allclose(error, np.linalg.norm(values[2:]), rtol=1e-3)
  right = np.tanh(x64 @ matrix_w) @ matrix_w
  for run in (ur.low_rank(fn), jax.jit(ur.low_rank(fn))):
    if name == 'equinox':
      run = eqx.filter_jit(ur.low_rank(fn))
    np.testing.assert_allclose(run(small, x), right, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(fn(merged, x), right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', CASES)
def test_a_tied_kernel_by_compress(name):
  make, fn = CASES[name]
  x = jax.random.normal(jax.random.key(0), (300, 4))
  tree = make(jnp.asarray(matrix(), jnp.float32))
  small, report = ur.compress(
    fn, tree, [x], params_fraction=0.8, progress=False
  )
  assert len(report) == 1
  assert ur.count_params(small) < 16 + 4


@pytest.mark.parametrize(
  'tree, where',
  [
    ({'a': 1, 2: 3}, ''),
    ({'x': [0, ({None: 1, 'b': 2},)]}, 'x/1/0'),
    ([{b'a': 1, 'a': 2}], '0'),
    ({'y': collections.OrderedDict(z={(1,): 1, 1: 2})}, 'y/z'),
  ],
)
def test_keys_that_cannot_be_sorted_are_named(tree, where):
  with pytest.raises(ValueError, match=f"at '{where}' has keys that cannot"):
    paths.flatten(tree)

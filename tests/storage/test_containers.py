"""Dictionaries of other classes, and numbers that JAX would cut."""

import collections
import json
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import utilized_rank as ur
from utilized_rank.storage import encoding


class Named(dict):
  """A dictionary of a class of its own."""


class Anew(dict):
  """Makes its keys anew."""

  def __init__(self, *entries, **named):
    made = dict(*entries, **named).items()
    super().__init__({f'{key} '.strip(): value for key, value in made})


class Nest:
  """Where another class stands."""

  class Inner(collections.OrderedDict):
    """A class in a class."""


def again(tree, tmp_path):
  ur.save(tmp_path / 'tree', tree)
  return ur.load(tmp_path / 'tree')


@pytest.mark.parametrize(
  'made',
  [
    collections.OrderedDict(b=np.ones(2), a=np.zeros(3)),
    collections.OrderedDict(),
    collections.defaultdict(list, a=np.ones(2)),
    collections.defaultdict(None, a=np.ones(2)),
    collections.Counter({'a': 2}),
    Named(a=np.ones(2), b={'c': np.ones(1)}),
    Nest.Inner(z=np.ones(2), a=np.ones(2)),
    Anew(some_key=np.ones(2)),
  ],
)
def test_dictionaries_keep_their_class(made, tmp_path):
  tree = {'x': made, 'y': [made], 'v': np.ones(3, np.float32)}
  loaded = again(tree, tmp_path)
  for found in (loaded['x'], loaded['y'][0]):
    assert type(found) is type(made) and list(found) == list(made)
    factory = 'default_factory'
    assert getattr(found, factory, 0) is getattr(made, factory, 0)
    for key, value in made.items():
      jax.tree.map(np.testing.assert_array_equal, found[key], value)


def test_as_the_whole_tree_and_with_factors(tmp_path):
  params = collections.OrderedDict(
    z={'w': jnp.ones((4, 4))}, a={'w': jnp.eye(4)}
  )
  fn = lambda p, x: x @ p['z']['w'] @ p['a']['w']
  x = np.ones((3, 4), np.float32)
  moments = ur.capture(fn)(params, x)[1]
  tree = ur.factorize(params, moments, {'z/w': 1}, progress=False)
  loaded = again(tree, tmp_path)
  assert jax.tree.structure(loaded) == jax.tree.structure(tree)
  np.testing.assert_array_equal(
    ur.low_rank(fn)(loaded, x), ur.low_rank(fn)(tree, x)
  )


class Closed(dict):
  def __init__(self):
    super().__init__()


class Forgets(dict):
  def __init__(self, entries):
    super().__init__()


def forgetful():
  made = Forgets({})
  made['a'] = np.ones(2)
  return made


@pytest.mark.parametrize(
  'made, said',
  [
    (collections.defaultdict(lambda: 1), 'makes entries by'),
    (Closed(), 'cannot be made again'),
    (forgetful(), 'is another one when it is made again'),
    (type('Local', (dict,), {})(a=np.ones(2)), 'cannot be made again'),
  ],
)
def test_what_could_not_be_made_again(made, said, tmp_path):
  with pytest.raises(TypeError, match=f"at 'x' {said}|at 'x' .*{said}"):
    ur.save(tmp_path / 'tree', {'x': made, 'v': np.ones(2)})
  assert not (tmp_path / 'tree').exists()


def test_a_class_that_is_not_there(tmp_path, monkeypatch):
  ur.save(tmp_path / 'tree', {'x': Named(a=np.ones(2))})
  monkeypatch.delitem(sys.modules, Named.__module__)
  with pytest.raises(ValueError, match='holds a Named of .*import that first'):
    ur.load(tmp_path / 'tree')


def test_files_of_before_have_plain_dictionaries():
  arrays, structure = encoding.encode(Named(a=np.ones(2)), '')
  del structure['class']
  assert type(encoding.decode(arrays, json.loads(json.dumps(structure)))) is (
    dict
  )


@pytest.mark.parametrize(
  'leaf',
  [
    np.array([1 / 3, 1e-300]),
    np.array([2**40, -1]),
    np.array([1 / 3 + 1e-12j]),
    np.array(1 / 3),
    np.float64(1 / 3),
    np.float32(1 / 3),
    np.int64(2**40),
  ],
)
def test_wide_numbers_are_not_cut(leaf, tmp_path):
  found = again({'x': leaf, 'y': [leaf]}, tmp_path)
  for value in (found['x'], found['y'][0]):
    assert value.dtype == leaf.dtype and np.shape(value) == np.shape(leaf)
    np.testing.assert_array_equal(value, leaf)
  assert isinstance(found['x'], np.generic) == isinstance(leaf, np.generic)


def test_arrays_that_jax_has_are_jax_arrays(tmp_path):
  found = again(
    {'x': np.ones(2, np.float32), 'n': np.arange(3, dtype='i4')}, tmp_path
  )
  assert all(isinstance(v, jax.Array) for v in found.values())


class Point(NamedTuple):
  """Found by its name in its module."""

  x: Any
  y: Any


def test_named_tuples_keep_their_class(tmp_path):
  tree = {'p': Point(np.ones(2, np.float32), {'n': 3}), 'q': [Point(None, ())]}
  loaded = again(tree, tmp_path)
  assert type(loaded['p']) is Point and loaded['q'] == [Point(None, ())]
  assert loaded['p'].y == {'n': 3}
  np.testing.assert_array_equal(loaded['p'].x, np.ones(2))
  found = again(Point(np.ones(2), 1), tmp_path / 'root')
  assert type(found) is Point and found.y == 1


def test_named_tuples_that_cannot_be_made_again_are_named(tmp_path):
  local = collections.namedtuple('local', 'a')
  with pytest.raises(TypeError, match="the local at 'x' cannot be made again"):
    ur.save(tmp_path / 'tree', {'x': local(np.ones(2))})


def test_random_keys_and_arrays_of_nothing_come_back(tmp_path):
  tree = {
    'key': jax.random.key(3),
    'keys': [jax.random.split(jax.random.key(1, impl='rbg'), 3)],
    'none': np.zeros((0, 3), jnp.bfloat16),
    'nothing': jnp.zeros((2, 0), jnp.int8),
    'wide': np.zeros((0,), np.float64),
  }
  loaded = again(tree, tmp_path)
  for found, wanted in zip(
    (loaded['key'], loaded['keys'][0]),
    (tree['key'], tree['keys'][0]),
    strict=True,
  ):
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    data = map(jax.random.key_data, (found, wanted))
    np.testing.assert_array_equal(*data)
  for name in ('none', 'nothing', 'wide'):
    assert loaded[name].dtype == tree[name].dtype
    assert loaded[name].shape == tree[name].shape

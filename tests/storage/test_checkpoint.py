"""Trees on disk: any structure, no target, damage noticed."""

import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import utilized_rank as ur
from utilized_rank.storage import checkpoint
from utilized_rank.storage.checkpoint import load_metadata


def equal(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.fixture(scope='module')
def small():
  params = {
    'a': jnp.arange(12.0).reshape(3, 4),
    'b': jnp.ones((2, 4, 3, 5)),
    'bias': jnp.zeros(4),
  }

  def fn(p, x):
    h = x @ p['a'] + p['bias']
    return jnp.einsum('gnd,gdhe->gnhe', jnp.stack([h, h]), p['b'])

  moments = ur.capture(fn, select=[('a|b', True)])(params, jnp.eye(3))[1]
  return params, moments


def test_trees_of_every_kind_come_back(tmp_path):
  layout = ur.Layout.of((2, 4, 3, 5), groups=(0,), inputs=(1,), outputs=(2, 3))
  tree = {
    'params': {
      'kernel': ur.LowRank(
        jnp.ones((2, 4, 2)), jnp.ones((2, 2, 3, 5)), None, layout
      ),
      'with constant': ur.LowRank(
        jnp.ones((2, 4, 2)),
        jnp.ones((2, 2, 3, 5)),
        jnp.zeros((2, 3, 5)),
        layout,
      ),
      'a/b.c': jnp.arange(3, dtype=jnp.int32),
    },
    'list': [jnp.ones(2, jnp.bfloat16), (jnp.ones(1), None), {}],
    'scalar': jnp.float32(3),
    'numbers': {0: jnp.ones(1), 10: jnp.zeros(1)},
  }
  ur.save(tmp_path / 'tree', tree)
  equal(ur.load(tmp_path / 'tree'), tree)


@pytest.mark.parametrize('tree', [jnp.ones(3), [jnp.ones(3)], (jnp.ones(1),)])
def test_trees_need_no_dictionary_at_the_root(tmp_path, tree):
  ur.save(tmp_path / 'tree', tree)
  equal(ur.load(tmp_path / 'tree'), tree)


def test_moments_come_back(tmp_path, small):
  _, moments = small
  ur.save(tmp_path / 'm', moments)
  again = ur.load(tmp_path / 'm')
  equal(again, moments)
  assert again.table == moments.table


@pytest.mark.quick
def test_relative_paths_and_metadata(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  ur.save('here/there', {'a': jnp.ones(1)}, metadata={'step': 3})
  assert load_metadata('here/there') == {'step': 3}
  assert os.listdir(tmp_path) == ['here']


def test_an_existing_tree_is_replaced_only_on_request(tmp_path):
  ur.save(tmp_path / 't', {'a': jnp.ones(1)})
  with pytest.raises(FileExistsError, match='overwrite=True'):
    ur.save(tmp_path / 't', {'a': jnp.zeros(1)})
  equal(ur.load(tmp_path / 't'), {'a': jnp.ones(1)})
  ur.save(tmp_path / 't', {'a': jnp.zeros(1)}, overwrite=True)
  equal(ur.load(tmp_path / 't'), {'a': jnp.zeros(1)})


@pytest.mark.parametrize('value', [jnp.tanh, 3j, np.array(['a']), object()])
def test_what_cannot_be_saved_is_named_and_nothing_is_written(tmp_path, value):
  with pytest.raises(TypeError, match="at 'a/1'"):
    ur.save(tmp_path / 't', {'a': [jnp.ones(1), value]})
  assert not os.listdir(tmp_path)
  for keys in [(1, '1'), ((1, 2),), (True, 'a', 2.5)]:
    with pytest.raises(TypeError, match='cannot be saved'):
      ur.save(tmp_path / 't', dict.fromkeys(keys, jnp.ones(1)))


def data_files(folder):
  files = [p for p in pathlib.Path(folder).rglob('*') if p.is_file()]
  return sorted(files, key=lambda p: p.stat().st_size, reverse=True)


@pytest.fixture
def saved(tmp_path):
  tree = {'a': jax.random.normal(jax.random.key(0), (64, 64))}
  ur.save(tmp_path / 't', tree)
  return tmp_path / 't'


def test_a_truncated_checkpoint_is_one_clear_error(saved):
  for path in data_files(saved)[:1]:
    path.write_bytes(path.read_bytes()[:100])
  with pytest.raises(ValueError, match=r'checkpoint .* is damaged'):
    ur.load(saved)


def test_a_missing_file_is_one_clear_error(saved):
  data_files(saved)[0].unlink()
  with pytest.raises(ValueError, match=r'checkpoint .* is damaged'):
    ur.load(saved)


def test_every_flipped_byte_of_an_array_is_noticed(saved):
  """orbax alone returns wrong numbers for some of them."""
  path = data_files(saved)[0]
  content = bytearray(path.read_bytes())
  for at in (len(content) // 3, len(content) // 2):
    flipped = bytearray(content)
    flipped[at] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(ValueError, match=r'checkpoint .* is damaged'):
      ur.load(saved)


def test_what_is_no_checkpoint_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match='no checkpoint at'):
    ur.load(tmp_path / 'nothing')
  (tmp_path / 'empty').mkdir()
  with pytest.raises(ValueError, match='damaged or is none'):
    ur.load(tmp_path / 'empty')
  from orbax.checkpoint import v1 as ocp

  ocp.save(str(tmp_path / 'foreign'), {'a': np.ones(2)})
  with pytest.raises(ValueError, match='not written by utilized_rank.save'):
    ur.load(tmp_path / 'foreign')


def test_other_tools_can_read_the_arrays(tmp_path):
  from orbax.checkpoint import v1 as ocp

  layout = ur.Layout.of((4, 3), inputs=(0,), outputs=(1,))
  leaf = ur.LowRank(jnp.ones((4, 1)), jnp.ones((1, 3)), None, layout)
  ur.save(tmp_path / 't', {'params': {'Dense_0': {'kernel': leaf}}})
  target = {
    'params': {
      'Dense_0': {
        'kernel': {'a': np.zeros((4, 1), 'f'), 'b': np.zeros((1, 3), 'f')}
      }
    }
  }
  plain = ocp.load(str(tmp_path / 't'), target)
  np.testing.assert_array_equal(
    plain['params']['Dense_0']['kernel']['a'], np.ones((4, 1))
  )


def test_one_file_holds_sums_of_any_dtype(tmp_path, monkeypatch):
  """What a process of several saves by itself; damage is said."""
  fn = lambda p, x: x @ p['w']
  moments = ur.capture(fn)({'w': np.eye(3, dtype='f')}, np.ones((4, 3), 'f'))[1]
  wide = jax.tree.map(lambda a: np.asarray(a, np.float64) / 3, moments)
  path = tmp_path / '7.npz'
  checkpoint.save_file(path, {'state': wide}, {'batches': 7})
  tree, metadata = checkpoint.load_file(path)
  assert metadata == {'batches': 7}
  assert tree['state'].table == wide.table
  jax.tree.map(np.testing.assert_array_equal, tree['state'], wide)
  assert tree['state']['w'].second.dtype == np.float64
  assert [p.name for p in tmp_path.iterdir()] == ['7.npz']
  whole = path.read_bytes()
  for bad in (
    whole[: len(whole) // 2],
    b'',
    whole.replace(b'moments', b'm0ments'),
  ):
    path.write_bytes(bad)
    with pytest.raises(ValueError, match='damaged'):
      checkpoint.load_file(path)
  monkeypatch.setattr(checkpoint, '_FORMAT', 2)
  checkpoint.save_file(path, {}, {})
  monkeypatch.undo()
  with pytest.raises(ValueError, match='its format is 2, not 1'):
    checkpoint.load_file(path)


def test_a_checkpoint_with_an_array_too_many(saved, monkeypatch):
  unsealed = checkpoint.files.unsealed
  monkeypatch.setattr(
    checkpoint.files, 'unsealed', lambda v: {**unsealed(v), 'checksums': {}}
  )
  with pytest.raises(ValueError, match='should hold 0 arrays and holds 1'):
    ur.load(saved)

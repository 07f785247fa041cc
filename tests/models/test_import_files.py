"""Files and directories that checkpoints come in, and those cut short."""

import json
import pickle

import checkpoints
from flax import serialization
import ml_dtypes
import numpy as np
import pytest

from utilized_rank.models.importing.files import formats

pytestmark = pytest.mark.slow

X = np.arange(6, dtype=np.float32).reshape(2, 3)
Y = np.arange(4, dtype=np.float32) - 2


def values(path):
  tensors, others = formats.read_tensors(str(path))
  return {name: tensor.read() for name, tensor in tensors.items()}, others


def write_safetensors(path, state, **metadata):
  header, data = {}, b''
  names = {'float32': 'F32', 'float8_e4m3fn': 'F8_E4M3', 'bfloat16': 'BF16'}
  if metadata:
    header['__metadata__'] = metadata
  for name, x in state.items():
    header[name] = {
      'dtype': names[str(x.dtype)],
      'shape': x.shape,
      'data_offsets': [len(data), len(data) + x.nbytes],
    }
    data += x.tobytes()
  text = json.dumps(header).encode()
  path.write_bytes(len(text).to_bytes(8, 'little') + text + data)


def test_safetensors_of_eight_bits(tmp_path):
  small = X.astype(ml_dtypes.float8_e4m3fn)
  path = tmp_path / 'a'
  write_safetensors(path, {'x': small, 'y': Y}, architecture='resnet18')
  found, others = values(path)
  np.testing.assert_array_equal(found['x'].astype(np.float32), X)
  np.testing.assert_array_equal(found['y'], Y)
  assert others == {'__metadata__.architecture': 'resnet18'}
  whole = path.read_bytes()
  path.write_bytes(whole[:-4])
  with pytest.raises(ValueError, match='before y: it is truncated'):
    values(path)
  path.write_bytes(whole.replace(b'"F32"', b'"F3X"'))
  with pytest.raises(ValueError, match='y is of type F3X'):
    values(path)


def test_a_folder_of_shards(tmp_path):
  for i, state in enumerate(({'x': X}, {'y': Y}), 1):
    name = f'model-0000{i}-of-00002.safetensors'
    write_safetensors(tmp_path / name, state)
  shards, _ = values(tmp_path)
  index = tmp_path / 'model.safetensors.index.json'
  files = {'x': 'model-00001-of-00002.safetensors'}
  files['y'] = files['x'].replace('1-of', '2-of')
  index.write_text(json.dumps({'weight_map': files}))
  for place in (tmp_path, index):
    indexed, _ = values(place)
    for found in (shards, indexed):
      np.testing.assert_array_equal(found['x'], X)
      np.testing.assert_array_equal(found['y'], Y)
  index.write_text(json.dumps({'weight_map': {**files, 'z': 'gone.bin'}}))
  with pytest.raises(ValueError, match=r"\['gone.bin'\], which are not there"):
    values(tmp_path)
  index.write_text(json.dumps({'weight_map': {'z': '../other.bin'}}))
  with pytest.raises(ValueError, match='which is not beside it'):
    values(tmp_path)
  index.unlink()
  (tmp_path / files['y']).unlink()
  with pytest.raises(ValueError, match='shards are missing'):
    values(tmp_path)


def test_a_folder_of_several_models(tmp_path):
  for name in ('a.safetensors', 'b.safetensors'):
    write_safetensors(tmp_path / name, {'x': X})
  with pytest.raises(ValueError, match='give the path of the file'):
    values(tmp_path)


def test_a_tensor_in_two_shards(tmp_path):
  for i in (1, 2):
    name = f'model-0000{i}-of-00002.safetensors'
    write_safetensors(tmp_path / name, {'x': X})
  with pytest.raises(ValueError, match='has x in .* and in another file'):
    values(tmp_path)


def legacy(tree, storages, sizes):
  """What torch.save wrote before version 1.6."""
  magic = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2)
  system = pickle.dumps({'little_endian': True}, 2)
  keys = pickle.dumps([*storages], 2)
  head = magic + system + b'\x80\x02' + checkpoints.pickled(tree) + b'.' + keys
  return head + b''.join(
    sizes[key].to_bytes(8, 'little') + x.tobytes()
    for key, x in storages.items()
  )


def legacy_tensor(key, size, shape, strides):
  """Its storage's last word is a view of another, or None."""
  whole = checkpoints.pickled_tensor(key, 'float32', size, 0, shape, strides)
  return whole.replace(b'I%d\ntQ' % size, b'I%d\nNtQ' % size)


def test_legacy_files_of_torch(tmp_path):
  tree = {
    'x': legacy_tensor('7', 6, (2, 3), (3, 1)),
    'y': legacy_tensor('8', 4, (4,), (1,)),
  }
  content = legacy(tree, {'8': Y, '7': X}, {'8': 4, '7': 6})
  path = tmp_path / 'a'
  path.write_bytes(content)
  found, _ = values(path)
  np.testing.assert_array_equal(found['x'], X)
  np.testing.assert_array_equal(found['y'], Y)
  path.write_bytes(content[:-4])
  with pytest.raises(ValueError, match='it is truncated'):
    values(path)
  path.write_bytes(pickle.dumps({'a': 3}, 2))
  with pytest.raises(ValueError, match='bare pickle that torch.save did not'):
    values(path)


def test_what_training_saves_beside_the_weights(tmp_path):
  inert = b'cargparse\nNamespace\n(tR(Vlr\nF0.1\ndb'
  tree = {
    'x': checkpoints.pickled_tensor('0', 'float32', 6, 0, (2, 3), (3, 1)),
    'args': inert,
    'dtype': b'ctorch\nfloat32\n',
    'best': b'cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(Vf8\ntRVab\ntR',
    'arch': b'Vresnet18\n',
  }
  checkpoints.write_torch_zip(tmp_path / 'a', tree, {'0': X})
  found, others = values(tmp_path / 'a')
  np.testing.assert_array_equal(found['x'], X)
  assert set(others) == {'args', 'dtype', 'best', 'arch'}
  assert (others['arch'], others['dtype']) == ('resnet18', 'float32')


def test_arrays_that_flax_cut_into_pieces(tmp_path, monkeypatch):
  monkeypatch.setattr(serialization, 'MAX_CHUNK_SIZE', 8)
  tree = {'a': {'x': X}, 'y': Y[:2], 'step': 3}
  (tmp_path / 'a').write_bytes(serialization.to_bytes(tree))
  found, others = values(tmp_path / 'a')
  np.testing.assert_array_equal(found['a/x'], X)
  np.testing.assert_array_equal(found['y'], Y[:2])
  assert list(others) == ['step']


def test_a_truncated_zip(tmp_path):
  np.savez(tmp_path / 'a.npz', x=np.zeros(1000))
  whole = (tmp_path / 'a.npz').read_bytes()
  (tmp_path / 'a.npz').write_bytes(whole[:500])
  with pytest.raises(ValueError, match='has no end: it is truncated'):
    values(tmp_path / 'a.npz')


def test_the_other_order_of_bytes(tmp_path):
  content = legacy({'x': legacy_tensor('7', 6, (6,), (1,))}, {'7': X}, {'7': 6})
  little, big = (
    pickle.dumps({'little_endian': order}, 2) for order in (True, False)
  )
  path = tmp_path / 'a'
  path.write_bytes(content.replace(little, big))
  with pytest.raises(ValueError, match='is big-endian; only little-endian'):
    values(path)

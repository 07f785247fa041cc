"""Checkpoint files for tests, written by hand: no torch, no importer code."""

import zipfile

import numpy as np

STORAGES = {
  'float32': b'FloatStorage',
  'bfloat16': b'BFloat16Storage',
  'float16': b'HalfStorage',
}


def _text(value):
  return b'V' + value.encode() + b'\n'


def _tuple(numbers):
  return b'(' + b''.join(b'I%d\n' % n for n in numbers) + b't'


def pickled_tensor(key, dtype, size, offset, shape, strides):
  """What torch.save writes for a tensor: a call with a persistent storage."""
  return (
    b'ctorch._utils\n_rebuild_tensor_v2\n(('
    + _text('storage')
    + b'ctorch\n%s\n' % STORAGES[dtype]
    + _text(key)
    + _text('cpu')
    + b'I%d\ntQI%d\n' % (size, offset)
    + _tuple(shape)
    + _tuple(strides)
    + b'I00\nccollections\nOrderedDict\n)RtR'
  )


def pickled(tree):
  """Dictionaries of pickles."""
  if isinstance(tree, bytes):
    return tree
  items = (_text(k) + pickled(v) for k, v in tree.items())
  return b'(' + b''.join(items) + b'd'


def write_torch_zip(path, tree, storages, **members):
  with zipfile.ZipFile(path, 'w') as file:
    file.writestr('archive/data.pkl', pickled(tree) + b'.')
    for key, values in storages.items():
      file.writestr(f'archive/data/{key}', np.asarray(values).tobytes())
    for name, content in members.items():
      file.writestr(f'archive/{name}', content)


def write_torch(path, state):
  """A state dict of arrays, each with a storage of its own."""
  tree, storages = {}, {}
  for i, (name, x) in enumerate(state.items()):
    strides = [s // x.itemsize for s in np.ascontiguousarray(x).strides]
    tree[name] = pickled_tensor(
      str(i), str(x.dtype), x.size, 0, x.shape, strides
    )
    storages[str(i)] = x
  write_torch_zip(path, tree, storages)


def timm_state(depth=2, width=8, mlp_dim=12, patch=2, grid=2, classes=5):
  """A ViT of tiny width under timm's names."""
  rng = np.random.default_rng(0)

  def draw(*shape):
    return rng.normal(scale=0.5, size=shape).astype(np.float32)

  state = {
    'cls_token': draw(1, 1, width),
    'pos_embed': draw(1, grid * grid + 1, width),
    'patch_embed.proj.weight': draw(width, 3, patch, patch),
    'patch_embed.proj.bias': draw(width),
  }
  for i in range(depth):
    for name, shape in {
      'norm1': (width,),
      'attn.qkv': (3 * width, width),
      'attn.proj': (width, width),
      'norm2': (width,),
      'mlp.fc1': (mlp_dim, width),
      'mlp.fc2': (width, mlp_dim),
    }.items():
      state[f'blocks.{i}.{name}.weight'] = draw(*shape)
      state[f'blocks.{i}.{name}.bias'] = draw(shape[0])
  for name, shape in {'norm': (width,), 'head': (classes, width)}.items():
    state[f'{name}.weight'] = draw(*shape)
    state[f'{name}.bias'] = draw(shape[0])
  return state

"""Checkpoints: formats, layouts, refusals, and the memory of loading."""

import math
import pathlib
import re
import subprocess
import sys
import zipfile

import checkpoints
from flax import serialization
import jax
import ml_dtypes
import numpy as np
import pytest

from utilized_rank.models import stacking
from utilized_rank.models.gpt import GPT
from utilized_rank.models.importing import load_checkpoint
from utilized_rank.models.importing.files import formats
from utilized_rank.models.kwt import KeywordTransformer
from utilized_rank.models.llama import Llama
from utilized_rank.models.resnet import ResNet
from utilized_rank.models.vgg import VGG
from utilized_rank.models.vit import ViT
from utilized_rank.tree import paths

pytestmark = pytest.mark.slow

STATE = checkpoints.timm_state()


def layer_norm(x, state, name):
  x = x - x.mean(-1, keepdims=True)
  x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
  return x * state[f'{name}.weight'] + state[f'{name}.bias']


def timm_forward(state, images, heads):
  """A ViT by timm's names in float64; images (B, H, W, C)."""
  state = {k: v.astype(np.float64) for k, v in state.items()}

  def dense(x, name):
    return x @ state[f'{name}.weight'].T + state[f'{name}.bias']

  kernel = state['patch_embed.proj.weight']
  width, _, p, _ = kernel.shape
  b, h, w, c = images.shape
  patches = images.reshape(b, h // p, p, w // p, p, c)
  x = np.einsum('bipjqc,dcpq->bijd', patches, kernel).reshape(b, -1, width)
  x = x + state['patch_embed.proj.bias']
  cls = np.broadcast_to(state['cls_token'], (b, 1, width))
  x = np.concatenate([cls, x], axis=1) + state['pos_embed']
  for i in range(2):
    y = dense(layer_norm(x, state, f'blocks.{i}.norm1'), f'blocks.{i}.attn.qkv')
    q, k, v = np.moveaxis(y.reshape(b, -1, 3, heads, width // heads), 2, 0)
    weights = np.exp(
      np.einsum('bqhd,bkhd->bhqk', q, k) * (heads / width) ** 0.5
    )
    weights /= weights.sum(-1, keepdims=True)
    y = np.einsum('bhqk,bkhd->bqhd', weights, v).reshape(b, -1, width)
    x = x + dense(y, f'blocks.{i}.attn.proj')
    y = dense(layer_norm(x, state, f'blocks.{i}.norm2'), f'blocks.{i}.mlp.fc1')
    y = y * (1 + np.vectorize(math.erf)(y / 2**0.5)) / 2
    x = x + dense(y, f'blocks.{i}.mlp.fc2')
  return dense(layer_norm(x, state, 'norm')[:, 0], 'head')


@pytest.fixture(scope='module')
def loaded(tmp_path_factory):
  path = tmp_path_factory.mktemp('timm') / 'file'
  checkpoints.write_torch(path, STATE)
  return load_checkpoint(str(path), heads=2, assume=True)


def test_a_torch_file_computes_what_its_names_say(loaded):
  model, variables, imported = loaded
  images = np.random.default_rng(1).normal(size=(3, *imported.input.shape[1:]))
  actual = jax.jit(model.apply)(variables, images.astype(np.float32))
  expected = timm_forward(STATE, images, heads=2)
  # Float32 against float64 in two blocks.
  np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def assert_same(actual, expected):
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_every_format_gives_the_same(loaded, tmp_path):
  model, variables, _ = loaded
  np.savez_compressed(tmp_path / 'a', **STATE)
  (tmp_path / 'b').write_bytes(serialization.msgpack_serialize(STATE))
  for name in ('a.npz', 'b'):
    again, tree, _ = load_checkpoint(str(tmp_path / name), heads=2, assume=True)
    assert again == model
    assert_same(tree, variables)


def test_safetensors_too(loaded, tmp_path):
  numpy = pytest.importorskip('safetensors.numpy')
  numpy.save_file(STATE, tmp_path / 'c')
  _, tree, _ = load_checkpoint(str(tmp_path / 'c'), heads=2, assume=True)
  assert_same(tree, loaded[1])


def test_half_precision_is_read(tmp_path):
  x = np.arange(6, dtype=np.float32)
  np.savez(tmp_path / 'a', x=x.astype(ml_dtypes.bfloat16))
  checkpoints.write_torch(tmp_path / 'b', {'x': x.astype(ml_dtypes.bfloat16)})
  checkpoints.write_torch(tmp_path / 'c', {'x': x.astype(np.float16)})
  for name in ('a.npz', 'b', 'c'):
    values = formats.read_tensors(str(tmp_path / name))[0]['x'].read()
    assert values.dtype.itemsize == 2
    np.testing.assert_array_equal(values.astype(np.float32), x)


def test_torch_views_of_one_storage(tmp_path):
  flat = np.arange(24, dtype=np.float32)
  tensor = checkpoints.pickled_tensor
  tree = {
    'transposed': tensor('0', 'float32', 24, 2, (3, 4), (1, 3)),
    'expanded': tensor('0', 'float32', 24, 5, (2, 3), (0, 1)),
    'empty': tensor('0', 'float32', 24, 0, (0, 3), (3, 1)),
    'nested': {'number': b'I7\n', 'list': b'(I1\nI2\nl'},
  }
  checkpoints.write_torch_zip(tmp_path / 'a', tree, {'0': flat})
  tensors, others = formats.read_tensors(str(tmp_path / 'a'))
  expected = flat[2:14].reshape(4, 3).T
  np.testing.assert_array_equal(tensors['transposed'].read(), expected)
  np.testing.assert_array_equal(tensors['expanded'].read(), [flat[5:8]] * 2)
  assert tensors['empty'].read().shape == (0, 3)
  assert others == {
    'nested.number': 7,
    'nested.list.0': 1,
    'nested.list.1': 2,
  }


def test_a_pickle_that_calls_is_refused_and_not_run(tmp_path):
  trap = tmp_path / 'trap'
  call = (
    b'cpathlib\nPath.touch\n(cpathlib\nPath\n(V%s\ntRtR' % str(trap).encode()
  )
  checkpoints.write_torch_zip(tmp_path / 'a', {'w': call}, {})
  with pytest.raises(ValueError, match='asks for pathlib.Path.touch'):
    load_checkpoint(str(tmp_path / 'a'))
  assert not trap.exists()


TENSOR = checkpoints.pickled_tensor('0', 'float32', 4, 0, (4,), (1,))
STORE = {'0': np.zeros(4, np.float32)}


@pytest.mark.parametrize(
  ('tree', 'members', 'message'),
  [
    ({'w': TENSOR}, {'constants.pkl': b''}, 'TorchScript'),
    ({'w': TENSOR}, {'byteorder': b'big'}, 'big-endian'),
    ({'w': TENSOR.replace(b'Vstorage', b'Vmodule')}, {}, 'refers to'),
    (
      {'w': checkpoints.pickled_tensor('0', 'float32', 99, 1, (4,), (1,))},
      {},
      'does not fit into its storage of 4',
    ),
  ],
)
def test_torch_files_that_are_refused(tree, members, message, tmp_path):
  checkpoints.write_torch_zip(tmp_path / 'a', tree, STORE, **members)
  with pytest.raises(ValueError, match=message):
    formats.read_tensors(str(tmp_path / 'a'))


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    (b'\x80\x02}q\x00.', 'bare pickle'),
    (b'\x80\x02}q\x00', 'no complete pickle'),
    (b'PK\x03\x04rest', 'it is truncated'),
    (b'hello', 'begins with'),
    (b'', 'begins with'),
    (b'\x82\xa1a', 'no complete msgpack'),
  ],
)
def test_files_that_are_no_checkpoints(content, message, tmp_path):
  (tmp_path / 'a').write_bytes(content)
  with pytest.raises(ValueError, match=message):
    formats.read_tensors(str(tmp_path / 'a'))


def test_other_zip_files_are_refused(tmp_path):
  with zipfile.ZipFile(tmp_path / 'a', 'w') as file:
    file.writestr('readme', 'text')
  with pytest.raises(ValueError, match='neither numpy nor torch'):
    formats.read_tensors(str(tmp_path / 'a'))


def save(tmp_path, state):
  np.savez(tmp_path / 'w.npz', **state)
  return str(tmp_path / 'w.npz')


@pytest.mark.parametrize(
  ('state', 'options', 'error', 'message'),
  [
    ({'a.b': np.ones(2)}, {}, ValueError, r'no known layout.*Found a.b \(2,\)'),
    (STATE, {}, ValueError, 'no convention for width 8; give heads='),
    (STATE | {'neck.weight': np.ones(3)}, {}, ValueError, 'neck.weight'),
    (
      {k: v for k, v in STATE.items() if k != 'blocks.1.norm2.bias'},
      {'heads': 2},
      ValueError,
      'Missing: .*encoderblock_1/LayerNorm_2/bias',
    ),
    (
      {k: v for k, v in STATE.items() if k != 'pos_embed'},
      {'heads': 2},
      ValueError,
      'nothing in it is .*pos_embedding',
    ),
    (
      STATE | {'pos_embed': np.ones((1, 8, 8))},
      {'heads': 2},
      ValueError,
      'no square grid',
    ),
    (
      STATE | {'blocks.1.mlp.fc1.bias': np.ones(7)},
      {'heads': 2},
      ValueError,
      r'fc1.bias gives .* the shape \(7,\); it should be \(12,\)',
    ),
    (
      {k: v for k, v in STATE.items() if not k.startswith('blocks.0')},
      {'heads': 2},
      ValueError,
      'nothing in it is',
    ),
    (
      STATE | {k.replace('.1.', '.3.'): v for k, v in STATE.items()},
      {'heads': 2},
      ValueError,
      'have a gap',
    ),
    (
      STATE
      | {'reg_token': np.ones((1, 2, 8))}
      | {'register_tokens': np.ones((1, 2, 8))},
      {'heads': 2},
      ValueError,
      'are both params/registers',
    ),
    (STATE, {'heads': 2, 'head': 2}, TypeError, r"no options \['head'\]"),
    (STATE, {'heads': 2, 'image_size': 7}, ValueError, 'no multiple'),
    (
      {'Dense_0/kernel': np.ones((4, 3)), 'Dense_0/bias': np.ones(3)},
      {'image_size': 8},
      TypeError,
      'no position',
    ),
  ],
)
def test_what_is_refused(state, options, error, message, tmp_path):
  with pytest.raises(error, match=message):
    load_checkpoint(save(tmp_path, state), **{'assume': True} | options)


def test_ignored_tensors_are_named(loaded, tmp_path):
  more = {'neck.weight': np.ones(3), 'mask_token': np.ones(3)}
  _, tree, imported = load_checkpoint(
    save(tmp_path, STATE | more), heads=2, ignore=('neck.*',), assume=True
  )
  assert set(imported.ignored) == set(more)
  assert_same(tree, loaded[1])


def test_assumptions_are_named(loaded, tmp_path):
  wide = checkpoints.timm_state(depth=1, width=192)
  pre = {f'norm_pre.{k}': np.ones(192) for k in ('weight', 'bias')}
  model, _, imported = load_checkpoint(save(tmp_path, wide | pre), assume=True)
  assert imported.assumed == {
    'activation': 'gelu',
    'epsilon': 1e-5,
    'pool': None,
    'norm_order': 'before',
    'rotation': None,
    'heads': 3,
  }
  assert (model.heads, model.epsilon, model.pre_norm) == (3, 1e-5, True)
  assert 'heads' not in loaded[2].assumed


def test_positions_are_resized_on_loading(tmp_path):
  path = save(tmp_path, STATE)
  model, tree, imported = load_checkpoint(
    path, heads=2, image_size=6, assume=True
  )
  table = tree['params']['Transformer']['posembed_input']['pos_embedding']
  assert table.shape == (1, 10, 8)
  np.testing.assert_array_equal(table[:, :1], STATE['pos_embed'][:, :1])
  assert jax.eval_shape(model.apply, tree, imported.input).shape == (1, 5)


def variables_of(model, *shape, dtype=np.float32):
  """Random variables of a model as numpy arrays."""
  abstract = jax.eval_shape(
    model.init, jax.random.key(0), jax.ShapeDtypeStruct(shape, dtype)
  )
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda s: rng.uniform(0.5, 1, s.shape).astype(np.float32), abstract
  )


def test_augreg_and_big_vision(tmp_path):
  model = ViT(
    5, patch_size=2, width=8, depth=3, heads=2, mlp_dim=12, pool='gap'
  )
  variables = variables_of(model, 1, 4, 4, 3)
  augreg, _ = paths.flatten(variables['params'])
  scanned, _ = paths.flatten(stacking.stack_blocks(variables))
  renamed = {
    k.replace('Attention_1', 'Attention_0')
    .replace('MlpBlock_3', 'MlpBlock_0')
    .replace('LayerNorm_2', 'LayerNorm_1')
    .replace('Transformer/posembed_input/', ''): v
    for k, v in scanned.items()
  }
  for state in (augreg, renamed | {'opt/count': np.ones(())}):
    again, tree, imported = load_checkpoint(save(tmp_path, state))
    assert_same(tree, variables)
    assert imported.input.shape == (1, 4, 4, 3)
    assert (again.heads, again.depth, again.pool) == (2, 3, 'gap')


def torch_names(variables, rename):
  """Inverse of the torch conventions, by name of leaf."""
  leaves = {'scale': 'weight', 'kernel': 'weight', 'mean': 'running_mean'}
  state = {}
  for path, x in paths.flatten(variables)[0].items():
    *parts, leaf = path.split('/')[1:]
    if leaf == 'kernel':
      x = x.transpose(3, 2, 0, 1) if x.ndim == 4 else x.T
    leaf = leaves.get(leaf, 'running_var' if leaf == 'var' else leaf)
    state[f'{rename(".".join(parts))}.{leaf}'] = x
  return state


@pytest.mark.parametrize(
  'options',
  [
    {'stages': (1, 2), 'width': 4},
    {'stages': (1, 1), 'width': 4, 'bottleneck': True},
    {'stages': (1, 2), 'width': 4, 'small_images': True, 'shortcut': 'pad'},
  ],
  ids=str,
)
def test_resnets(options, tmp_path):
  model = ResNet(5, **options)
  variables = variables_of(model, 1, 32, 32, 3)

  def rename(name):
    name = name.replace('_', '.', 1) if name.startswith('layer') else name
    for ours, theirs in {
      'conv_shortcut': 'downsample.0',
      'bn_shortcut': 'downsample.1',
      'head': 'fc',
    }.items():
      name = name.replace(ours, theirs)
    return name

  state = torch_names(variables, rename)
  state['bn1.num_batches_tracked'] = np.ones(())
  again, tree, imported = load_checkpoint(
    save(tmp_path, state), architecture='resnet18'
  )
  assert again == model
  assert imported.ignored == ('bn1.num_batches_tracked',)
  assert_same(tree, variables)


@pytest.mark.parametrize('batch_norm', [False, True])
def test_vgg(batch_norm, tmp_path):
  model = VGG(
    5,
    stages=((2,), (3, 3)),
    hidden=(6,),
    pool_size=2,
    batch_norm=batch_norm,
  )
  variables = variables_of(model, 1, 8, 8, 3)
  # Sequentials: convolution, norm, relu, with a pooling between the stages.
  step = 3 if batch_norm else 2
  at = [0, step + 1, 2 * step + 1]
  names = {'fc0': 'classifier.0', 'head': 'classifier.3'}
  for i, place in enumerate(at):
    names |= {
      f'conv{i}': f'features.{place}',
      f'bn{i}': f'features.{place + 1}',
    }
  state = torch_names(variables, names.get)
  # Channels before rows and columns, where the images are flattened.
  rows = variables['params']['fc0']['kernel'].reshape(2, 2, 3, 6)
  state['classifier.0.weight'] = rows.transpose(3, 2, 0, 1).reshape(6, 12)
  again, tree, imported = load_checkpoint(save(tmp_path, state))
  assert again == model
  assert imported.input.shape == (1, 8, 8, 3)
  assert_same(tree, variables)


def test_stacked_llama(tmp_path):
  model = Llama(
    7, 8, 2, heads=2, kv_heads=1, mlp_dim=6, head_dim=4, interleaved=True
  )
  variables = variables_of(model, 1, 3, dtype=np.int32)
  params = variables['params']
  blocks = [params[f'block_{i}'] for i in range(2)]

  def stack(*keys):
    found = []
    for block in blocks:
      for key in keys:
        block = block[key]
      found.append(block)
    return np.stack(found)

  def kernels(*keys):
    x = stack(*keys, 'kernel')
    x = x.reshape(2, 8, -1) if keys[-1] != 'out' else x.reshape(2, -1, 8)
    return x.transpose(0, 2, 1)

  state = {
    'tok_emb': params['embedding']['embedding'],
    'final_norm': params['norm']['scale'],
    'att_norm': stack('attention_norm', 'scale'),
    'ffn_norm': stack('mlp_norm', 'scale'),
    'wq': kernels('query'),
    'wk': kernels('key'),
    'wv': kernels('value'),
    'wo': kernels('out'),
    'w1': kernels('mlp', 'gate'),
    'w2': stack('mlp', 'down', 'kernel').transpose(0, 2, 1),
    'w3': kernels('mlp', 'up'),
  }
  again, tree, _ = load_checkpoint(save(tmp_path, state), heads=2, assume=True)
  assert again == model
  assert_same(tree, variables)


def renamed(variables, *pairs):
  """Names of ours with regular expressions replaced; numpy conventions."""
  state = {}
  for name, x in paths.flatten(variables)[0].items():
    for pattern, by in pairs:
      name = re.sub(pattern, by, name)
    state[name] = x
  return state


def test_flax_resnet(tmp_path):
  model = ResNet(
    5,
    stages=(2, 1),
    width=4,
    small_images=True,
    shortcut='conv',
    padding='SAME',
  )
  variables = variables_of(model, 1, 32, 32, 3)
  state = renamed(
    variables,
    ('head', 'Dense_0'),
    ('_shortcut', '3'),
    (r'(conv|bn)(\d)', lambda m: f'{m[1]}_{int(m[2]) - 1}'),
    ('bn', 'BatchNorm'),
    ('conv', 'Conv'),
    (
      r'layer(\d)_(\d)',
      lambda m: f'ResNetBlock_{2 * int(m[1]) - 2 + int(m[2])}',
    ),
  )
  again, tree, _ = load_checkpoint(save(tmp_path, state), activation='relu')
  assert again == model
  assert_same(tree, variables)


def test_keyword_transformer(tmp_path):
  model = KeywordTransformer(5, width=64, depth=2, heads=1, mlp_dim=12)
  variables = variables_of(model, 1, 6, 4)
  state = renamed(
    variables,
    ('params/', ''),
    ('Transformer/posembed_input/pos_embedding', 'pos_emb'),
    ('Transformer/encoderblock_', 'block'),
    ('^cls', 'class_emb'),
    ('embedding', 'embed'),
    ('MultiHeadDotProductAttention_1', 'attn'),
    ('(q)uery|(k)ey|(v)alue', r'\1\2\3'),
    ('MlpBlock_3/Dense_0', 'mlp/fc1'),
    ('MlpBlock_3/Dense_1', 'mlp/fc2'),
    ('LayerNorm_0', 'ln1'),
    ('LayerNorm_2', 'ln2'),
  )
  again, tree, imported = load_checkpoint(save(tmp_path, state), heads=1)
  assert again == model
  assert imported.input.shape == (1, 6, 4)
  assert_same(tree, variables)


def test_min_gpt(tmp_path):
  model = GPT(5, context=6, width=8, depth=2, heads=2, mlp_dim=32)
  variables = variables_of(model, 1, 6, dtype=np.int32)
  state = {}
  fused = {}
  for name, x in paths.flatten(variables['params'])[0].items():
    name = re.sub(r'block_(\d)/', r'transformer/h/\1/', name)
    for pattern, by in (
      ('MultiHeadDotProductAttention_1/(query|key|value)', r'attn/\1'),
      ('MultiHeadDotProductAttention_1/out', 'attn/c_proj'),
      ('MlpBlock_3/Dense_0', 'mlp/c_fc'),
      ('MlpBlock_3/Dense_1', 'mlp/c_proj'),
      ('LayerNorm_0', 'ln_1'),
      ('LayerNorm_2', 'ln_2'),
      ('^norm', 'transformer/ln_f'),
      ('^embedding/embedding', 'transformer/wte/weight'),
      ('^positions', 'transformer/wpe/weight'),
      ('^head', 'lm_head'),
      ('scale', 'weight'),
    ):
      name = re.sub(pattern, by, name)
    if name.endswith('kernel'):
      x = x.reshape(-1, 8) if 'attn/c_proj' in name else x.reshape(len(x), -1)
      x, name = x.T, name.replace('kernel', 'weight')
    elif name.endswith('bias'):
      x = x.ravel()
    if found := re.search('attn/(query|key|value)', name):
      whole = name.replace(found[0], 'attn/c_attn').replace('/', '.')
      fused.setdefault(whole, {})[found[1]] = x
    else:
      state[name.replace('/', '.')] = x
  for name, three in fused.items():
    state[name] = np.concatenate([three[k] for k in ('query', 'key', 'value')])
  again, tree, _ = load_checkpoint(save(tmp_path, state), heads=2, assume=True)
  assert again == model
  assert_same(tree, variables)


MEASURE = """
import sys
from utilized_rank.models.importing import load_checkpoint
path, options = sys.argv[1], eval(sys.argv[2])
# What is imported and traced once.
load_checkpoint(sys.argv[3], heads=2, assume=True)
def memory(field):  # not ru_maxrss, which a child has from its parent
  for line in open('/proc/self/status'):
    if line.startswith(field):
      return int(line.split()[1]) * 1024
before = memory('VmRSS')
_, variables, _ = load_checkpoint(path, **options)
print(memory('VmHWM') - before)
"""


@pytest.mark.skipif(
  not pathlib.Path('/proc/self/status').exists(), reason='reads /proc'
)
def test_loading_takes_the_memory_of_the_file(tmp_path):
  state = checkpoints.timm_state(depth=2, width=1024, mlp_dim=4096, patch=16)
  size = sum(x.nbytes for x in state.values())
  checkpoints.write_torch(tmp_path / 'small', STATE)
  checkpoints.write_torch(tmp_path / 'large', state)
  arguments = [
    str(tmp_path / 'large'),
    '{"assume": True}',
    str(tmp_path / 'small'),
  ]
  out = subprocess.run(
    [sys.executable, '-W', 'ignore', '-c', MEASURE, *arguments],
    capture_output=True,
    text=True,
    check=True,
    cwd=pathlib.Path(__file__).parents[2],
  )
  # One fused qkv is an eighth of these two blocks, of ViT-L's 24 a hundredth;
  # issue 6 asks for 1.2 there.
  assert int(out.stdout) < 1.3 * size

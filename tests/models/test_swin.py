"""Swin: windows, checkpoints, and what the library sees."""

from image_models import State
from image_models import check_is_halved
from image_models import check_kernels_are_seen
from image_models import images
from image_models import load
from image_models import randomised
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from utilized_rank.models.hierarchies import cosine_attention
from utilized_rank.models.hierarchies import swin

pytestmark = pytest.mark.slow


def tiny(**options):
  sizes = {'width': 4, 'depths': (2, 1), 'heads': (1, 2), 'windows': (2, 2)}
  return swin.Swin(3, **{**sizes, **options})


def test_windows_are_squares_of_neighbours():
  x = np.arange(2 * 4 * 6).reshape(2, 4, 6, 1)
  windows = swin._to_windows(jnp.asarray(x), 2)
  np.testing.assert_array_equal(windows[1, :, 0], [2, 3, 8, 9])
  np.testing.assert_array_equal(swin._from_windows(windows, 2, 4, 6), x)


def test_a_shifted_window_sees_what_was_beside_it():
  """Two patches see each other if they are one window without the wrap."""
  n, window, shift = 6, 3, 1
  seen = swin._seen(n, n, window, shift)
  at = np.roll(np.indices((n, n)), (-shift, -shift), (1, 2))
  at = [np.asarray(swin._to_windows(jnp.asarray(x)[None, ..., None], window))
        for x in at]  # fmt: skip
  for i in range(len(seen)):
    r, c = (x[i, :, 0] for x in at)
    near = lambda x: abs(x[:, None] - x[None]) < window
    np.testing.assert_array_equal(seen[i, 0], near(r) & near(c))


def changes(model, variables, x, row, column):
  """Which patches of a block's output move with one of its input."""
  run = jax.jit(model.apply)
  other = x.copy()
  other[:, row, column, 0] += 1  # a norm takes off what all have
  moved = abs(run(variables, other) - run(variables, x)).max((0, 3)) > 1e-6
  return {tuple(map(int, at)) for at in np.argwhere(moved)}


def block(shifted, window=2, covering=False):
  options = swin.BlockOptions(
    heads=1,
    mlp_dim=6,
    relative_positions=True,
    relative_tokens=False,
    grid=(window, window),
  )
  return swin.SwinBlock(options, shifted, covering=covering)


@pytest.mark.parametrize(
  ('shifted', 'side', 'expected'),
  [
    (False, 4, {(0, 0), (0, 1), (1, 0), (1, 1)}),
    # The corner is alone: beside it is only what was wrapped.
    (True, 4, {(0, 0)}),
    # A window that covers everything is not shifted.
    (True, 2, {(0, 0), (0, 1), (1, 0), (1, 1)}),
  ],
)
def test_where_attention_reaches(shifted, side, expected, covering=False):
  x = np.random.default_rng(0).normal(size=(1, side, side, 4))
  x = x.astype(np.float32)
  model = block(shifted, covering=covering)
  assert changes(model, randomised(model, x), x, 0, 0) == expected


def test_where_it_reaches_in_a_covering_window_that_is_shifted():
  test_where_attention_reaches(True, 2, {(0, 0)}, covering=True)


@pytest.mark.parametrize(
  ('options', 'side', 'message'),
  [
    ({}, (18, 16), 'do not divide into patches of 4'),
    ({'windows': (3, 2)}, (16, 16), '3 x 3 patches in an image of 4 x 4'),
    ({'windows': (2, 4)}, (16, 16), '4 x 4 patches in an image of 2 x 2'),
    ({}, (8, 16), '2 x 2 patches in an image of 2 x 4'),
    ({'heads': (1,)}, (16, 16), "'heads': 1.*one of each for a resolution"),
    ({'shifted': (True,)}, (16, 16), "'shifted': 1.*of each for a resolution"),
    ({'version': 3}, (16, 16), 'version=3; it is 1 or 2'),
    (
      {'version': 2, 'trained_windows': (2,)},
      (16, 16),
      "'trained_windows': 1.*one of each for a resolution",
    ),
  ],
)
def test_refusals(options, side, message):
  x = jax.ShapeDtypeStruct((1, *side, 3), jnp.float32)
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(tiny(**options).init, jax.random.key(0), x)


def test_the_library_sees_every_kernel():
  check_kernels_are_seen(tiny(), images())


def test_compress_halves_it():
  check_is_halved(
    tiny(depths=(1, 1)),
    'params/stage0_0/mlp/Dense_0/kernel',
    # Fewer candidates than by default: each is compiled.
    heads=False,
    layers=False,
    anchored=False,
    refine=0,
  )


SECOND = {'version': 2, 'position_dim': 8}


def test_the_library_sees_every_kernel_of_the_second_version():
  """The networks' of positions, too, whose inputs are no data."""
  check_kernels_are_seen(tiny(**SECOND), images())


def test_compress_halves_the_second_version():
  check_is_halved(
    tiny(**SECOND, depths=(1, 1)),
    'params/stage0_0/attention/query/kernel',
    heads=False,
    layers=False,
    anchored=False,
    refine=0,
  )


def test_cosine_attention_is_what_the_paper_says():
  """Against the formula, patch by patch, in float64."""
  options = swin.BlockOptions(heads=2, mlp_dim=6, key_bias=False, grid=(2, 2))
  cosine = cosine_attention.CosineOptions(trained_window=4, position_dim=5)
  model = cosine_attention.CosineAttention(options, cosine)
  x = np.random.default_rng(0).normal(size=(3, 4, 6)).astype(np.float32)
  seen = np.ones((3, 1, 4, 4), bool)
  seen[1, 0, 2, :2] = False
  variables = randomised(model, x)
  p = variables['params']
  # One head is above what scales are clamped at.
  p['logit_scale'] = np.array([5.0, 1.0], np.float32)
  actual = np.asarray(jax.jit(model.apply)(variables, x, seen))
  p = jax.tree.map(lambda v: np.asarray(v, np.float64), p)
  q, k, v = (
    np.einsum('bnd,dhe->bhne', x, p[name]['kernel'])
    + p[name].get('bias', np.zeros((2, 3)))[:, None]
    for name in ('query', 'key', 'value')
  )
  assert 'bias' not in p['key']
  scores = np.zeros((3, 2, 4, 4))
  for i, j in np.ndindex(4, 4):
    away = np.array([i // 2 - j // 2, i % 2 - j % 2]) * 8 / 3
    away = np.sign(away) * np.log2(abs(away) + 1) / 3
    hidden = away @ p['positions']['hidden']['kernel']
    hidden = np.maximum(hidden + p['positions']['hidden']['bias'], 0)
    added = 16 / (1 + np.exp(-hidden @ p['positions']['out']['kernel']))
    norms = np.linalg.norm(q[:, :, i], axis=-1)
    norms = norms * np.linalg.norm(k[:, :, j], axis=-1)
    cosines = (q[:, :, i] * k[:, :, j]).sum(-1) / norms
    scores[:, :, i, j] = cosines * [100.0, np.e] + added
  scores -= 100.0 * ~seen
  weights = np.exp(scores - scores.max(-1, keepdims=True))
  weights /= weights.sum(-1, keepdims=True)
  y = np.einsum('bhij,bhje->bihe', weights, v)
  expected = np.einsum('bihe,hed->bid', y, p['out']['kernel'])
  expected += p['out']['bias']
  # Scores of a hundred have six digits of which some are after the point.
  np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


def timm_state(window=2):
  """A Swin of tiny width under timm's names."""
  state = State()
  layer = state.layer
  layer('patch_embed.proj', 4, 3, 4, 4)
  layer('patch_embed.norm', 4)
  layer('layers.1.downsample.norm', 16)
  state.draw('layers.1.downsample.reduction.weight', 8, 16)
  for i, width in enumerate((4, 8)):
    name = f'layers.{i}.blocks.0.'
    table = f'{name}attn.relative_position_bias_table'
    state.draw(table, (2 * window - 1) ** 2, 2)
    state.draw(f'{name}attn.relative_position_index', 4, 4)
    layer(f'{name}attn.qkv', 3 * width, width)
    layer(f'{name}attn.proj', width, width)
    layer(f'{name}mlp.fc1', 3 * width, width)
    layer(f'{name}mlp.fc2', width, 3 * width)
    layer(f'{name}norm1', width)
    layer(f'{name}norm2', width)
  layer('norm', 8)
  layer('head.fc', 5, 8)
  return state


NAME = 'swin_tiny_patch4_window7_224'


def test_the_tables_say_windows_and_heads(tmp_path):
  state = timm_state(window=3)
  model, variables, imported = load(tmp_path, state, architecture=NAME)
  assert imported.layout == 'Swin of timm or Microsoft'
  assert model.windows == (3, 3) and model.heads == (2, 2)
  assert imported.input.shape == (1, 24, 24, 3)
  kernel = variables['params']['stage0_0']['attention']['key']['kernel']
  expected = state['layers.0.blocks.0.attn.qkv.weight'][4:8].T
  np.testing.assert_array_equal(kernel.reshape(4, 4), expected)


def test_what_nothing_says_is_refused_by_name(tmp_path):
  state = timm_state()
  with pytest.raises(ValueError, match='Give activation= .* epsilon= '):
    load(tmp_path, state)
  with pytest.raises(ValueError, match="pool='token'; the mean of all pixels"):
    load(tmp_path, state, architecture=NAME, pool='token')
  table = 'layers.0.blocks.0.attn.relative_position_bias_table'
  state[table] = state[table][:8]
  with pytest.raises(ValueError, match='8 relative positions is of no square'):
    load(tmp_path, state, architecture=NAME)
  config = {'model_type': 'swin', 'use_absolute_embeddings': True}
  with pytest.raises(ValueError, match='use_absolute_embeddings True'):
    load(tmp_path, state, config=config)


def timm_2_state():
  """The second version under timm's names, its networks 7 wide."""
  state = timm_state()
  for name in [x for x in state if 'relative' in x or x.endswith('qkv.bias')]:
    del state[name]
  state.layer('layers.1.downsample.norm', 8)
  for i, width in enumerate((4, 8)):
    name = f'layers.{i}.blocks.0.attn.'
    state.draw(f'{name}logit_scale', 2, 1, 1)
    state.draw(f'{name}q_bias', width)
    state.draw(f'{name}v_bias', width)
    state.layer(f'{name}cpb_mlp.0', 7, 2)
    state.draw(f'{name}cpb_mlp.2.weight', 2, 7)
    state.draw(f'{name}relative_coords_table', 1, 3, 3, 2)
  return state


def test_windows_of_the_second_version_are_what_the_caller_says(tmp_path):
  state = timm_2_state()
  with pytest.raises(ValueError, match='Give .*windows= .*trained_windows= '):
    load(tmp_path, state)
  options = {'windows': (4, 2), 'activation': 'gelu', 'epsilon': 1e-5}
  model, variables, imported = load(
    tmp_path, state, trained_windows=(3, 0), **options
  )
  assert imported.layout == 'Swin V2 of timm or Microsoft'
  assert imported.assumed == {} and imported.input.shape == (1, 16, 16, 3)
  assert (model.version, model.heads, model.position_dim) == (2, (2, 2), 7)
  attention = variables['params']['stage0_0']['attention']
  name = 'layers.0.blocks.0.attn.'
  expected = {
    ('key', 'kernel'): state[f'{name}qkv.weight'][4:8].T,
    ('query', 'bias'): state[f'{name}q_bias'],
    ('value', 'bias'): state[f'{name}v_bias'],
    ('positions', 'out'): state[f'{name}cpb_mlp.2.weight'].T,
  }
  for (layer, leaf), values in expected.items():
    found = attention[layer][leaf]
    found = found['kernel'] if leaf == 'out' else found
    np.testing.assert_array_equal(found.reshape(values.shape), values)
  run = jax.jit(model.apply)
  x = images(2, 16)
  assert run(variables, x).shape == (2, 5)
  other = model.clone(trained_windows=None)
  assert abs(jax.jit(other.apply)(variables, x) - run(variables, x)).max() > 0


def test_the_name_or_the_config_says_the_windows(tmp_path):
  state = timm_2_state()
  name = 'swinv2_base_window12to16_192to256'
  with pytest.raises(ValueError, match="'windows': 4, .*of each for a resol"):
    load(tmp_path, state, architecture=name)
  config = {
    'model_type': 'swinv2',
    'image_size': 24,
    'depths': [1, 1],
    'window_size': 6,
    'pretrained_window_sizes': [4, 2],
  }
  hf = {
    'patch_embed': 'embeddings.patch_embeddings',
    'patch_embeddings.proj': 'patch_embeddings.projection',
    'patch_embeddings.norm': 'norm',
    'layers.': 'encoder.layers.',
    'attn.proj': 'attention.output.dense',
    'attn.': 'attention.self.',
    'cpb_mlp': 'continuous_position_bias_mlp',
    'mlp.fc1': 'intermediate.dense',
    'mlp.fc2': 'output.dense',
    'norm1': 'layernorm_before',
    'norm2': 'layernorm_after',
    'head.fc': 'classifier',
  }
  found = {}
  for old, values in state.items():
    new = 'layernorm.' + old[5:] if old.startswith('norm.') else old
    for theirs, ours in hf.items():
      new = new.replace(theirs, ours)
    new = new.replace('self.q_bias', 'self.query.bias')
    new = new.replace('self.v_bias', 'self.value.bias')
    if 'qkv' in new:
      parts = zip(('query', 'key', 'value'), np.split(values, 3), strict=True)
      found |= {new.replace('qkv', part): x for part, x in parts}
    else:
      found[new] = values
  model, _, imported = load(tmp_path, found, config=config)
  assert imported.layout == 'Swin V2 of Hugging Face'
  # Six patches, then three: no window is larger than the image.
  assert (model.windows, model.trained_windows) == ((6, 3), (4, 2))
  assert model.shifted == (False, False)
  assert model.masked == -200.0 and imported.input.shape == (1, 24, 24, 3)

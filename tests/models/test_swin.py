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


def block(shifted, window=2):
  options = swin.BlockOptions(
    heads=1,
    mlp_dim=6,
    relative_positions=True,
    relative_tokens=False,
    grid=(window, window),
  )
  return swin.SwinBlock(options, shifted)


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
def test_where_attention_reaches(shifted, side, expected):
  x = np.random.default_rng(0).normal(size=(1, side, side, 4))
  x = x.astype(np.float32)
  model = block(shifted)
  assert changes(model, randomised(model, x), x, 0, 0) == expected


@pytest.mark.parametrize(
  ('options', 'side', 'message'),
  [
    ({}, (18, 16), 'do not divide into patches of 4'),
    ({'windows': (3, 2)}, (16, 16), '3 x 3 patches in an image of 4 x 4'),
    ({'windows': (2, 4)}, (16, 16), '4 x 4 patches in an image of 2 x 2'),
    ({}, (8, 16), '2 x 2 patches in an image of 2 x 4'),
    ({'heads': (1,)}, (16, 16), "'heads': 1.*one of each for a resolution"),
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

"""ConvNeXt: its options, checkpoints' facts, and what the library sees."""

from image_models import State
from image_models import check_is_halved
from image_models import check_kernels_are_seen
from image_models import images
from image_models import load
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from utilized_rank.models.hierarchies.convnext import ConvNeXt
from utilized_rank.models.hierarchies.convnext import ResponseNorm
from utilized_rank.tree import paths

pytestmark = pytest.mark.slow

V2 = {'response_norm': True, 'layer_scale': None}


def tiny(**options):
  sizes = {'depths': (1, 2), 'widths': (4, 8), 'kernel_sizes': (5, 3)}
  return ConvNeXt(3, **{**sizes, **options})


def test_the_response_norm_is_that_of_the_paper():
  x = np.random.default_rng(0).normal(size=(2, 3, 5, 4))
  scale, bias = np.arange(1.0, 5), np.arange(4.0)
  size = np.sqrt((x**2).sum((1, 2), keepdims=True))
  expected = x + scale * x * size / (size.mean(-1, keepdims=True) + 1e-6) + bias
  params = {'params': {'scale': scale, 'bias': bias}}
  run = jax.jit(ResponseNorm().apply)
  # Single precision.
  np.testing.assert_allclose(run(params, x), expected, rtol=1e-5, atol=1e-6)
  slope = jax.jit(jax.grad(lambda x: run(params, x).sum()))(jnp.zeros(x.shape))
  assert np.isfinite(slope).all()


@pytest.mark.parametrize(
  'options',
  [
    {'stem': 'overlap', 'stem_width': 2, 'norm': 'rms'},
    {'stem': 'overlap_act', 'activation': 'silu'},
    {'norm_after_pool': False, 'num_classes': 0},
    {'representation_size': 5, 'conv_bias': False, 'last_epsilon': 1e-12},
  ],
  ids=str,
)
def test_options_have_the_leaves_that_they_say(options):
  model = tiny().clone(**options)
  x = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)
  out, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), x)
  assert out.shape == (2, options.get('num_classes', 3) or 8)
  found, _ = paths.flatten(variables['params'])
  rms, last = options.get('norm') == 'rms', options.get('norm_after_pool', True)
  assert ('stem_norm/bias' in found) != rms
  assert ('fc_norm/scale' in found) == last != ('norm/scale' in found)
  assert ('stem2/kernel' in found) == ('stem' in options)
  assert ('stem/bias' in found) == options.get('conv_bias', True)
  assert ('pre_logits/kernel' in found) == ('representation_size' in options)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'stem': 'conv'}, "stem='conv'; it is one of"),
    ({'norm': 'simple'}, "norm='simple'; it is one of"),
    ({'activation': 'mish'}, "activation='mish'; it is one of"),
    ({'mlp_dims': (8,)}, "'mlp_dims': 1.*one of each for a resolution"),
    ({'kernel_sizes': (7, 7, 7)}, "'kernel_sizes': 3"),
  ],
)
def test_refusals(options, message):
  with pytest.raises(ValueError, match=message):
    tiny(**options).init(jax.random.key(0), images())


@pytest.mark.parametrize('options', [{}, V2], ids=['v1', 'v2'])
def test_the_library_sees_every_kernel(options):
  depthwise = {
    f'params/stage{at}/depthwise/kernel' for at in ('0_0', '1_0', '1_1')
  }
  unseen = check_kernels_are_seen(
    tiny(**options), images(), frozenset(depthwise)
  )
  for path in depthwise:
    assert 'a depthwise convolution' in unseen[path]


def test_compress_halves_it():
  check_is_halved(tiny(), 'params/stage0_0/Dense_0/kernel', refine=2)


def timm_state(act=False, v2=False, norms_first=False):
  """A ConvNeXt of tiny width under timm's names."""
  state = State()
  layer = state.layer
  if act:
    layer('stem.0', 4, 3, 3, 3)
    layer('stem.2', 4, 4, 3, 3)
    layer('stem.3', 4)
  else:
    layer('stem.0', 4, 3, 4, 4)
    layer('stem.1', 4)
  for i, width in enumerate((4, 8)):
    if i:
      layer('stages.1.downsample.0', 4)
      layer('stages.1.downsample.1', 8, 4, 2, 2)
    block = f'stages.{i}.blocks.0.'
    layer(f'{block}conv_dw', width, 1, 7, 7)
    layer(f'{block}norm', width)
    # 1x1 convolutions, as in small models.
    layer(f'{block}mlp.fc1', 3 * width, width, 1, 1)
    layer(f'{block}mlp.fc2', width, 3 * width, 1, 1)
    if v2:
      layer(f'{block}mlp.grn', 3 * width)
    else:
      state.draw(f'{block}gamma', width)
  layer('norm_pre' if norms_first else 'head.norm', 8)
  layer('head.fc', 5, 8)
  return state


@pytest.mark.parametrize(
  'kind', [{}, {'act': True}, {'v2': True}, {'norms_first': True}], ids=str
)
def test_a_file_of_timm_fills_the_model(kind, tmp_path):
  state = timm_state(**kind)
  model, variables, imported = load(
    tmp_path, state, architecture='convnext_tiny'
  )
  assert imported.layout == 'ConvNeXt of timm'
  assert model.depths == (1, 1) and model.mlp_dims == (12, 24)
  assert model.stem == ('overlap_act' if 'act' in kind else 'patch')
  assert model.response_norm == ('v2' in kind) == (model.layer_scale is None)
  assert model.norm_after_pool == ('norms_first' not in kind)
  block = variables['params']['stage0_0']
  name = 'stages.0.blocks.0.'
  np.testing.assert_array_equal(
    block['Dense_0']['kernel'], state[f'{name}mlp.fc1.weight'][:, :, 0, 0].T
  )
  np.testing.assert_array_equal(
    block['depthwise']['kernel'][..., 0, 1],
    state[f'{name}conv_dw.weight'][1, 0],
  )


def test_what_nothing_says_is_refused_by_name(tmp_path):
  with pytest.raises(ValueError, match='norm= .usually .layer., .rms. in conv'):
    load(tmp_path, timm_state(), activation='gelu', epsilon=1e-6)
  with pytest.raises(ValueError, match="pool='max'; the mean of all pixels"):
    load(tmp_path, timm_state(), architecture='convnext_tiny', pool='max')
  with pytest.raises(ValueError, match='convnext_zepto_rms. is no model of'):
    load(tmp_path, timm_state(), architecture='convnext_zepto_rms')
  told = {'architecture': 'convnext_atto_rms'}
  with pytest.raises(ValueError, match='Left over: .*norm/bias'):
    load(tmp_path, timm_state(), **told)

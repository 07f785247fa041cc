"""EfficientNet and its kin: options, checkpoints' facts, what is measured."""

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

from utilized_rank.models.batch_norm import fold_batch_norm
from utilized_rank.models.hierarchies import efficientnet
from utilized_rank.models.hierarchies.efficientnet import EfficientNet
from utilized_rank.models.hierarchies.efficientnet import Parts
from utilized_rank.tree import paths

pytestmark = pytest.mark.slow

SEPARABLE = Parts(depthwise_size=3, project=4)
INVERTED = Parts(expand=24, depthwise_size=3, squeeze=4, project=12)
PLAIN = Parts(expand=6, expand_size=3)


def tiny(**options):
  sizes = {
    'stem_width': 4,
    'stages': ((SEPARABLE,), (INVERTED, INVERTED)),
    'head_width': 48,
    'strides': (1, 2),
  }
  return EfficientNet(3, **{**sizes, **options})


@pytest.mark.parametrize(
  ('name', 'millions'),
  # As they are published.
  [('B0', 5.289), ('B1', 7.794), ('B4', 19.342), ('Lite0', 4.652)],
)
def test_published_sizes(name, millions):
  model = EfficientNet(1000, **efficientnet.VARIANTS[name])
  x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  params = jax.eval_shape(model.init, jax.random.key(0), x)['params']
  count = sum(leaf.size for leaf in jax.tree.leaves(params))
  assert round(count / 1e6, 3) == millions


@pytest.mark.parametrize(
  ('options', 'has', 'has_not'),
  [
    ({'num_classes': 0}, 'conv_head/kernel', 'head/kernel'),
    ({'head_width': None}, 'head/kernel', 'conv_head/kernel'),
    ({'pool_before_head': True}, 'pre_logits/bias', 'conv_head/kernel'),
    (
      {'pool_before_head': True, 'head_bias': False},
      'pre_logits/kernel',
      'pre_logits/bias',
    ),
    ({'stages': ((PLAIN,),), 'strides': (1,)}, 'stage0_0/conv_expand/kernel',
     'stage0_0/conv_project/kernel'),
    ({'batch_norm': False}, 'conv_stem/bias', 'bn_stem/scale'),
  ],
  ids=str,
)  # fmt: skip
def test_options_have_the_leaves_that_they_say(options, has, has_not):
  x = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)
  model = tiny(**options) if 'num_classes' not in options else (
    tiny().clone(**options)
  )  # fmt: skip
  out, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), x)
  assert out.shape == (2, options.get('num_classes', 3) or 48)
  found, _ = paths.flatten(variables['params'])
  assert has in found and has_not not in found


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'activation': 'mish'}, "activation: 'mish' is none of"),
    ({'stage_activations': ('relu', 'elu')}, "stage_activations: 'elu'"),
    ({'squeeze_activation': 'mish'}, "squeeze_activation: 'mish'"),
    ({'gate': 'relu'}, "gate: 'relu' is none of .'hard_sigmoid', 'sigmoid'"),
    ({'padding': 'VALID'}, "padding: 'VALID' is none of"),
    ({'strides': (1, 2, 2)}, "'strides': 3.*one of each for a resolution"),
  ],
)
def test_refusals(options, message):
  with pytest.raises(ValueError, match=message):
    tiny(**options).init(jax.random.key(0), images())


def test_the_library_sees_every_kernel():
  depthwise = {
    f'params/stage{at}/conv_depthwise/kernel' for at in ('0_0', '1_0', '1_1')
  }
  unseen = check_kernels_are_seen(tiny(), images(), frozenset(depthwise))
  for path in depthwise:
    assert 'a depthwise convolution' in unseen[path]


def test_compress_halves_it():
  model = tiny(stages=((INVERTED,),), strides=(1,))
  check_is_halved(model, 'params/stage0_0/conv_expand/kernel', refine=0)


def test_norms_fold_into_convolutions():
  model, x = tiny(), images(2)
  variables = randomised(model, x)
  folded = fold_batch_norm(variables, model.epsilon)
  actual = jax.jit(model.clone(batch_norm=False).apply)(folded, x)
  expected = jax.jit(model.apply)(variables, x)
  # Single precision, folded in double.
  np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


TOLD = {
  'activation': 'silu',
  'stage_activations': None,
  'squeeze_activation': None,
  'gate': 'sigmoid',
  'strides': (1, 2),
  'without_shortcut': (),
  'separable_activation': False,
  'blur': False,
  'padding': 'symmetric',
  'epsilon': 1e-5,
}


def normed(state, conv, norm, *shape):
  state.draw(f'{conv}.weight', *shape)
  state.layer(norm, shape[0])
  for name in ('mean', 'var'):
    state[f'{norm}.running_{name}'] = np.ones(shape[0], np.float32)


def timm_state(pooled=False):
  """Two stages of tiny width under timm's names."""
  state = State()
  normed(state, 'conv_stem', 'bn1', 4, 3, 3, 3)
  normed(state, 'blocks.0.0.conv_dw', 'blocks.0.0.bn1', 4, 1, 3, 3)
  normed(state, 'blocks.0.0.conv_pw', 'blocks.0.0.bn2', 4, 4, 1, 1)
  block = 'blocks.1.0.'
  normed(state, f'{block}conv_pw', f'{block}bn1', 8, 4, 1, 1)
  normed(state, f'{block}conv_dw', f'{block}bn2', 8, 1, 5, 5)
  normed(state, f'{block}conv_pwl', f'{block}bn3', 6, 8, 1, 1)
  state.layer(f'{block}se.conv_reduce', 2, 8, 1, 1)
  state.layer(f'{block}se.conv_expand', 8, 2, 1, 1)
  if pooled:
    state.layer('conv_head', 8, 6, 1, 1)
  else:
    normed(state, 'conv_head', 'bn2', 8, 6, 1, 1)
  state.layer('classifier', 5, 8)
  return state


@pytest.mark.parametrize('pooled', [False, True])
def test_a_file_of_timm_fills_the_model(pooled, tmp_path):
  state = timm_state(pooled)
  model, variables, imported = load(tmp_path, state, **TOLD)
  assert imported.layout == 'EfficientNet or MobileNet of timm'
  assert model.stages == (
    (SEPARABLE,),
    (Parts(expand=8, depthwise_size=5, squeeze=2, project=6),),
  )
  assert model.pool_before_head == pooled and model.head_width == 8
  block = variables['params']['stage1_0']
  np.testing.assert_array_equal(
    block['conv_project']['kernel'][0, 0],
    state['blocks.1.0.conv_pwl.weight'][:, :, 0, 0].T,
  )
  np.testing.assert_array_equal(
    block['excite']['kernel'],
    state['blocks.1.0.se.conv_expand.weight'][:, :, 0, 0].T,
  )


@pytest.mark.parametrize('option', TOLD)
def test_what_nothing_says_is_refused_by_name(option, tmp_path):
  told = {k: v for k, v in TOLD.items() if k != option}
  with pytest.raises(ValueError, match=f'Give {option}= .usually'):
    load(tmp_path, timm_state(), **told)


def test_a_name_that_has_other_strides_is_refused(tmp_path):
  with pytest.raises(ValueError, match="'strides': 7"):
    load(tmp_path, timm_state(), architecture='efficientnet_b0')


def test_stages_of_a_flat_file_begin_where_the_width_changes(tmp_path):
  state = State()
  normed(state, '_conv_stem', '_bn0', 4, 3, 3, 3)
  widths = (4, 4, 6, 8, 10, 12, 14, 16)
  before = 4
  for i, width in enumerate(widths):
    block = f'_blocks.{i}.'
    normed(state, f'{block}_depthwise_conv', f'{block}_bn1', before, 1, 3, 3)
    normed(state, f'{block}_project_conv', f'{block}_bn2', width, before, 1, 1)
    before = width
  normed(state, '_conv_head', '_bn1', 8, before, 1, 1)
  state.layer('_fc', 5, 8)
  with pytest.raises(ValueError, match="activation= .usually 'silu', 'relu6'"):
    load(tmp_path, state)
  model, _, imported = load(tmp_path, state, activation='relu6')
  assert imported.layout == 'EfficientNet of efficientnet_pytorch'
  assert [len(stage) for stage in model.stages] == [2, 1, 1, 1, 1, 1, 1]
  assert model.padding == 'SAME' and model.epsilon == 1e-3

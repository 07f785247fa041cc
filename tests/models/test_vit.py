"""The ViT: AugReg's tree, and options that change no output."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from utilized_rank.models import stacking
from utilized_rank.models import vit

pytestmark = pytest.mark.slow

# ViT-B/16 at 224 pixels as published, 1,000 classes, written out by hand.
B16 = {
  'cls': (1, 1, 768),
  'embedding/kernel': (16, 16, 3, 768),
  'embedding/bias': (768,),
  'Transformer/posembed_input/pos_embedding': (1, 197, 768),
  'Transformer/encoder_norm/scale': (768,),
  'Transformer/encoder_norm/bias': (768,),
  'head/kernel': (768, 1000),
  'head/bias': (1000,),
}
B16_BLOCK = {
  'LayerNorm_0/scale': (768,),
  'LayerNorm_0/bias': (768,),
  'MultiHeadDotProductAttention_1/query/kernel': (768, 12, 64),
  'MultiHeadDotProductAttention_1/query/bias': (12, 64),
  'MultiHeadDotProductAttention_1/key/kernel': (768, 12, 64),
  'MultiHeadDotProductAttention_1/key/bias': (12, 64),
  'MultiHeadDotProductAttention_1/value/kernel': (768, 12, 64),
  'MultiHeadDotProductAttention_1/value/bias': (12, 64),
  'MultiHeadDotProductAttention_1/out/kernel': (12, 64, 768),
  'MultiHeadDotProductAttention_1/out/bias': (768,),
  'LayerNorm_2/scale': (768,),
  'LayerNorm_2/bias': (768,),
  'MlpBlock_3/Dense_0/kernel': (768, 3072),
  'MlpBlock_3/Dense_0/bias': (3072,),
  'MlpBlock_3/Dense_1/kernel': (3072, 768),
  'MlpBlock_3/Dense_1/bias': (768,),
}


def tiny(**options):
  return vit.ViT(
    **{
      'num_classes': 5,
      'patch_size': 2,
      'width': 8,
      'depth': 2,
      'heads': 2,
      'mlp_dim': 12,
      **options,
    }
  )


@pytest.fixture(scope='module')
def images():
  rng = np.random.default_rng(0)
  return rng.normal(size=(3, 4, 4, 1)).astype(np.float32)


@pytest.fixture(scope='module')
def variables(images):
  """Random everywhere: a fresh head is zero and would hide differences."""
  shapes = jax.eval_shape(tiny().init, jax.random.key(0), images)
  rng = np.random.default_rng(1)
  return jax.tree.map(
    lambda s: rng.normal(scale=0.3, size=s.shape).astype(np.float32), shapes
  )


def shapes(tree):
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): leaf.shape
    for path, leaf in leaves
  }


def abstract(model, size):
  images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
  return jax.eval_shape(model.init, jax.random.key(0), images)['params']


def test_tree_is_that_of_augreg():
  model = vit.ViT(num_classes=1000, **vit.VARIANTS['B/16'])
  expected = dict(B16)
  for i in range(12):
    for name, shape in B16_BLOCK.items():
      expected[f'Transformer/encoderblock_{i}/{name}'] = shape
  assert shapes(abstract(model, 224)) == expected


def test_scanned_tree_is_the_stacked_one():
  model = vit.ViT(num_classes=1000, **vit.VARIANTS['B/16'], scan=True)
  expected = dict(B16)
  for name, shape in B16_BLOCK.items():
    expected[f'Transformer/encoderblock/{name}'] = (12, *shape)
  assert shapes(abstract(model, 224)) == expected


def test_optional_leaves():
  model = tiny(pool='gap', representation_size=6)
  found = shapes(abstract(model, 4))
  assert found['pre_logits/kernel'] == (8, 6)
  assert found['head/kernel'] == (6, 5)
  assert 'cls' not in found
  assert found['Transformer/posembed_input/pos_embedding'] == (1, 4, 8)


@pytest.mark.parametrize('name', vit.VARIANTS)
def test_variants_are_consistent(name):
  model = vit.ViT(num_classes=2, **vit.VARIANTS[name])
  tree = abstract(model, 2 * model.patch_size)
  assert tree['embedding']['kernel'].shape[0] == int(name.split('/')[1])


@pytest.mark.parametrize(
  'options',
  [{'scan': True}, {'remat': True}, {'scan': True, 'remat': True}],
  ids=str,
)
def test_scan_and_remat_change_nothing(variables, images, options):
  def loss(model, variables):
    return (model.apply(variables, images) ** 2).sum()

  model = tiny(**options)
  given = stacking.stack_blocks(variables) if model.scan else variables
  run = jax.jit(jax.value_and_grad(loss, argnums=1), static_argnums=0)
  expected, grad = run(tiny(), variables)
  actual, actual_grad = run(model, given)
  np.testing.assert_allclose(actual, expected, rtol=1e-5)
  if model.scan:
    actual_grad = stacking.unstack_blocks(actual_grad)
  # Reordered float32 sums, and leaves whose gradients span decades.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
    actual_grad,
    grad,
  )


def test_stacking_is_lossless(variables):
  wide = jax.tree.map(lambda x: x.astype(np.float64) / 3, variables)
  back = stacking.unstack_blocks(stacking.stack_blocks(wide))
  assert jax.tree.structure(back) == jax.tree.structure(wide)
  for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(wide), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a, b)


def test_stacking_without_the_params_level(variables):
  stacked = stacking.stack_blocks(variables['params'])
  assert set(stacked['Transformer']) == {
    'posembed_input',
    'encoderblock',
    'encoder_norm',
  }


def test_stacking_refuses_what_does_not_fit(variables):
  encoder = dict(variables['params']['Transformer'])
  with pytest.raises(ValueError, match='without a gap'):
    stacking.stack_blocks({'Transformer': {}})
  first = encoder.pop('encoderblock_0')
  with pytest.raises(ValueError, match='without a gap'):
    stacking.stack_blocks({'Transformer': encoder})
  odd = jax.tree.map(lambda x: x[..., :1], first)
  with pytest.raises(ValueError, match='encoderblock_1 differs'):
    stacking.stack_blocks({'Transformer': {**encoder, 'encoderblock_0': odd}})
  with pytest.raises(ValueError, match='takes the stacked block'):
    stacking.unstack_blocks(variables)
  with pytest.raises(ValueError, match='a ViT has Transformer'):
    stacking.unstack_blocks({'Dense_0': {}})


def test_dropout_needs_and_uses_its_rng(variables, images):
  model = tiny(dropout=0.5, attention_dropout=0.5)

  @jax.jit
  def apply(seed):
    rngs = {'dropout': jax.random.key(seed)}
    return model.apply(variables, images, train=True, rngs=rngs)

  assert not np.allclose(apply(0), apply(1))
  run = jax.jit(lambda model: model.apply(variables, images), static_argnums=0)
  np.testing.assert_array_equal(run(model), run(tiny()))


def test_logits_are_float32_in_bfloat16(variables, images):
  logits = tiny(dtype=jnp.bfloat16).apply(variables, images)
  assert logits.dtype == jnp.float32
  expected = tiny().apply(variables, images)
  # bfloat16 has 8 bits; the logits are of order 1.
  np.testing.assert_allclose(logits, expected, atol=0.2)


@pytest.mark.parametrize(
  ('options', 'shape', 'message'),
  [
    ({}, (1, 5, 4, 1), 'do not divide into patches of 2'),
    ({}, (1, 4, 4), 'takes'),
    ({'heads': 3}, (1, 4, 4, 1), 'no multiple of heads=3'),
    ({'pool': 'max'}, (1, 4, 4, 1), "pool='max'"),
  ],
)
def test_errors(options, shape, message):
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(tiny(**options).init, jax.random.key(0), jnp.zeros(shape))


def test_optional_parts_have_leaves():
  model = tiny(
    num_classes=0,
    registers=3,
    pre_norm=True,
    qk_norm=True,
    qkv_bias=False,
    patch_bias=False,
    layer_scale=0.1,
    swiglu=True,
    class_position=False,
    norm_after_pool=True,
    pool='gap',
    class_token=True,
  )
  tree = abstract(model, 4)
  found = shapes(tree)
  assert found['registers'] == (1, 3, 8)
  assert found['Transformer/posembed_input/pos_embedding'] == (1, 4, 8)
  block = 'Transformer/encoderblock_0/'
  assert found[f'{block}MlpBlock_3/gate/kernel'] == (8, 12)
  assert found[f'{block}LayerScale_1/gamma'] == (8,)
  assert found[f'{block}MultiHeadDotProductAttention_1/key_norm/scale'] == (4,)
  assert {'Transformer', 'cls', 'registers', 'embedding', 'fc_norm'} == set(
    tree
  )
  assert not any(name.endswith('query/bias') for name in found)
  images = jax.ShapeDtypeStruct((3, 4, 4, 3), jnp.float32)
  out = jax.eval_shape(model.apply, {'params': tree}, images)
  assert out.shape == (3, 8)


def test_tokens_are_not_averaged(variables, images):
  model = tiny(pool='gap', class_token=True, registers=1)
  params = {**variables['params'], 'registers': np.ones((1, 1, 8), np.float32)}
  captured, state = jax.jit(
    lambda p, x: model.apply({'params': p}, x, capture_intermediates=True)
  )(params, images)
  encoded = state['intermediates']['Transformer']['__call__'][0]
  assert encoded.shape == (3, 1 + 1 + 4, 8)
  head = params['head']
  expected = encoded[:, 2:].mean(1) @ head['kernel'] + head['bias']
  # The same product, summed in another order.
  np.testing.assert_allclose(captured, expected, rtol=1e-4, atol=1e-5)


def test_a_class_token_is_needed_to_read_it():
  with pytest.raises(ValueError, match='class_token=False'):
    abstract(tiny(class_token=False), 4)

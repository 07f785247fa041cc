"""The convolutional networks, the decoders and the keyword transformer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from utilized_rank.models import llama
from utilized_rank.models import resnet
from utilized_rank.models import rotary
from utilized_rank.models import transformer_parts
from utilized_rank.models import vgg
from utilized_rank.models.batch_norm import fold_batch_norm
from utilized_rank.models.gpt import GPT
from utilized_rank.models.hierarchies import convnext
from utilized_rank.models.hierarchies import swin
from utilized_rank.models.kwt import KeywordTransformer

pytestmark = pytest.mark.slow


def abstract(model, *shape, dtype=jnp.float32):
  x = jax.ShapeDtypeStruct(shape, dtype)
  return jax.eval_shape(model.init, jax.random.key(0), x)


def randomised(model, *shape, dtype=jnp.float32):
  rng = np.random.default_rng(0)
  return jax.tree.map(
    # Positive: variances are among them.
    lambda s: rng.uniform(0.2, 1, s.shape).astype(np.float32),
    abstract(model, *shape, dtype=dtype),
  )


# As torchvision's and the papers' model cards give them.
@pytest.mark.parametrize(
  ('model', 'shape', 'parameters'),
  [
    (resnet.ResNet(1000, **resnet.VARIANTS['18']), (64, 64, 3), 11_689_512),
    (resnet.ResNet(1000, **resnet.VARIANTS['34']), (64, 64, 3), 21_797_672),
    (resnet.ResNet(1000, **resnet.VARIANTS['50']), (64, 64, 3), 25_557_032),
    (resnet.ResNet(10, **resnet.VARIANTS['20']), (32, 32, 3), 269_722),
    (resnet.ResNet(10, **resnet.VARIANTS['56']), (32, 32, 3), 853_018),
    (vgg.VGG(1000, **vgg.VARIANTS['11']), (224, 224, 3), 132_863_336),
    (vgg.VGG(1000, **vgg.VARIANTS['16']), (224, 224, 3), 138_357_544),
    (
      vgg.VGG(1000, **vgg.VARIANTS['19'], batch_norm=True),
      (224, 224, 3),
      143_678_248,
    ),
    (KeywordTransformer(12), (98, 40), 607_308),
    (
      convnext.ConvNeXt(1000, **convnext.VARIANTS['T']),
      (64, 64, 3),
      28_589_128,
    ),
    (
      convnext.ConvNeXt(1000, **convnext.VARIANTS['B']),
      (64, 64, 3),
      88_591_464,
    ),
    (
      convnext.ConvNeXt(1000, **convnext.VARIANTS['V2-T']),
      (64, 64, 3),
      28_635_496,
    ),
    (swin.Swin(1000, **swin.VARIANTS['T']), (224, 224, 3), 28_288_354),
    (swin.Swin(1000, **swin.VARIANTS['S']), (224, 224, 3), 49_606_258),
    (swin.Swin(1000, **swin.VARIANTS['B']), (224, 224, 3), 87_768_224),
  ],
  ids=lambda x: '',
)
def test_sizes_are_those_published(model, shape, parameters):
  params = abstract(model, 1, *shape)['params']
  assert sum(x.size for x in jax.tree.leaves(params)) == parameters


@pytest.mark.parametrize(
  'model',
  [
    resnet.ResNet(3, stages=(1, 1), width=4, bottleneck=True),
    resnet.ResNet(
      3, stages=(1, 1), width=4, small_images=True, shortcut='conv'
    ),
    vgg.VGG(3, stages=((4,), (6,)), hidden=(5,), pool_size=3, batch_norm=True),
  ],
  ids=['bottleneck', 'conv', 'vgg'],
)
def test_folding_batch_norm_changes_nothing(model):
  variables = randomised(model, 1, 16, 16, 3)
  x = np.random.default_rng(1).normal(size=(2, 16, 16, 3)).astype(np.float32)
  folded = fold_batch_norm(variables)
  assert set(folded) == {'params'}
  plain = model.clone(batch_norm=False)
  assert jax.tree.structure(folded) == jax.tree.structure(
    abstract(plain, *x.shape)
  )
  actual = jax.jit(plain.apply)(folded, x)
  expected = jax.jit(model.apply)(variables, x)
  # One rounding of each kernel, and sums of positive numbers.
  np.testing.assert_allclose(actual, expected, rtol=1e-4)


def test_folding_refuses_what_it_does_not_know():
  with pytest.raises(ValueError, match='needs batch_stats'):
    fold_batch_norm({'params': {}})
  stats = {'mean': np.ones(2), 'var': np.ones(2)}
  params = {'bn1': {'scale': np.ones(2), 'bias': np.ones(2)}}
  with pytest.raises(ValueError, match='a/bn1 has no convolution a/conv1'):
    fold_batch_norm(
      {'params': {'a': params}, 'batch_stats': {'a': {'bn1': stats}}}
    )


def test_batch_statistics_move_in_training():
  model = resnet.ResNet(3, stages=(1,), width=4, small_images=True)
  x = np.random.default_rng(1).normal(size=(4, 8, 8, 3)).astype(np.float32)
  variables = randomised(model, *x.shape)
  _, after = jax.jit(
    lambda v, x: model.apply(v, x, train=True, mutable=['batch_stats'])
  )(variables, x)
  old, new = (t['batch_stats']['bn1']['mean'] for t in (variables, after))
  assert not np.allclose(old, new)


def test_windows_of_adaptive_pooling():
  # 5 pixels to 3: [0, 2), [1, 4), [3, 5), as torch.nn.AdaptiveAvgPool2d.
  expected = [
    [1 / 2, 1 / 2, 0, 0, 0],
    [0, *[1 / 3] * 3, 0],
    [0, 0, 0, 1 / 2, 1 / 2],
  ]
  np.testing.assert_allclose(vgg._windows(5, 3), expected)


def decoder(**options):
  sizes = {'width': 8, 'depth': 2, 'heads': 4, 'kv_heads': 2, 'mlp_dim': 6}
  return llama.Llama(7, **{**sizes, **options})


TOKENS = np.array([[1, 4, 2, 6, 0]])


def test_grouped_queries_are_repeated_keys():
  grouped = decoder(tied=False)
  variables = randomised(grouped, 1, 5, dtype=jnp.int32)

  def repeat(path, x):
    grouped = any(k.key in ('key', 'value') for k in path)
    return np.repeat(x, 2, axis=1) if grouped else x

  whole = jax.tree_util.tree_map_with_path(repeat, variables)
  expected = jax.jit(decoder(tied=False, kv_heads=4).apply)(whole, TOKENS)
  # The same products in another order.
  actual = jax.jit(grouped.apply)(variables, TOKENS)
  np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_half_split_rotation_is_the_interleaved_one_permuted():
  x = np.random.default_rng(0).normal(size=(2, 5, 3, 8)).astype(np.float32)
  order = np.arange(8).reshape(4, 2).T.ravel()  # evens, then odds
  turns = rotary.Rotation.plain(100.0, 8).angles(np.arange(5))
  half = rotary.rotate(x[..., order], turns, interleaved=False)
  pairs = rotary.rotate(x, turns, interleaved=True)
  np.testing.assert_allclose(half, pairs[..., order], rtol=1e-6)
  # Complex numbers turned by t / 100**(j / 4).
  z = (x[..., ::2] + 1j * x[..., 1::2]).astype(np.complex128)
  angles = np.arange(5)[:, None, None] * 100.0 ** (-np.arange(4) / 4)
  z = z * np.exp(1j * angles)
  # Float32 angles.
  np.testing.assert_allclose(pairs[..., ::2], z.real, atol=1e-5)
  np.testing.assert_allclose(pairs[..., 1::2], z.imag, atol=1e-5)


@pytest.mark.parametrize(
  'model', [decoder(), GPT(7, 5, 8, 1, 2)], ids=['llama', 'gpt']
)
def test_decoders_do_not_see_the_future(model):
  variables = randomised(model, 1, 5, dtype=jnp.int32)
  later = TOKENS.copy()
  later[0, 3:] = 5
  run = jax.jit(model.apply)
  a, b = (np.asarray(run(variables, t)) for t in (TOKENS, later))
  np.testing.assert_allclose(a[0, :3], b[0, :3], rtol=1e-6)
  assert not np.allclose(a[0, 3:], b[0, 3:])


def test_errors():
  with pytest.raises(ValueError, match="shortcut='none'"):
    abstract(resnet.ResNet(3, stages=(1,), shortcut='none'), 1, 8, 8, 3)
  with pytest.raises(ValueError, match='no multiple of kv_heads=3'):
    abstract(decoder(kv_heads=3), 1, 6, dtype=jnp.int32)
  with pytest.raises(ValueError, match='6 tokens do not fit into context=5'):
    abstract(GPT(7, 5, 8, 1, 2), 1, 6, dtype=jnp.int32)
  with pytest.raises(ValueError, match="activation='swish'"):
    transformer_parts.BlockOptions(2, 8, activation='swish')
  with pytest.raises(ValueError, match="norm_order='post'"):
    transformer_parts.BlockOptions(2, 8, norm_order='post')


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('causal', [False, True])
def test_attention_is_that_of_jax(causal, dtype):
  rng = np.random.default_rng(0)
  # Scores up to 100: exponentials that nothing is taken off would overflow.
  sizes = (2, 7, 3, 4), (2, 7, 3, 4), (2, 7, 3, 4)
  q, k, v = (jnp.asarray(8 * rng.normal(size=s), dtype) for s in sizes)
  value = lambda attend: (
    lambda *x: jnp.sum(jnp.sin(attend(*x).astype(jnp.float32)))
  )
  ours = lambda *x: transformer_parts.attend(*x, causal=causal)
  theirs = lambda *x: jax.nn.dot_product_attention(*x, is_causal=causal)
  # bfloat16 resolves 2^-8, and weights are rounded before the division here
  # and after it there.
  close = {'rtol': 1e-5} if dtype == jnp.float32 else {'rtol': 2**-6}
  size = lambda x: {'atol': close['rtol'] * float(jnp.abs(x).max())}
  got, want = ours(q, k, v), theirs(q, k, v)
  assert got.dtype == want.dtype == dtype
  np.testing.assert_allclose(
    got.astype(np.float32), want.astype(np.float32), **close, **size(want)
  )
  grads = zip(
    jax.grad(value(ours), (0, 1, 2))(q, k, v),
    jax.grad(value(theirs), (0, 1, 2))(q, k, v),
    strict=True,
  )
  if dtype == jnp.float32:
    for mine, other in grads:
      np.testing.assert_allclose(mine, other, **close, **size(other))

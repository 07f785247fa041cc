"""Flax Linen: attention and other layers, scan over remat, batch norm."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from frameworks.case import Case
from frameworks.case import filled
from frameworks.case import normal
from frameworks.case import patches
from frameworks.case import rows

CLASSES = 5


def record(seen, features_of):
  """A context in which every linear layer's input goes into `seen`."""
  linear = (nn.Dense, nn.DenseGeneral, nn.Einsum, nn.Conv, nn.ConvTranspose)

  def interceptor(method, args, kwargs, context):
    if context.method_name == '__call__' and isinstance(context.module, linear):
      path = '/'.join((*context.module.path, 'kernel'))
      seen[path] = features_of(path, context.module, args[0])
    return method(*args, **kwargs)

  return nn.intercept_methods(interceptor)


class Layers(nn.Module):
  """Layers whose kernels are no plain (in, out) matrices."""

  @nn.compact
  def __call__(self, x):
    x = nn.Conv(8, (3, 3), strides=2, name='down')(x)
    x = nn.relu(x)
    # 'SAME', stride 2, even and odd sides: the padding is not symmetric.
    x = nn.ConvTranspose(6, (3, 2), strides=(2, 2), name='up')(x)
    x = x.reshape(x.shape[0], -1, 12)
    x = nn.Einsum((12, 2, 4), 'bsd,dhe->bshe', name='split')(x)
    x = nn.Einsum((2, 4, 8), 'bshe,hed->bsd', name='join')(x)
    y = nn.LayerNorm()(x)
    x = x + nn.MultiHeadDotProductAttention(2, name='attention')(y, y)
    return nn.Dense(CLASSES, name='head')(x.mean(1))


def _transposed_patches(x, kernel, strides):
  """Patches of the dilated input, as 'SAME' pads a transposed convolution."""
  batch, height, width, channels = x.shape
  dilated = np.zeros((
    batch, (height - 1) * strides[0] + 1, (width - 1) * strides[1] + 1,
    channels,
  ))  # fmt: skip
  dilated[:, :: strides[0], :: strides[1]] = x
  pads = []
  for k, s in zip(kernel, strides, strict=True):
    total = k + s - 2
    before = k - 1 if s > k - 1 else -(-total // 2)
    pads.append((before, total - before))
  return patches(dilated, kernel, (1, 1), pads)


def layers() -> Case:
  model = Layers()
  images = normal(16, 6, 6, 3)
  params = filled(jax.eval_shape(model.init, jax.random.key(0), images))
  kernels = {
    'params/down/kernel': (27, 8),
    'params/up/kernel': (48, 6),
    'params/split/kernel': (12, 8),
    'params/join/kernel': (8, 8),
    'params/head/kernel': (8, CLASSES),
  }
  for name in ('query', 'key', 'value', 'out'):
    kernels[f'params/attention/{name}/kernel'] = (8, 8)

  def features_of(path, module, x):
    if isinstance(module, nn.ConvTranspose):
      return _transposed_patches(x, module.kernel_size, module.strides)
    if isinstance(module, nn.Conv):
      return patches(x, module.kernel_size, (2, 2))
    return rows(x, kernels[f'params/{path}'][-2])

  def inputs():
    seen = {}
    with record(seen, features_of):
      model.apply(params, images)
    return {f'params/{path}': x for path, x in seen.items()}

  return Case(model.apply, params, images, kernels, inputs)


class Block(nn.Module):
  @nn.compact
  def __call__(self, x, _):
    y = nn.LayerNorm()(x)
    x = x + nn.MultiHeadDotProductAttention(2, name='attention')(y, y)
    y = nn.gelu(nn.Dense(12, name='up')(nn.LayerNorm()(x)))
    return x + nn.Dense(8, name='down')(y), None


class Scanned(nn.Module):
  depth: int = 3

  @nn.compact
  def __call__(self, x):
    x = nn.Dense(8, name='embed')(x)
    blocks = nn.scan(
      nn.remat(Block, prevent_cse=False),
      variable_axes={'params': 0},
      split_rngs={'params': True},
      length=self.depth,
    )
    x, _ = blocks(name='blocks')(x, None)
    return nn.Dense(CLASSES, name='head')(x)


def scanned() -> Case:
  model = Scanned()
  x = normal(4, 7, 6)
  variables = filled(jax.eval_shape(model.init, jax.random.key(0), x))
  params = variables['params']
  kernels = {'params/embed/kernel': (6, 8), 'params/head/kernel': (8, CLASSES)}
  for name in ('query', 'key', 'value', 'out'):
    kernels[f'params/blocks/attention/{name}/kernel'] = (3, 8, 8)
  kernels['params/blocks/up/kernel'] = (3, 8, 12)
  kernels['params/blocks/down/kernel'] = (3, 12, 8)

  def inputs():
    """One block at a time, with its slice of the parameters."""
    seen = {'params/embed/kernel': rows(x, 6)}
    y = nn.Dense(8).apply({'params': params['embed']}, x)
    stacked: dict[str, list[np.ndarray]] = {}
    for i in range(3):
      own = jax.tree.map(lambda leaf, i=i: leaf[i], params['blocks'])
      inside = {}
      with record(
        inside,
        lambda path, module, x: rows(x, kernels[f'params/blocks/{path}'][-2]),
      ):
        y, _ = Block().apply({'params': own}, y, None)
      for path, value in inside.items():
        stacked.setdefault(f'params/blocks/{path}', []).append(value)
    seen['params/head/kernel'] = rows(y, 8)
    return seen | {path: np.stack(each) for path, each in stacked.items()}

  return Case(model.apply, variables, x, kernels, inputs)


class ResNetBlock(nn.Module):
  train: bool

  @nn.compact
  def __call__(self, x):
    conv = functools.partial(nn.Conv, 6, use_bias=False)
    norm = functools.partial(
      nn.BatchNorm, use_running_average=not self.train, momentum=0.9
    )
    y = nn.relu(norm()(conv((3, 3), 2, name='conv_0')(x)))
    y = norm()(conv((3, 3), name='conv_1')(y))
    return nn.relu(y + norm()(conv((1, 1), 2, name='conv_short')(x)))


class ResNet(nn.Module):
  @nn.compact
  def __call__(self, x, train):
    x = ResNetBlock(train, name='block')(x)
    return nn.Dense(CLASSES, name='head')(jnp.mean(x, (1, 2)))


def resnet() -> Case:
  model = ResNet()
  images = normal(16, 6, 6, 3)
  init = functools.partial(model.init, train=True)
  variables = filled(jax.eval_shape(init, jax.random.key(0), images))
  params, stats = variables['params'], variables['batch_stats']
  kernels = {
    'block/conv_0/kernel': (27, 6),
    'block/conv_1/kernel': (54, 6),
    'block/conv_short/kernel': (3, 6),
    'head/kernel': (6, CLASSES),
  }

  def fn(params, images):
    # Returns the new statistics beside the logits.
    return model.apply(
      {'params': params, 'batch_stats': stats}, images, True,
      mutable=['batch_stats'],
    )  # fmt: skip

  def features_of(path, module, x):
    if isinstance(module, nn.Conv):
      stride = module.strides or 1
      return patches(x, module.kernel_size, (stride, stride))
    return rows(x, 6)

  def inputs():
    seen = {}
    with record(seen, features_of):
      fn(params, images)
    return seen

  return Case(fn, params, images, kernels, inputs)

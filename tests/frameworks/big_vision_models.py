"""A ViT as big_vision writes it: an `out` dictionary and a head used twice."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from frameworks.case import Case
from frameworks.case import filled
from frameworks.case import normal
from frameworks.case import patches
from frameworks.case import rows
from frameworks.linen_models import record

WIDTH, HEADS, HIDDEN, CLASSES = 8, 2, 12, 5


def posemb_sincos_2d(h, w, width, temperature=10_000.0):
  y, x = jnp.mgrid[:h, :w]
  omega = jnp.arange(width // 4) / (width // 4 - 1)
  omega = 1.0 / (temperature**omega)
  y = jnp.einsum('m,d->md', y.flatten(), omega)
  x = jnp.einsum('m,d->md', x.flatten(), omega)
  return jnp.concatenate(
    [jnp.sin(x), jnp.cos(x), jnp.sin(y), jnp.cos(y)], axis=1
  )[None]


class MlpBlock(nn.Module):
  @nn.compact
  def __call__(self, x, deterministic=True):
    width = x.shape[-1]
    x = nn.gelu(nn.Dense(HIDDEN)(x))
    x = nn.Dropout(rate=0.1)(x, deterministic)
    return nn.Dense(width)(x)


class Encoder1DBlock(nn.Module):
  @nn.compact
  def __call__(self, x, deterministic=True):
    out = {}
    y = nn.LayerNorm()(x)
    y = out['sa'] = nn.MultiHeadDotProductAttention(
      num_heads=HEADS, deterministic=deterministic
    )(y, y)
    x = out['+sa'] = x + nn.Dropout(rate=0.1)(y, deterministic)
    y = nn.LayerNorm()(x)
    y = out['mlp'] = MlpBlock()(y, deterministic)
    x = out['+mlp'] = x + y
    return x, out


class MAPHead(nn.Module):
  @nn.compact
  def __call__(self, x):
    n, _, width = x.shape
    probe = self.param(
      'probe', nn.initializers.xavier_uniform(), (1, 1, width), x.dtype
    )
    probe = jnp.tile(probe, [n, 1, 1])
    x = nn.MultiHeadDotProductAttention(num_heads=HEADS)(probe, x)
    y = nn.LayerNorm()(x)
    x = x + MlpBlock()(y)
    return x[:, 0]


class ViT(nn.Module):
  pool: str
  posemb: str

  @nn.compact
  def __call__(self, image, *, train=False):
    out = {}
    x = out['stem'] = nn.Conv(
      WIDTH, (2, 2), strides=(2, 2), padding='VALID', name='embedding'
    )(image)
    n, h, w, c = x.shape
    x = jnp.reshape(x, [n, h * w, c])
    if self.posemb == 'learn':
      x = x + self.param(
        'pos_embedding', nn.initializers.normal(), (1, h * w, c)
      )
    else:
      x = x + posemb_sincos_2d(h, w, c)
    for lyr in range(2):
      x, out[f'block{lyr:02d}'] = Encoder1DBlock(name=f'encoderblock_{lyr}')(
        x, not train
      )
    x = encoded = nn.LayerNorm(name='encoder_norm')(x)
    if self.pool == 'map':
      x = out['head_input'] = MAPHead()(x)
    else:
      x = out['head_input'] = jnp.mean(x, axis=1)
    x_2d = jnp.reshape(encoded, [n, h, w, -1])
    head = nn.Dense(CLASSES, name='head')
    # The trap: a second call of the head that most callers never read.
    out['logits_2d'] = head(x_2d)
    x = out['logits'] = head(x)
    return x, out


def _kernels(pool):
  kernels = {'embedding/kernel': (12, WIDTH), 'head/kernel': (WIDTH, CLASSES)}
  owners = [f'encoderblock_{i}' for i in range(2)]
  if pool == 'map':
    owners.append('MAPHead_0')
  for owner in owners:
    for name in ('query', 'key', 'value', 'out'):
      path = f'{owner}/MultiHeadDotProductAttention_0/{name}/kernel'
      kernels[path] = (WIDTH, WIDTH)
    kernels[f'{owner}/MlpBlock_0/Dense_0/kernel'] = (WIDTH, HIDDEN)
    kernels[f'{owner}/MlpBlock_0/Dense_1/kernel'] = (HIDDEN, WIDTH)
  return kernels


def _vit(pool, posemb) -> Case:
  model = ViT(pool, posemb)
  image = normal(16, 4, 6, 3)
  params = filled(
    jax.eval_shape(model.init, jax.random.key(0), image)['params']
  )
  kernels = _kernels(pool)

  def features_of(path, module, x):
    if isinstance(module, nn.Conv):
      return patches(x, module.kernel_size, module.strides, [(0, 0), (0, 0)])
    return rows(x, kernels[path][-2])

  def inputs():
    seen = {}
    with record(seen, features_of):
      model.apply({'params': params}, image)
    return seen

  return Case(
    lambda params, image: model.apply({'params': params}, image)[0],
    params, image, kernels, inputs,
  )  # fmt: skip


def gap() -> Case:
  return _vit('gap', 'sincos2d')


def attention_pooled() -> Case:
  return _vit('map', 'learn')

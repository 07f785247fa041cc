"""A Haiku transformer, a GRU, and a Haiku residual network in training mode."""

from __future__ import annotations

import haiku as hk
import jax
import jax.numpy as jnp

from frameworks.case import Case
from frameworks.case import filled
from frameworks.case import normal
from frameworks.case import patches
from frameworks.case import rows
from frameworks.case import tokens

WIDTH, HEADS, CLASSES = 8, 2, 5


class Transformer(hk.Module):
  def __call__(self, ids):
    x = hk.Embed(11, WIDTH)(ids)
    init = hk.initializers.VarianceScaling(1.0)
    for i in range(2):
      norm = hk.LayerNorm(-1, True, True, name=f'norm_{i}')
      attention = hk.MultiHeadAttention(
        HEADS, WIDTH // HEADS, w_init=init, name=f'attention_{i}'
      )
      y = norm(x)
      x = x + attention(y, y, y)
      x = x + hk.nets.MLP([12, WIDTH], activation=jax.nn.gelu, name=f'mlp_{i}')(
        x
      )
    return hk.Linear(CLASSES, name='head')(x)


def _recorder(seen, inputs_of):
  def interceptor(method, args, kwargs, context):
    module = context.module
    if context.method_name == '__call__' and isinstance(
      module, (hk.Linear, hk.Conv2D)
    ):
      seen[f'{module.module_name}/w'] = inputs_of(module, args[0])
    return method(*args, **kwargs)

  return hk.intercept_methods(interceptor)


def transformer() -> Case:
  model = hk.without_apply_rng(
    hk.transform(lambda ids: Transformer(name='net')(ids))
  )
  params = filled(jax.eval_shape(model.init, jax.random.PRNGKey(0), tokens()))
  kernels = {'net/head/w': (WIDTH, CLASSES)}
  for i in range(2):
    for name in ('query', 'key', 'value', 'linear'):
      kernels[f'net/attention_{i}/{name}/w'] = (WIDTH, WIDTH)
    kernels[f'net/mlp_{i}/~/linear_0/w'] = (WIDTH, 12)
    kernels[f'net/mlp_{i}/~/linear_1/w'] = (12, WIDTH)

  def inputs():
    seen = {}
    with _recorder(seen, lambda module, x: rows(x, x.shape[-1])):
      model.apply(params, tokens())
    return seen

  return Case(
    model.apply, params, tokens(), kernels, inputs,
    unseen={'net/embed/embeddings': 'gather'},
  )  # fmt: skip


def recurrent() -> Case:
  """A GRU: gates z and r read h, the third reads r h; w_h is their parts."""

  def run(x):
    gru = hk.GRU(WIDTH, name='gru')
    y, _ = hk.dynamic_unroll(
      gru, x, gru.initial_state(len(x)), time_major=False
    )
    return hk.Linear(CLASSES, name='head')(y)

  model = hk.without_apply_rng(hk.transform(run))
  x = normal(4, 6, WIDTH)
  params = filled(jax.eval_shape(model.init, jax.random.PRNGKey(0), x))
  kernels = {
    'gru/w_i': (WIDTH, 3 * WIDTH),
    'gru/w_h': (3, WIDTH, WIDTH),
    'head/w': (WIDTH, CLASSES),
  }

  def inputs():
    w_i, w_h, b = (params['gru'][k] for k in ('w_i', 'w_h', 'b'))
    h, read = jnp.zeros((4, WIDTH)), []
    for step in x.swapaxes(0, 1):
      from_x = jnp.split(step @ w_i + b, 3, -1)
      from_h = jnp.split(h @ w_h, 3, -1)
      z, r = (jax.nn.sigmoid(from_x[i] + from_h[i]) for i in (0, 1))
      read.append((jnp.stack([h, h, r * h]), h))
      new = jnp.tanh(from_x[2] + (r * h) @ w_h[:, 2 * WIDTH :])
      h = (1 - z) * h + z * new
    states = [h for _, h in read[1:]] + [h]
    return {
      'gru/w_i': rows(x, WIDTH),
      'gru/w_h': jnp.concatenate([each for each, _ in read], 1),
      'head/w': jnp.concatenate(states),
    }

  return Case(model.apply, params, x, kernels, inputs)


class ResNetBlock(hk.Module):
  """Two convolutions and a projected shortcut, stride 2."""

  def __call__(self, x, is_training):
    def conv_norm(x, size, stride, name):
      conv = hk.Conv2D(6, size, stride, with_bias=False, name=f'conv_{name}')
      norm = hk.BatchNorm(True, True, 0.9, name=f'norm_{name}')
      return norm(conv(x), is_training)

    y = jax.nn.relu(conv_norm(x, 3, 2, '0'))
    y = conv_norm(y, 3, 1, '1')
    return jax.nn.relu(y + conv_norm(x, 1, 2, 'short'))


def resnet() -> Case:
  def net(x, is_training):
    x = ResNetBlock(name='block')(x, is_training)
    return hk.Linear(CLASSES, name='head')(jnp.mean(x, (1, 2)))

  model = hk.without_apply_rng(hk.transform_with_state(net))
  images = normal(16, 6, 6, 3)
  params, state = filled(
    jax.eval_shape(
      lambda key: model.init(key, images, True), jax.random.PRNGKey(0)
    )
  )
  kernels = {
    'block/conv_short/w': (3, 6),
    'block/conv_0/w': (27, 6),
    'block/conv_1/w': (54, 6),
    'head/w': (6, CLASSES),
  }

  def inputs_of(module, x):
    if isinstance(module, hk.Linear):
      return rows(x, x.shape[-1])
    return patches(x, module.kernel_shape, module.stride)

  def inputs():
    seen = {}
    with _recorder(seen, inputs_of):
      model.apply(params, state, images, True)
    return seen

  # The new state is an output beside the logits.
  return Case(
    lambda params, x: model.apply(params, state, x, True),
    params, images, kernels, inputs,
  )  # fmt: skip

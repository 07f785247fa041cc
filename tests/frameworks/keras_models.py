"""Keras 3 on JAX, and keras-hub: functional models called without state."""

from __future__ import annotations

import os
from unittest import mock

os.environ.setdefault('KERAS_BACKEND', 'jax')

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import keras  # noqa: E402
import numpy as np  # noqa: E402

from frameworks.case import Case  # noqa: E402
from frameworks.case import filled  # noqa: E402
from frameworks.case import normal  # noqa: E402
from frameworks.case import patches  # noqa: E402
from frameworks.case import rows  # noqa: E402
from frameworks.case import tokens  # noqa: E402

WIDTH = 6


def _pure(model):
  """`fn(params, x)` and params by Keras' own paths."""
  held = {v.path: v.value for v in model.trainable_variables}
  params = filled(jax.eval_shape(lambda: held))
  for variable in model.trainable_variables:
    variable.assign(params[variable.path])
  fixed = [v.value for v in model.non_trainable_variables]
  order = list(held)

  def fn(params, x):
    return model.stateless_call([params[k] for k in order], fixed, x)[0]

  return fn, params


def _recorded(model, x, wanted):
  """What the layers of these kernels are given: path to input."""
  seen = {}
  call = keras.layers.Layer.__call__

  def recording(layer, *args, **kwargs):
    for variable in layer.variables:
      if variable.path in wanted and variable.path.startswith(layer.path):
        # The innermost layer is called last.
        seen[variable.path] = (*args, *kwargs.values())[0]
    return call(layer, *args, **kwargs)

  with mock.patch.object(keras.layers.Layer, '__call__', recording):
    model(x)
  return seen


def _upsampled(x, kernel, strides):
  """The rows that a transposed convolution of 'same' padding reads."""
  before = (kernel - strides) // 2
  batch, height, width, channels = x.shape
  size = height * strides, width * strides
  found = np.zeros((batch, *size, kernel, kernel, channels))
  for i in np.ndindex(*size, kernel, kernel):
    at = np.asarray(i[:2]) + before - np.asarray(i[2:])
    into = at // strides
    if not (at % strides).any() and all(into >= 0) and all(into < x.shape[1:3]):
      found[:, *i] = x[:, into[0], into[1]]
  return found.reshape(-1, kernel * kernel * channels)


def cnn() -> Case:
  """Grouped, depthwise and transposed convolutions, a batch norm."""
  layers = keras.layers
  model = keras.Sequential(
    [
      keras.Input((6, 6, 3)),
      layers.Conv2D(
        WIDTH, 3, strides=2, padding='same', activation='relu', name='strided'
      ),
      layers.BatchNormalization(name='norm'),
      layers.DepthwiseConv2D(3, padding='same', name='depthwise'),
      layers.Conv2D(8, 2, groups=2, name='grouped'),
      layers.Conv2DTranspose(5, 4, strides=2, padding='same', name='up'),
      layers.GlobalAveragePooling2D(),
      layers.Dense(7, name='head'),
    ],
    name='net',
  )
  images = normal(32, 6, 6, 3)
  fn, params = _pure(model)
  kernels = {
    'net/strided/kernel': (27, WIDTH),
    'net/grouped/kernel': (2, 4 * WIDTH // 2, 4),
    'net/up/kernel': (16 * 8, 5),
    'net/head/kernel': (5, 7),
  }

  def inputs():
    seen = _recorded(model, images, kernels)
    x = {k: np.asarray(x, np.float64) for k, x in seen.items()}
    halves = np.split(x['net/grouped/kernel'], 2, axis=-1)
    whole = ((0, 0), (0, 0))
    return {
      'net/strided/kernel': patches(images, (3, 3), (2, 2)),
      'net/grouped/kernel': np.stack(
        [patches(half, (2, 2), pads=whole) for half in halves]
      ),
      'net/up/kernel': _upsampled(x['net/up/kernel'], 4, 2),
      'net/head/kernel': rows(x['net/head/kernel'], 5),
    }

  unseen = {'net/depthwise/kernel': 'depthwise'}
  return Case(fn, params, images, kernels, inputs, unseen)


def recurrent() -> Case:
  """A GRU whose third gate reads r h, and an LSTM."""
  x = keras.Input((5, 8))
  y = keras.layers.GRU(
    WIDTH, reset_after=False, return_sequences=True, name='gru'
  )(x)
  y = keras.layers.LSTM(WIDTH, name='lstm')(y)
  model = keras.Model(x, keras.layers.Dense(5, name='head')(y))
  fn, params = _pure(model)
  batch = normal(8, 5, 8)
  gru, lstm = 'gru/gru_cell/', 'lstm/lstm_cell/'
  kernels = {
    gru + 'kernel': (8, 3 * WIDTH),
    gru + 'recurrent_kernel': (3, WIDTH, WIDTH),
    lstm + 'kernel': (WIDTH, 4 * WIDTH),
    lstm + 'recurrent_kernel': (WIDTH, 4 * WIDTH),
    'head/kernel': (WIDTH, 5),
  }

  def inputs():
    p = {k: np.asarray(v, np.float64) for k, v in params.items()}
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    h, states, read = np.zeros((8, WIDTH)), [], []
    w = np.split(p[gru + 'recurrent_kernel'], 3, -1)
    for step in np.asarray(batch, np.float64).swapaxes(0, 1):
      from_x = step @ p[gru + 'kernel'] + p[gru + 'bias']
      z, r, new = np.split(from_x, 3, -1)
      z, r = sigmoid(z + h @ w[0]), sigmoid(r + h @ w[1])
      read.append(np.stack([h, h, r * h]))
      h = z * h + (1 - z) * np.tanh(new + (r * h) @ w[2])
      states.append(h)
    h, c, hidden = np.zeros((8, WIDTH)), np.zeros((8, WIDTH)), []
    for step in states:
      hidden.append(h)
      gates = step @ p[lstm + 'kernel'] + h @ p[lstm + 'recurrent_kernel']
      i, f, new, o = np.split(gates + p[lstm + 'bias'], 4, -1)
      c = sigmoid(f) * c + sigmoid(i) * np.tanh(new)
      h = sigmoid(o) * np.tanh(c)
    return {
      gru + 'kernel': rows(batch, 8),
      gru + 'recurrent_kernel': np.concatenate(read, 1),
      lstm + 'kernel': np.concatenate(states),
      lstm + 'recurrent_kernel': np.concatenate(hidden),
      'head/kernel': h,
    }

  return Case(fn, params, batch, kernels, inputs)


def transformer() -> Case:
  """Multi-head and grouped-query attention, an EinsumDense of two axes."""
  layers = keras.layers
  ids = keras.Input((7,), dtype='int32')
  x = layers.Embedding(11, 8, name='embed')(ids)
  y = layers.LayerNormalization(name='norm')(x)
  x = x + layers.MultiHeadAttention(2, 4, name='mha')(y, y)
  x = x + layers.GroupQueryAttention(4, 4, 2, name='gqa')(x, x)
  y = layers.Dense(12, activation='gelu', name='up')(x)
  x = layers.RMSNormalization(name='rms')(x + layers.Dense(8, name='down')(y))
  head = layers.EinsumDense(
    'abc,cde->abde', output_shape=(None, 2, 5), bias_axes='de', name='head'
  )
  model = keras.Model(ids, head(x))
  fn, params = _pure(model)
  kernels = {
    'up/kernel': (8, 12), 'down/kernel': (12, 8), 'head/kernel': (8, 10),
    'gqa/query/kernel': (8, 16), 'gqa/key/kernel': (8, 8),
    'gqa/value/kernel': (8, 8), 'gqa/attention_output/kernel': (16, 8),
  }  # fmt: skip
  for name in ('query', 'key', 'value', 'attention_output'):
    kernels[f'mha/{name}/kernel'] = (8, 8)
  return _recorded_case(
    model, fn, params, tokens(), kernels, {'embed/embeddings': 'gather'}
  )


def _recorded_case(model, fn, params, batch, kernels, unseen) -> Case:
  def inputs():
    seen = _recorded(model, batch, kernels)
    assert set(seen) == set(kernels)
    return {k: rows(x, kernels[k][-2]) for k, x in seen.items()}

  return Case(fn, params, batch, kernels, inputs, unseen)


def _hub(model, kernels, unseen) -> Case:
  fn, params = _pure(model)
  names = {v.name for v in model.inputs}
  batch = {'token_ids': tokens(), 'padding_mask': jnp.ones((4, 7), jnp.int32)}
  if 'segment_ids' in names:
    batch['segment_ids'] = jnp.arange(28).reshape(4, 7) % 2
  call = lambda params, batch: fn(params, batch)
  return _recorded_case(model, call, params, batch, kernels, unseen)


def bert() -> Case:
  """keras-hub; longer position embeddings than the sentences."""
  import keras_hub

  model = keras_hub.models.BertBackbone(
    vocabulary_size=11, num_layers=1, num_heads=2, hidden_dim=8,
    intermediate_dim=12, dropout=0.0, max_sequence_length=9,
  )  # fmt: skip
  layer = 'transformer_layer_0/'
  kernels = {
    layer + 'feedforward_intermediate_dense/kernel': (8, 12),
    layer + 'feedforward_output_dense/kernel': (12, 8),
    'pooled_dense/kernel': (8, 8),
  }
  for name in ('query', 'key', 'value', 'attention_output'):
    kernels[f'{layer}self_attention_layer/{name}/kernel'] = (8, 8)
  unseen = {
    'token_embedding/embeddings': 'gather',
    'segment_embedding/embeddings': 'gather',
    'position_embedding/embeddings': 'used by add',
  }
  return _hub(model, kernels, unseen)


def llama() -> Case:
  """keras-hub; no biases, grouped queries, the head is not used."""
  import keras_hub

  model = keras_hub.models.LlamaBackbone(
    vocabulary_size=11, num_layers=1, num_query_heads=2, hidden_dim=8,
    intermediate_dim=12, num_key_value_heads=1,
  )  # fmt: skip
  layer = 'transformer_layer_0/'
  kernels = {
    layer + 'feedforward_gate_dense/kernel': (8, 12),
    layer + 'feedforward_intermediate_dense/kernel': (8, 12),
    layer + 'feedforward_output_dense/kernel': (12, 8),
    layer + 'self_attention/query/kernel': (8, 8),
    layer + 'self_attention/key/kernel': (8, 4),
    layer + 'self_attention/value/kernel': (8, 4),
    layer + 'self_attention/attention_output/kernel': (8, 8),
  }
  unseen = {
    'token_embedding/embeddings': 'gather',
    'token_embedding/reverse_embeddings': 'not used',
  }
  return _hub(model, kernels, unseen)

"""Layouts of convolutional networks and small transformers; see `layout`."""

from __future__ import annotations

from collections.abc import Iterable
import math
import re

import numpy as np

from utilized_rank.models.importing import by_shape
from utilized_rank.models.importing.layouts import Convert
from utilized_rank.models.importing.layouts import Layout
from utilized_rank.models.importing.layouts import Rule
from utilized_rank.models.importing.layouts import Shapes
from utilized_rank.models.importing.layouts import Usual
from utilized_rank.models.importing.layouts import batch_norm
from utilized_rank.models.importing.layouts import dense
from utilized_rank.models.importing.layouts import hwio
from utilized_rank.models.importing.layouts import same
from utilized_rank.models.importing.layouts import transposed


def _resnet(shapes: Shapes) -> Iterable[Rule]:
  """Of torchvision and timm, and the CIFAR networks named after them."""
  del shapes
  for block, ours in (('', ''), ('layer#.#.', 'layer#_#/')):
    for i in (1, 2, 3):
      yield Rule(f'{block}conv{i}.weight', f'{ours}conv{i}/kernel', hwio)
      yield from batch_norm(f'{block}bn{i}', f'{ours}bn{i}')
  yield Rule(
    'layer#.#.downsample.0.weight', 'layer#_#/conv_shortcut/kernel', hwio
  )
  yield from batch_norm('layer#.#.downsample.1', 'layer#_#/bn_shortcut')
  for head in ('fc', 'linear'):
    yield from dense(head, 'head')


def _flax_resnet(shapes: Shapes) -> Iterable[Rule]:
  """Blocks without stages: one begins where the stride needs a shortcut."""
  blocks = {int(m[1]) for n in shapes if (m := re.search(r'Block_(\d+)/', n))}
  parts = {'': ''}
  stage = place = 0
  for i in sorted(blocks):
    if f'params/ResNetBlock_{i}/Conv_2/kernel' in shapes:
      stage, place = stage + 1, 0
    parts[f'ResNetBlock_{i}/'] = f'layer{stage + 1}_{place}/'
    place += 1
  for theirs, ours in parts.items():
    for i, name in enumerate(('1', '2', '_shortcut')):
      for leaf in ('kernel', 'bias'):
        path = f'{ours}conv{name}/{leaf}'
        yield Rule(f'params/{theirs}Conv_{i}/{leaf}', path, same)
      for leaf in ('scale', 'bias'):
        path = f'{ours}bn{name}/{leaf}'
        yield Rule(f'params/{theirs}BatchNorm_{i}/{leaf}', path, same)
      for leaf in ('mean', 'var'):
        path = f'batch_stats/{ours}bn{name}/{leaf}'
        yield Rule(f'batch_stats/{theirs}BatchNorm_{i}/{leaf}', path, same)
  for leaf in ('kernel', 'bias'):
    yield Rule(f'params/Dense_0/{leaf}', f'head/{leaf}', same)


def _vgg(shapes: Shapes) -> Iterable[Rule]:
  """Layers by their places in two `nn.Sequential`."""
  convolutions = by_shape.places(shapes, 'features', 4)
  for i, place in enumerate(convolutions):
    yield from dense(f'features.{place}', f'conv{i}', hwio)
    if f'features.{place + 1}.running_mean' in shapes:
      yield from batch_norm(f'features.{place + 1}', f'bn{i}')
  channels = shapes[f'features.{convolutions[-1]}.weight'][0]
  layers = by_shape.places(shapes, 'classifier', 2)
  for i, place in enumerate(layers):
    path = 'head' if i == len(layers) - 1 else f'fc{i}'
    convert = transposed if i else _after_images(channels)
    yield from dense(f'classifier.{place}', path, convert)


def _after_images(channels: int) -> Convert:
  """A dense layer on flattened images: PyTorch's have the channels first."""

  def convert(x: np.ndarray) -> np.ndarray:
    side = math.isqrt(x.shape[1] // channels)
    images = x.reshape(x.shape[0], channels, side, side)
    return images.transpose(2, 3, 1, 0).reshape(-1, x.shape[0])

  return convert


def _keyword(shapes: Shapes) -> Iterable[Rule]:
  del shapes
  ours = 'Transformer/encoderblock_#/'
  yield Rule('class_emb', 'cls', same)
  yield Rule('pos_emb', 'Transformer/posembed_input/pos_embedding', same)
  attention = f'{ours}MultiHeadDotProductAttention_1'
  for leaf in ('kernel', 'bias'):
    yield Rule(f'embed/{leaf}', f'embedding/{leaf}', same)
    yield Rule(f'head/{leaf}', f'head/{leaf}', same)
    for name in ('query', 'key', 'value'):
      path = f'{attention}/{name}/{leaf}'
      yield Rule(f'block#/attn/{name[0]}/{leaf}', path, same)
    yield Rule(f'block#/attn/out/{leaf}', f'{attention}/out/{leaf}', same)
    for i in (0, 1):
      path = f'{ours}MlpBlock_3/Dense_{i}/{leaf}'
      yield Rule(f'block#/mlp/fc{i + 1}/{leaf}', path, same)
  for leaf in ('scale', 'bias'):
    for i in (1, 2):
      path = f'{ours}LayerNorm_{2 * i - 2}/{leaf}'
      yield Rule(f'block#/ln{i}/{leaf}', path, same)


_LLAMA_PARTS = ('query', 'key', 'value', 'out')
_MLP_PARTS = ('gate', 'up', 'down')


def _llama_c(shapes: Shapes) -> Iterable[Rule]:
  """Stacks of all layers, in the names of Llama's own code."""
  del shapes
  block = 'block_{layer}/'
  yield Rule('tok_emb', 'embedding/embedding', same)
  for name, ours in zip('qkvo', _LLAMA_PARTS, strict=True):
    yield Rule(f'w{name}', f'{block}{ours}/kernel', transposed)
  for number, ours in zip((1, 3, 2), _MLP_PARTS, strict=True):
    yield Rule(f'w{number}', f'{block}mlp/{ours}/kernel', transposed)
  yield Rule('att_norm', f'{block}attention_norm/scale', same)
  yield Rule('ffn_norm', f'{block}mlp_norm/scale', same)
  yield Rule('final_norm', 'norm/scale', same)
  yield Rule('out', 'head/kernel', transposed)


def _mlp(shapes: Shapes) -> Iterable[Rule]:
  del shapes
  for leaf in ('kernel', 'bias'):
    yield Rule(f'Dense_#/{leaf}', f'Dense_#/{leaf}', same)


_COUNTERS = (r'(.*\.)?num_batches_tracked',)

LAYOUTS = (
  Layout(
    'ResNet of torchvision, timm or CIFAR',
    ('layer1.0.conv1.weight',),
    _resnet,
    by_shape.resnet,
    ignored=_COUNTERS,
    assumed={
      'activation': Usual('relu'),
      'blur': Usual(None, "'average' in resnetaa, 'binomial' in resnetblur"),
    },
    architectures=True,
  ),
  Layout(
    'ResNet of Flax',
    ('params/ResNetBlock_0/Conv_0/kernel',),
    _flax_resnet,
    by_shape.resnet,
    settings={'padding': 'SAME'},
    assumed={'activation': Usual('relu', "'gelu_tanh'")},
  ),
  Layout(
    'VGG of torchvision',
    ('features.0.weight',),
    _vgg,
    by_shape.vgg,
    ignored=_COUNTERS,
  ),
  Layout(
    'keyword transformer',
    ('block0/attn/q/kernel',),
    _keyword,
    by_shape.keyword_transformer,
    heads={64: 1, 128: 2, 192: 3},
  ),
  Layout(
    'Llama of llama2.c',
    ('att_norm',),
    _llama_c,
    by_shape.llama,
    settings={'interleaved': True},
    assumed={'theta': Usual(1e4, '5e5 in Llama 3'), 'epsilon': Usual(1e-5)},
  ),
  Layout(
    'MLP of Flax',
    ('Dense_0/kernel',),
    _mlp,
    by_shape.mlp,
    assumed={'activation': Usual('relu', "'gelu_tanh'")},
  ),
)

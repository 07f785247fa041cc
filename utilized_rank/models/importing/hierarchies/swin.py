"""Layouts of Swin Transformers, and the model that shapes describe."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
import math
from typing import Any

import jax
import numpy as np

from utilized_rank.host.extras import extra
from utilized_rank.models.hierarchies.swin import Swin
from utilized_rank.models.importing import by_shape
from utilized_rank.models.importing.hierarchies import stages
from utilized_rank.models.importing.layouts import Layout
from utilized_rank.models.importing.layouts import Rule
from utilized_rank.models.importing.layouts import Shapes
from utilized_rank.models.importing.layouts import Usual
from utilized_rank.models.importing.layouts import dense
from utilized_rank.models.importing.layouts import fused
from utilized_rank.models.importing.layouts import hwio
from utilized_rank.models.importing.layouts import norm
from utilized_rank.models.importing.layouts import same

with extra('models'):
  import flax.linen as nn

_BLOCK = 'stage#_#/'
_ATTENTION = f'{_BLOCK}attention/'
_QKV = [f'{_ATTENTION}{name}' for name in ('query', 'key', 'value')]
_TABLE = f'{_ATTENTION}relative/table'
_SCALE = f'{_ATTENTION}logit_scale'
_ROOTS = ('swin.', 'swinv2.', '')
_FIRST = 'encoder.layers.0.blocks.0.layernorm_before.weight'
_FIRST_SCALE = 'encoder.layers.0.blocks.0.attention.self.logit_scale'


def _merging(shapes: Shapes, layers: str) -> Iterable[Rule]:
  """At the end of a stage, or in today's timm at the beginning of the next."""
  late = f'{layers}.0.downsample.norm.weight' in shapes
  for i in range(len(shapes)):
    if f'{layers}.{i}.downsample.norm.weight' in shapes:
      merge = f'merge{i + late}'
      yield from norm(f'{layers}.{i}.downsample.norm', f'{merge}_norm')
      yield from dense(f'{layers}.{i}.downsample.reduction', merge)


def _timm(shapes: Shapes) -> Iterable[Rule]:
  yield from dense('patch_embed.proj', 'embedding', hwio)
  yield from norm('patch_embed.norm', 'embedding_norm')
  yield from _merging(shapes, 'layers')
  block = 'layers.#.blocks.#.'
  yield from fused(f'{block}attn.qkv', _QKV)
  yield Rule(f'{block}attn.relative_position_bias_table', _TABLE, same)
  yield from dense(f'{block}attn.proj', f'{_ATTENTION}out')
  for i in (1, 2):
    yield from norm(f'{block}norm{i}', f'{_BLOCK}norm{i}')
    yield from dense(f'{block}mlp.fc{i}', f'{_BLOCK}mlp/Dense_{i - 1}')
  yield from norm('norm', 'norm')
  for head in ('head.fc', 'head'):  # new files, old files
    yield from dense(head, 'head')


def _timm_2(shapes: Shapes) -> Iterable[Rule]:
  yield from _timm(shapes)
  attention = 'layers.#.blocks.#.attn.'
  yield from _cosine(attention, 'cpb_mlp')
  for name in ('query', 'value'):
    bias = f'{_ATTENTION}{name}/bias'
    yield Rule(f'{attention}{name[0]}_bias', bias, same)


def _cosine(attention: str, network: str) -> Iterable[Rule]:
  """What cosine attention has beside kernels."""
  yield Rule(f'{attention}logit_scale', _SCALE, np.ravel)
  for i, name in ((0, 'hidden'), (2, 'out')):
    path = f'{_ATTENTION}positions/{name}'
    yield from dense(f'{attention}{network}.{i}', path)


def _hf(shapes: Shapes) -> Iterable[Rule]:
  """As version 5 of transformers saves, and as it has them in memory."""
  root = next(r for r in _ROOTS if f'{r}{_FIRST}' in shapes)
  patches = f'{root}embeddings.patch_embeddings.projection'
  yield from dense(patches, 'embedding', hwio)
  yield from norm(f'{root}embeddings.norm', 'embedding_norm')
  yield from _merging(shapes, f'{root}encoder.layers')
  block = f'{root}encoder.layers.#.blocks.#.'
  attention = f'{block}attention.'
  for name, path in zip(('query', 'key', 'value'), _QKV, strict=True):
    yield from dense(f'{attention}self.{name}', path)
    yield from dense(f'{attention}{name[0]}_proj', path)
  for name in ('self', 'relative_position_bias'):
    table = f'{attention}{name}.relative_position_bias_table'
    yield Rule(table, _TABLE, same)
  for name in ('output.dense', 'o_proj'):
    yield from dense(f'{attention}{name}', f'{_ATTENTION}out')
  for name, path in (
    ('intermediate.dense', 'Dense_0'),
    ('mlp.fc1', 'Dense_0'),
    ('output.dense', 'Dense_1'),
    ('mlp.fc2', 'Dense_1'),
  ):
    yield from dense(f'{block}{name}', f'{_BLOCK}mlp/{path}')
  yield from norm(f'{block}layernorm_before', f'{_BLOCK}norm1')
  yield from norm(f'{block}layernorm_after', f'{_BLOCK}norm2')
  yield from norm(f'{root}layernorm', 'norm')
  yield from dense('classifier', 'head')


def _hf_2(shapes: Shapes) -> Iterable[Rule]:
  yield from _hf(shapes)
  root = next(r for r in _ROOTS if f'{r}{_FIRST_SCALE}' in shapes)
  attention = f'{root}encoder.layers.#.blocks.#.attention.self.'
  yield from _cosine(attention, 'continuous_position_bias_mlp')


def swin(
  layout: Layout, mapped: Shapes, source: Shapes, options: Mapping[str, Any]
) -> tuple[nn.Module, jax.ShapeDtypeStruct]:
  """Of the form of `Layout.family`."""
  del layout, source
  options = stages.averaged(options)
  side = options.pop('input_size', None)
  patch, _, channels, width = mapped['params/embedding/kernel']
  depths = stages.depths(mapped)
  hidden = stages.of_first_blocks(mapped, 'mlp/Dense_0/kernel')
  if 'params/stage0_0/attention/logit_scale' in mapped:
    scales = stages.of_first_blocks(mapped, 'attention/logit_scale')
    heads = tuple(scale[0] for scale in scales)
    first = mapped['params/stage0_0/attention/positions/hidden/kernel']
    told = {'version': 2, 'position_dim': first[1]}
    windows = tuple(options.pop('windows'))
  else:
    tables = stages.of_first_blocks(mapped, 'attention/relative/table')
    heads = tuple(table[1] for table in tables)
    told = {}
    windows = tuple(_window(table[0]) for table in tables)
  model = by_shape.build(
    Swin,
    {
      **told,
      'num_classes': mapped.get('params/head/kernel', (0, 0))[1],
      'width': width,
      'depths': depths,
      'heads': heads,
      'windows': windows,
      'patch_size': patch,
      'mlp_dims': tuple(shape[1] for shape in hidden),
      'qkv_bias': 'params/stage0_0/attention/query/bias' in mapped,
    },
    options,
  )
  # One window covers what the last stage sees, in all that are published.
  side = side or windows[-1] * patch * 2 ** (len(depths) - 1)
  return model, by_shape.images(side, channels)


def _window(rows: int) -> int:
  """Side of the windows with so many offsets of two patches.

  >>> _window(13 * 13)
  7
  """
  window = (math.isqrt(rows) + 1) // 2
  if (2 * window - 1) ** 2 != rows:
    raise ValueError(
      f'a table of {rows} relative positions is of no square window.'
    )
  return window


_BUFFERS = (
  r'.*\.relative_position_index',
  r'.*\.relative_coords_table',
  r'.*\.attn_mask',
)
_MASK = (r'(.*\.)?mask_token', r'decoder\..*')
_ASSUMED = {'activation': Usual('gelu'), 'epsilon': Usual(1e-5)}
# The networks of positions have no shape that says windows.
_ASSUMED_2 = {
  **_ASSUMED,
  'windows': Usual((8, 8, 8, 8), 'what its name says, and at most the image'),
  'trained_windows': Usual(None, '(12, 12, 12, 6) behind 192to'),
}

LAYOUTS = (
  Layout(
    'Swin of timm or Microsoft',
    ('layers.0.blocks.0.attn.relative_position_bias_table',),
    _timm,
    swin,
    ignored=_BUFFERS,
    assumed=_ASSUMED,
    architectures=True,
  ),
  Layout(
    'Swin of Hugging Face',
    tuple(f'{root}{_FIRST}' for root in _ROOTS),
    _hf,
    swin,
    ignored=(*_BUFFERS, *_MASK),
    assumed=_ASSUMED,
    model_types=('swin',),
  ),
  Layout(
    'Swin V2 of timm or Microsoft',
    ('layers.0.blocks.0.attn.logit_scale',),
    _timm_2,
    swin,
    ignored=_BUFFERS,
    assumed=_ASSUMED_2,
    architectures=True,
  ),
  Layout(
    'Swin V2 of Hugging Face',
    tuple(f'{root}{_FIRST_SCALE}' for root in _ROOTS),
    _hf_2,
    swin,
    ignored=(*_BUFFERS, *_MASK),
    settings={'masked': -200.0},
    assumed=_ASSUMED_2,
    model_types=('swinv2',),
  ),
)

"""Layouts of ConvNeXt and ConvNeXt V2, and the model that shapes describe."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax

from utilized_rank.host.extras import extra
from utilized_rank.models.hierarchies.convnext import ConvNeXt
from utilized_rank.models.importing import by_shape
from utilized_rank.models.importing.hierarchies import stages
from utilized_rank.models.importing.layouts import Layout
from utilized_rank.models.importing.layouts import Rule
from utilized_rank.models.importing.layouts import Shapes
from utilized_rank.models.importing.layouts import Usual
from utilized_rank.models.importing.layouts import dense
from utilized_rank.models.importing.layouts import hwio
from utilized_rank.models.importing.layouts import norm
from utilized_rank.models.importing.layouts import pointwise
from utilized_rank.models.importing.layouts import same

with extra('models'):
  import flax.linen as nn

_BLOCK = 'stage#_#/'
_ROOTS = ('convnext.', 'convnextv2.', '')
_FIRST = 'encoder.stages.0.layers.0.dwconv.weight'


def _timm(shapes: Shapes) -> Iterable[Rule]:
  names = ('stem', 'stem2')
  for place, ours in zip(by_shape.places(shapes, 'stem', 4), names):
    yield from dense(f'stem.{place}', ours, hwio)
  for place in by_shape.places(shapes, 'stem', 1):
    yield from norm(f'stem.{place}', 'stem_norm')
  yield from norm('stages.#.downsample.0', 'downsample#_norm')
  yield from dense('stages.#.downsample.1', 'downsample#', hwio)
  block = 'stages.#.blocks.#.'
  yield from dense(f'{block}conv_dw', f'{_BLOCK}depthwise', hwio)
  yield from norm(f'{block}norm', f'{_BLOCK}norm')
  for i in (0, 1):
    yield from dense(f'{block}mlp.fc{i + 1}', f'{_BLOCK}Dense_{i}', pointwise)
  yield from norm(f'{block}mlp.grn', f'{_BLOCK}response_norm')
  yield Rule(f'{block}gamma', f'{_BLOCK}layer_scale/gamma', same)
  yield from norm('norm_pre', 'norm')
  yield from norm('head.norm', 'fc_norm')
  yield from dense('head.pre_logits.fc', 'pre_logits', pointwise)
  yield from dense('head.fc', 'head', pointwise)


def _hf(shapes: Shapes) -> Iterable[Rule]:
  root = next(r for r in _ROOTS if f'{r}{_FIRST}' in shapes)
  yield from dense(f'{root}embeddings.patch_embeddings', 'stem', hwio)
  yield from norm(f'{root}embeddings.layernorm', 'stem_norm')
  stage = f'{root}encoder.stages.#.'
  yield from norm(f'{stage}downsampling_layer.0', 'downsample#_norm')
  yield from dense(f'{stage}downsampling_layer.1', 'downsample#', hwio)
  block = f'{stage}layers.#.'
  yield from dense(f'{block}dwconv', f'{_BLOCK}depthwise', hwio)
  yield from norm(f'{block}layernorm', f'{_BLOCK}norm')
  for i in (0, 1):
    yield from dense(f'{block}pwconv{i + 1}', f'{_BLOCK}Dense_{i}')
  yield from norm(f'{block}grn', f'{_BLOCK}response_norm')
  path = f'{_BLOCK}layer_scale/gamma'
  yield Rule(f'{block}layer_scale_parameter', path, same)
  yield from norm(f'{root}layernorm', 'fc_norm')
  yield from dense('classifier', 'head')


def convnext(
  layout: Layout, mapped: Shapes, source: Shapes, options: Mapping[str, Any]
) -> tuple[nn.Module, jax.ShapeDtypeStruct]:
  """Of the form of `Layout.family`."""
  del layout
  options = stages.averaged(options)
  size, _, channels, width = mapped['params/stem/kernel']
  stem = 'patch'
  if 'params/stem2/kernel' in mapped:
    # The activation has a place in timm's nn.Sequential.
    between = by_shape.places(source, 'stem', 4) == [0, 2]
    stem = 'overlap_act' if between else 'overlap'
  depths = stages.depths(mapped)
  depthwise = stages.of_first_blocks(mapped, 'depthwise/kernel')
  hidden = stages.of_first_blocks(mapped, 'Dense_0/kernel')
  block = 'params/stage0_0/'
  _, before_head = mapped.get('params/pre_logits/kernel', (0, None))
  model = by_shape.build(
    ConvNeXt,
    {
      'num_classes': mapped.get('params/head/kernel', (0, 0))[1],
      'depths': depths,
      'widths': tuple(shape[-1] for shape in depthwise),
      'patch_size': size,
      'stem': stem,
      'stem_width': width if stem != 'patch' else None,
      'kernel_sizes': tuple(shape[0] for shape in depthwise),
      'mlp_dims': tuple(shape[-1] for shape in hidden),
      'layer_scale': 1e-6 if f'{block}layer_scale/gamma' in mapped else None,
      'response_norm': f'{block}response_norm/scale' in mapped,
      'conv_bias': 'params/stem/bias' in mapped,
      'norm_after_pool': 'params/norm/scale' not in mapped,
      'representation_size': before_head,
    },
    options,
  )
  return model, by_shape.images(224, channels)


LAYOUTS = (
  Layout(
    'ConvNeXt of timm',
    ('stages.0.blocks.0.conv_dw.weight',),
    _timm,
    convnext,
    assumed={
      'activation': Usual('gelu', "'gelu_tanh' and 'silu' in test models"),
      'epsilon': Usual(1e-6, '1e-5 in convnext_xxlarge'),
      'norm': Usual('layer', "'rms' in convnext_atto_rms"),
    },
    architectures=True,
  ),
  Layout(
    'ConvNeXt of Hugging Face',
    tuple(f'{root}{_FIRST}' for root in _ROOTS),
    _hf,
    convnext,
    settings={'epsilon': 1e-6},
    assumed={'activation': Usual('gelu'), 'last_epsilon': Usual(1e-12)},
    model_types=('convnext', 'convnextv2'),
  ),
)

"""Layouts of EfficientNet and its kin, and the model that shapes describe."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
import re
from typing import Any

import jax

from utilized_rank.host.extras import extra
from utilized_rank.models.hierarchies.efficientnet import EfficientNet
from utilized_rank.models.hierarchies.efficientnet import Parts
from utilized_rank.models.importing import by_shape
from utilized_rank.models.importing.hierarchies import stages
from utilized_rank.models.importing.layouts import Layout
from utilized_rank.models.importing.layouts import Rule
from utilized_rank.models.importing.layouts import Shapes
from utilized_rank.models.importing.layouts import Usual
from utilized_rank.models.importing.layouts import batch_norm
from utilized_rank.models.importing.layouts import dense
from utilized_rank.models.importing.layouts import hwio
from utilized_rank.models.importing.layouts import pointwise

with extra('models'):
  import flax.linen as nn

# The convolutions of timm's blocks in their order, each with a norm `bn#`: a
# separable convolution, an inverted residual, one of full convolutions, one.
_KINDS = (
  {'conv_dw': 'depthwise', 'conv_pw': 'project'},
  {'conv_pw': 'expand', 'conv_dw': 'depthwise', 'conv_pwl': 'project'},
  {'conv_exp': 'expand', 'conv_pwl': 'project'},
  {'conv': 'expand'},
)


def _conv_norm(conv: str, norm: str, block: str, part: str) -> Iterable[Rule]:
  yield from dense(conv, f'{block}conv_{part}', hwio)
  yield from batch_norm(norm, f'{block}bn_{part}')


def _timm(shapes: Shapes) -> Iterable[Rule]:
  yield from _conv_norm('conv_stem', 'bn1', '', 'stem')
  blocks: dict[tuple[str, str], set[str]] = {}
  for name in shapes:
    if m := re.fullmatch(r'blocks\.(\d+)\.(\d+)\.(conv\w*)\.weight', name):
      blocks.setdefault((m[1], m[2]), set()).add(m[3])
  for (i, j), found in blocks.items():
    theirs, ours = f'blocks.{i}.{j}.', f'stage{i}_{j}/'
    for kind in _KINDS:
      if set(kind) != found:
        continue
      for k, (conv, part) in enumerate(kind.items()):
        norm = f'{theirs}bn{k + 1}'
        yield from _conv_norm(theirs + conv, norm, ours, part)
  for name, path in (('reduce', 'squeeze'), ('expand', 'excite')):
    conv = f'blocks.#.#.se.conv_{name}'
    yield from dense(conv, f'stage#_#/{path}', pointwise)
  if 'bn2.weight' in shapes:
    yield from _conv_norm('conv_head', 'bn2', '', 'head')
  else:
    yield from dense('conv_head', 'pre_logits', pointwise)
  yield from dense('classifier', 'head')


def _flat(shapes: Shapes) -> Iterable[Rule]:
  """Blocks without stages: one begins where the width changes."""
  yield from _conv_norm('_conv_stem', '_bn0', '', 'stem')
  stage, place, width = -1, 0, None
  for i in range(by_shape.count(shapes, r'_blocks\.(\d+)\..*')):
    theirs = f'_blocks.{i}.'
    project = shapes[f'{theirs}_project_conv.weight'][0]
    stage, place = (stage + 1, 0) if project != width else (stage, place + 1)
    width, ours = project, f'stage{stage}_{place}/'
    for k, part in enumerate(('expand', 'depthwise', 'project')):
      conv = f'{theirs}_{part}_conv'
      yield from _conv_norm(conv, f'{theirs}_bn{k}', ours, part)
    for name, path in (('reduce', 'squeeze'), ('expand', 'excite')):
      yield from dense(f'{theirs}_se_{name}', f'{ours}{path}', pointwise)
  yield from _conv_norm('_conv_head', '_bn1', '', 'head')
  yield from dense('_fc', 'head')


def efficientnet(
  layout: Layout, mapped: Shapes, source: Shapes, options: Mapping[str, Any]
) -> tuple[nn.Module, jax.ShapeDtypeStruct]:
  """Of the form of `Layout.family`."""
  del layout, source
  options = stages.averaged(options)
  size, _, channels, width = mapped['params/conv_stem/kernel']
  pooled = 'params/pre_logits/kernel' in mapped
  last = 'params/pre_logits/kernel' if pooled else 'params/conv_head/kernel'
  model = by_shape.build(
    EfficientNet,
    {
      'num_classes': mapped.get('params/head/kernel', (0, 0))[1],
      'stem_width': width,
      'stem_size': size,
      'stages': tuple(
        tuple(_parts(mapped, f'params/stage{i}_{j}/') for j in range(depth))
        for i, depth in enumerate(stages.depths(mapped))
      ),
      'head_width': mapped.get(last, (None,))[-1],
      'pool_before_head': pooled,
      'head_bias': 'params/pre_logits/bias' in mapped,
    },
    options,
  )
  return model, by_shape.images(224, channels)


def _parts(mapped: Shapes, block: str) -> Parts:
  sizes: dict[str, Any] = {}
  for name in ('expand', 'depthwise', 'project'):
    kernel = mapped.get(f'{block}conv_{name}/kernel', (None,))
    sizes[name] = kernel[-1]
    if kernel[0] is not None:
      sizes[f'{name}_size'] = kernel[0]
  del sizes['depthwise']  # as wide as what it is given
  squeeze = mapped.get(f'{block}squeeze/kernel', (None,))[-1]
  return Parts(squeeze=squeeze, **sizes)


_COUNTERS = (r'(.*\.)?num_batches_tracked',)

LAYOUTS = (
  Layout(
    'EfficientNet or MobileNet of timm',
    ('conv_stem.weight',),
    _timm,
    efficientnet,
    ignored=_COUNTERS,
    assumed={
      'activation': Usual('silu', "'relu6' in Lite and V2 of MobileNet"),
      'stage_activations': Usual(None, 'two kinds in MobileNetV3'),
      'squeeze_activation': Usual(None, "'relu' in MobileNetV3"),
      'gate': Usual('sigmoid', "'hard_sigmoid' in MobileNetV3"),
      'strides': Usual((1, 2, 2, 2, 1, 2, 1), 'others in EfficientNetV2'),
      'without_shortcut': Usual((), '(0,) in efficientnet_el, mobilenetv3_rw'),
      'separable_activation': Usual(False, 'True in MobileNetV1'),
      'blur': Usual(False, 'True in efficientnet_blur_b0'),
      'padding': Usual('symmetric', "'SAME' where names begin with tf_"),
      'epsilon': Usual(1e-5, '1e-3 where names begin with tf_'),
    },
    architectures=True,
  ),
  Layout(
    'EfficientNet of efficientnet_pytorch',
    ('_conv_stem.weight',),
    _flat,
    efficientnet,
    ignored=_COUNTERS,
    # Of all that this code makes.
    settings={
      'strides': (1, 2, 2, 2, 1, 2, 1),
      'padding': 'SAME',
      'epsilon': 1e-3,
    },
    assumed={'activation': Usual('silu', "'relu6' in the Lite models")},
  ),
)

"""Layouts of Hugging Face's vision transformers; see `layout`."""

from __future__ import annotations

from collections.abc import Iterable
import math

import numpy as np

from utilized_rank.models.importing import by_shape
from utilized_rank.models.importing.layouts import Layout
from utilized_rank.models.importing.layouts import Rule
from utilized_rank.models.importing.layouts import Shapes
from utilized_rank.models.importing.layouts import Usual
from utilized_rank.models.importing.layouts import dense
from utilized_rank.models.importing.layouts import fused
from utilized_rank.models.importing.layouts import hwio
from utilized_rank.models.importing.layouts import norm
from utilized_rank.models.importing.layouts import same
from utilized_rank.models.importing.layouts import transposed
from utilized_rank.models.importing.vit_layouts import ACTIVATION
from utilized_rank.models.importing.vit_layouts import ATTENTION
from utilized_rank.models.importing.vit_layouts import BLOCK
from utilized_rank.models.importing.vit_layouts import HEADS
from utilized_rank.models.importing.vit_layouts import LAST_NORM
from utilized_rank.models.importing.vit_layouts import MAP
from utilized_rank.models.importing.vit_layouts import MAP_ATTENTION
from utilized_rank.models.importing.vit_layouts import MAP_QKV
from utilized_rank.models.importing.vit_layouts import MLP
from utilized_rank.models.importing.vit_layouts import POOL
from utilized_rank.models.importing.vit_layouts import POSITIONS
from utilized_rank.models.importing.vit_layouts import QKV
from utilized_rank.models.importing.vit_layouts import in_proj

_ROOTS = (
  'vit.',
  'deit.',
  'ijepa.',
  'dinov2.',
  'dinov2_with_registers.',
  'beit.',
  'model.',
  '',
)
_BLOCKS = ('encoder.layer.#.', 'layers.#.', 'layer.#.', 'encoder.layers.#.')


def _clip(shapes: Shapes) -> Iterable[Rule]:
  """CLIP and SigLIP; version 5 of transformers left out the prefix."""
  for root in ('vision_model.', ''):
    block, embeddings = f'{root}encoder.layers.#.', f'{root}embeddings.'
    patches = shapes.get(f'{embeddings}patch_embedding.weight', ())
    # SigLIP 2 multiplies patches that are flattened already.
    hard = hwio if len(patches) == 4 else _of_flat_patches
    yield from dense(f'{embeddings}patch_embedding', 'embedding', hard)
    yield Rule(f'{embeddings}class_embedding', 'cls', same)
    yield Rule(f'{embeddings}position_embedding.weight', POSITIONS, same)
    yield from norm(f'{root}pre_layrnorm', 'Transformer/pre_norm')
    yield from norm(f'{block}layer_norm1', f'{BLOCK}LayerNorm_0')
    for letter, path in zip('qkv', QKV, strict=True):
      yield from dense(f'{block}self_attn.{letter}_proj', path)
    yield from dense(f'{block}self_attn.out_proj', f'{ATTENTION}out')
    yield from norm(f'{block}layer_norm2', f'{BLOCK}LayerNorm_2')
    for i in (1, 2):
      yield from dense(f'{block}mlp.fc{i}', f'{MLP}Dense_{i - 1}')
    yield from norm(f'{root}post_layernorm', LAST_NORM)
    yield Rule(f'{root}head.probe', f'{MAP}probe', same)
    yield from in_proj(f'{root}head.attention.', MAP_QKV)
    yield from dense(f'{root}head.attention.out_proj', f'{MAP_ATTENTION}out')
    yield from norm(f'{root}head.layernorm', f'{MAP}LayerNorm_0')
    for i in (1, 2):
      path = f'{MAP}MlpBlock_0/Dense_{i - 1}'
      yield from dense(f'{root}head.mlp.fc{i}', path)
  yield Rule('visual_projection.weight', 'head/kernel', transposed)


def _of_flat_patches(x: np.ndarray) -> np.ndarray:
  """Rows, columns and three colours in one axis."""
  side = math.isqrt(x.shape[1] // 3)
  return x.T.reshape(side, side, 3, -1)


def _hf(shapes: Shapes) -> Iterable[Rule]:
  """ViT and what grew from it; version 5 of transformers renamed a part."""
  for root in (r for r in _ROOTS if any(n.startswith(r) for n in shapes)):
    yield from _hf_below(root)
  for name, path in (
    ('classifier', 'head'),
    ('cls_classifier', 'head'),
    ('distillation_classifier', 'head_distilled'),
  ):
    yield from dense(name, path)


def _hf_below(root: str) -> Iterable[Rule]:
  embeddings = f'{root}embeddings.'
  for name in (
    'patch_embeddings.projection',
    'patch_embeddings',
    'patch_embed',
  ):
    yield from dense(f'{embeddings}{name}', 'embedding', hwio)
  yield from norm(f'{embeddings}rms_norm', 'embedding_norm')
  yield Rule(f'{embeddings}cls_token', 'cls', same)
  yield Rule(f'{embeddings}distillation_token', 'distilled', same)
  yield Rule(f'{embeddings}register_tokens', 'registers', same)
  for name in ('position_embeddings', 'position_embedding.weight'):
    yield Rule(f'{embeddings}{name}', POSITIONS, same)
  for block in (f'{root}{name}' for name in _BLOCKS):
    for name in ('layernorm_before', 'norm1', 'rms_norm1'):
      yield from norm(f'{block}{name}', f'{BLOCK}LayerNorm_0')
    for name, path in zip(('query', 'key', 'value'), QKV, strict=True):
      yield from dense(f'{block}attention.attention.{name}', path)
      yield from dense(f'{block}attention.{name[0]}_proj', path)
    for name in ('output.dense', 'o_proj', 'out_proj'):
      yield from dense(f'{block}attention.{name}', f'{ATTENTION}out')
    for name in (
      'attention.attention.relative_position_bias.relative_position_bias_table',
      'relative_position_bias.relative_position_bias_table',
    ):
      yield Rule(f'{block}{name}', f'{ATTENTION}relative/table', same)
    for name in ('layernorm_after', 'norm2', 'rms_norm2'):
      yield from norm(f'{block}{name}', f'{BLOCK}LayerNorm_2')
    for i in (1, 2):
      for name in (f'layer_scale{i}.lambda1', f'lambda_{i}'):
        path = f'{BLOCK}LayerScale_{2 * i - 1}/gamma'
        yield Rule(f'{block}{name}', path, same)
    for name in ('intermediate.dense', 'mlp.fc1'):
      yield from dense(f'{block}{name}', f'{MLP}Dense_0')
    for name in ('output.dense', 'mlp.fc2'):
      yield from dense(f'{block}{name}', f'{MLP}Dense_1')
    yield from fused(f'{block}mlp.weights_in', [f'{MLP}gate', f'{MLP}up'])
    yield from dense(f'{block}mlp.weights_out', f'{MLP}down')
    for mlp in ('mlp', 'ffn'):
      for name in ('gate', 'up', 'down'):
        yield from dense(f'{block}{mlp}.{name}_proj', f'{MLP}{name}')
  for name in ('layernorm', 'norm', 'rms_norm'):
    yield from norm(f'{root}{name}', LAST_NORM)
  yield from norm(f'{root}pooler.layernorm', 'fc_norm')
  # A tanh layer on the class token; features are what is before it.
  for leaf in ('weight', 'bias'):
    yield Rule(f'{root}pooler.dense.{leaf}', '', same)


def _plain_mlp(shapes: Shapes) -> Iterable[Rule]:
  """DINOv3 without gates calls its two layers up and down."""
  gated = any(name.endswith('.mlp.gate_proj.weight') for name in shapes)
  for rule in _hf(shapes):
    if not gated and rule.path.startswith(f'{MLP}up'):
      rule = rule._replace(path=rule.path.replace('up', 'Dense_0'))
    elif not gated and rule.path.startswith(f'{MLP}down'):
      rule = rule._replace(path=rule.path.replace('down', 'Dense_1'))
    yield rule


def _flax(shapes: Shapes) -> Iterable[Rule]:
  """In Flax's own orders and names of leaves, as version 4 wrote them."""
  del shapes
  for rule in (*_hf_below('vit.'), *dense('classifier', 'head')):
    leaf = rule.path.rpartition('/')[2]
    pattern = rule.pattern.replace('.', '/')
    if pattern.endswith('/weight'):
      pattern = pattern.removesuffix('weight') + leaf
    yield Rule(pattern, rule.path, same)


def _anchors(*tails: str) -> tuple[str, ...]:
  return tuple(f'{root}{tail}' for root in _ROOTS for tail in tails)


_VIT = {
  'activation': ACTIVATION,
  'epsilon': Usual(1e-12, '1e-6'),
  'pool': POOL,
}
_NOT_MODEL = (r'(.*\.)?mask_token', r'(.*\.)?decoder\..*')

LAYOUTS = (
  Layout(
    'CLIP or SigLIP of Hugging Face',
    (
      'vision_model.encoder.layers.0.layer_norm1.weight',
      'encoder.layers.0.layer_norm1.weight',
    ),
    _clip,
    by_shape.vit,
    ignored=(
      r'text_model\..*',
      r'text_projection\.weight',
      r'logit_(scale|bias)',
      r'.*\.position_ids',
    ),
    settings={'resize': 'hf'},
    assumed={
      'activation': Usual('quick_gelu', "'gelu' in OpenCLIP, 'gelu_tanh'"),
      'epsilon': Usual(1e-5, '1e-6 in SigLIP'),
      'pool': POOL,
    },
    heads={**HEADS, 1664: 16},
    model_types=(
      'clip',
      'clip_vision_model',
      'siglip',
      'siglip_vision_model',
      'siglip2',
      'siglip2_vision_model',
    ),
  ),
  Layout(
    'ViT of Hugging Face',
    _anchors(
      'encoder.layer.0.layernorm_before.weight',
      'layers.0.layernorm_before.weight',
    ),
    _hf,
    by_shape.vit,
    ignored=_NOT_MODEL,
    settings={'resize': 'hf'},
    assumed=_VIT,
    heads=HEADS,
    model_types=('beit', 'deit', 'ijepa', 'vit', 'vit_mae', 'vit_msn'),
  ),
  Layout(
    'DINOv2 of Hugging Face',
    _anchors('encoder.layer.0.norm1.weight'),
    _hf,
    by_shape.vit,
    ignored=_NOT_MODEL,
    settings={'resize': 'hf'},
    assumed={**_VIT, 'epsilon': Usual(1e-6)},
    heads=HEADS,
    model_types=('dinov2', 'dinov2_with_registers'),
  ),
  Layout(
    'DINOv3 of Hugging Face',
    _anchors('layer.0.norm1.weight'),
    _plain_mlp,
    by_shape.vit,
    ignored=_NOT_MODEL,
    model_types=('dinov3_vit',),
    by_config=True,
  ),
  Layout(
    'AIMv2 of Hugging Face',
    ('encoder.layers.0.rms_norm1.weight',),
    _hf,
    by_shape.vit,
    ignored=_NOT_MODEL,
    settings={'resize': 'hf'},
    model_types=('aimv2_vision_model',),
    by_config=True,
  ),
  Layout(
    'Flax ViT of Hugging Face',
    ('vit/encoder/layer/0/layernorm_before/scale',),
    _flax,
    by_shape.vit,
    settings={'resize': 'hf'},
    assumed=_VIT,
    heads=HEADS,
  ),
)

"""Layouts of vision transformers; see `layout`."""

from __future__ import annotations

from collections.abc import Iterable

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

_BLOCK = 'Transformer/encoderblock_#/'
_ATTENTION = f'{_BLOCK}MultiHeadDotProductAttention_1/'
_MLP = f'{_BLOCK}MlpBlock_3/'
_QKV = [f'{_ATTENTION}{name}' for name in ('query', 'key', 'value')]
_POSITIONS = 'Transformer/posembed_input/pos_embedding'
_LAST_NORM = 'Transformer/encoder_norm'

# Published models; ViT-H of MAE and of OpenCLIP has heads of 80.
_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16, 1536: 24}
_TRAINING = (
  r'(optimizer|scaler|lr_schedulers?|scheduler|amp)\..*',
  r'(.*\.)?dino_loss\..*',
)


def _timm(shapes: Shapes) -> Iterable[Rule]:
  """Of timm, and of what grew out of it: DeiT, DINO, DINOv2, MAE, MoCo v3."""
  yield from dense('patch_embed.proj', 'embedding', hwio)
  yield Rule('cls_token', 'cls', same)
  yield Rule('reg_token', 'registers', same)
  yield Rule('register_tokens', 'registers', same)
  yield Rule('pos_embed', _POSITIONS, same)
  yield from norm('norm_pre', 'Transformer/pre_norm')
  yield from norm('blocks.#.norm1', f'{_BLOCK}LayerNorm_0')
  yield from fused('blocks.#.attn.qkv', _QKV)
  yield from norm('blocks.#.attn.q_norm', f'{_ATTENTION}query_norm')
  yield from norm('blocks.#.attn.k_norm', f'{_ATTENTION}key_norm')
  yield from dense('blocks.#.attn.proj', f'{_ATTENTION}out')
  yield Rule('blocks.#.ls1.gamma', f'{_BLOCK}LayerScale_1/gamma', same)
  yield from norm('blocks.#.norm2', f'{_BLOCK}LayerNorm_2')
  gated = [f'{_MLP}gate', f'{_MLP}up']
  yield from fused('blocks.#.mlp.w12', gated)
  yield from dense('blocks.#.mlp.w3', f'{_MLP}down')
  wide = shapes.get('blocks.0.mlp.fc1.weight', (0,))[0]
  if wide and wide == 2 * shapes['blocks.0.mlp.fc2.weight'][1]:
    # timm packs gate and up into fc1.
    yield from fused('blocks.#.mlp.fc1', gated)
    yield from dense('blocks.#.mlp.fc2', f'{_MLP}down')
  else:
    yield from dense('blocks.#.mlp.fc1', f'{_MLP}Dense_0')
    yield from dense('blocks.#.mlp.fc2', f'{_MLP}Dense_1')
  yield Rule('blocks.#.ls2.gamma', f'{_BLOCK}LayerScale_3/gamma', same)
  yield from norm('norm', _LAST_NORM)
  yield from norm('fc_norm', 'fc_norm')
  yield from dense('pre_logits.fc', 'pre_logits')
  yield from dense('head', 'head')


def _open_clip(shapes: Shapes) -> Iterable[Rule]:
  del shapes
  block = 'transformer.resblocks.#.'
  yield Rule('conv1.weight', 'embedding/kernel', hwio)
  yield Rule('class_embedding', 'cls', same)
  yield Rule('positional_embedding', _POSITIONS, same)
  yield from norm('ln_pre', 'Transformer/pre_norm')
  yield from norm(f'{block}ln_1', f'{_BLOCK}LayerNorm_0')
  yield from _in_proj(f'{block}attn.')
  yield from dense(f'{block}attn.out_proj', f'{_ATTENTION}out')
  yield Rule(f'{block}ls_1.gamma', f'{_BLOCK}LayerScale_1/gamma', same)
  yield from norm(f'{block}ln_2', f'{_BLOCK}LayerNorm_2')
  yield from dense(f'{block}mlp.c_fc', f'{_MLP}Dense_0')
  yield from dense(f'{block}mlp.c_proj', f'{_MLP}Dense_1')
  yield Rule(f'{block}ls_2.gamma', f'{_BLOCK}LayerScale_3/gamma', same)
  yield from norm('ln_post', _LAST_NORM)
  yield Rule('proj', 'head/kernel', same)


def _hf_clip(shapes: Shapes) -> Iterable[Rule]:
  del shapes
  block = 'vision_model.encoder.layers.#.'
  embeddings = 'vision_model.embeddings.'
  yield Rule(f'{embeddings}patch_embedding.weight', 'embedding/kernel', hwio)
  yield Rule(f'{embeddings}class_embedding', 'cls', same)
  yield Rule(f'{embeddings}position_embedding.weight', _POSITIONS, same)
  yield from norm('vision_model.pre_layrnorm', 'Transformer/pre_norm')
  yield from norm(f'{block}layer_norm1', f'{_BLOCK}LayerNorm_0')
  for letter, path in zip('qkv', _QKV, strict=True):
    yield from dense(f'{block}self_attn.{letter}_proj', path)
  yield from dense(f'{block}self_attn.out_proj', f'{_ATTENTION}out')
  yield from norm(f'{block}layer_norm2', f'{_BLOCK}LayerNorm_2')
  yield from dense(f'{block}mlp.fc1', f'{_MLP}Dense_0')
  yield from dense(f'{block}mlp.fc2', f'{_MLP}Dense_1')
  yield from norm('vision_model.post_layernorm', _LAST_NORM)
  yield Rule('visual_projection.weight', 'head/kernel', transposed)


def _hf(shapes: Shapes) -> Iterable[Rule]:
  """ViT, DINOv2 and its registers; version 5 of transformers renamed a part."""
  del shapes
  embeddings = 'embeddings.'
  yield from dense(
    f'{embeddings}patch_embeddings.projection', 'embedding', hwio
  )
  yield Rule(f'{embeddings}cls_token', 'cls', same)
  yield Rule(f'{embeddings}register_tokens', 'registers', same)
  yield Rule(f'{embeddings}position_embeddings', _POSITIONS, same)
  for block in ('encoder.layer.#.', 'layers.#.'):
    for name in ('layernorm_before', 'norm1'):
      yield from norm(f'{block}{name}', f'{_BLOCK}LayerNorm_0')
    for name, path in zip(('query', 'key', 'value'), _QKV, strict=True):
      yield from dense(f'{block}attention.attention.{name}', path)
      yield from dense(f'{block}attention.{name[0]}_proj', path)
    for name in ('output.dense', 'o_proj'):
      yield from dense(f'{block}attention.{name}', f'{_ATTENTION}out')
    for name in ('layernorm_after', 'norm2'):
      yield from norm(f'{block}{name}', f'{_BLOCK}LayerNorm_2')
    for i in (1, 2):
      yield Rule(
        f'{block}layer_scale{i}.lambda1',
        f'{_BLOCK}LayerScale_{2 * i - 1}/gamma',
        same,
      )
    for name in ('intermediate.dense', 'mlp.fc1'):
      yield from dense(f'{block}{name}', f'{_MLP}Dense_0')
    for name in ('output.dense', 'mlp.fc2'):
      yield from dense(f'{block}{name}', f'{_MLP}Dense_1')
    yield from fused(f'{block}mlp.weights_in', [f'{_MLP}gate', f'{_MLP}up'])
    yield from dense(f'{block}mlp.weights_out', f'{_MLP}down')
    for name in ('gate', 'up', 'down'):
      yield from dense(f'{block}mlp.{name}_proj', f'{_MLP}{name}')
  yield from norm('layernorm', _LAST_NORM)


def _hf_classifier(shapes: Shapes) -> Iterable[Rule]:
  for rule in _hf(shapes):
    yield rule._replace(pattern=f'vit.{rule.pattern}')
  yield from dense('classifier', 'head')


def _hf_flax(shapes: Shapes) -> Iterable[Rule]:
  for rule in _hf_classifier(shapes):
    # Flax's own orders and names of leaves.
    leaf = rule.path.rpartition('/')[2]
    pattern = rule.pattern.replace('.', '/')
    if pattern.endswith('/weight'):
      pattern = pattern.removesuffix('weight') + leaf
    yield Rule(pattern, rule.path, same)


def _torchvision(shapes: Shapes) -> Iterable[Rule]:
  del shapes
  block = 'encoder.layers.encoder_layer_#.'
  yield from dense('conv_proj', 'embedding', hwio)
  yield Rule('class_token', 'cls', same)
  yield Rule('encoder.pos_embedding', _POSITIONS, same)
  yield from norm(f'{block}ln_1', f'{_BLOCK}LayerNorm_0')
  yield from _in_proj(f'{block}self_attention.')
  yield from dense(f'{block}self_attention.out_proj', f'{_ATTENTION}out')
  yield from norm(f'{block}ln_2', f'{_BLOCK}LayerNorm_2')
  for names in (('0', '3'), ('linear_1', 'linear_2')):  # old files, new files
    for name, ours in zip(names, ('Dense_0', 'Dense_1'), strict=True):
      yield from dense(f'{block}mlp.{name}', f'{_MLP}{ours}')
  yield from norm('encoder.ln', _LAST_NORM)
  yield from dense('heads.head', 'head')


def _in_proj(prefix: str) -> Iterable[Rule]:
  """Of torch.nn.MultiheadAttention, whose q, k, v are its own parameters."""
  for rule in fused(f'{prefix}in_proj', _QKV):
    yield rule._replace(pattern=rule.pattern.replace('proj.', 'proj_'))


def _flax(shapes: Shapes) -> Iterable[Rule]:
  """AugReg and big_vision: our own names, or other numbers in them."""
  del shapes
  for leaf in ('kernel', 'bias'):
    for path in ('embedding', 'pre_logits', 'head'):
      yield Rule(f'{path}/{leaf}', f'{path}/{leaf}', same)
  yield Rule('cls', 'cls', same)
  yield Rule('pos_embedding', _POSITIONS, same)
  yield Rule(_POSITIONS, _POSITIONS, same)
  for leaf in ('scale', 'bias'):
    yield Rule(f'{_LAST_NORM}/{leaf}', f'{_LAST_NORM}/{leaf}', same)
  for block, ours in (
    ('Transformer/encoderblock_#/', _BLOCK),
    # A scanned model's stack of all blocks.
    ('Transformer/encoderblock/', _BLOCK.replace('#', '{layer}')),
  ):
    for theirs, number in (('LayerNorm_0', 0), ('LayerNorm_2', 2)):
      for leaf in ('scale', 'bias'):
        yield Rule(
          f'{block}{theirs}/{leaf}', f'{ours}LayerNorm_{number}/{leaf}', same
        )
    for leaf in ('scale', 'bias'):
      yield Rule(
        f'{block}LayerNorm_1/{leaf}', f'{ours}LayerNorm_2/{leaf}', same
      )
    for number in (0, 1):
      for name in ('query', 'key', 'value', 'out'):
        for leaf in ('kernel', 'bias'):
          tail = f'{name}/{leaf}'
          yield Rule(
            f'{block}MultiHeadDotProductAttention_{number}/{tail}',
            f'{ours}MultiHeadDotProductAttention_1/{tail}',
            same,
          )
    for number in (0, 3):
      for name in ('Dense_0', 'Dense_1'):
        for leaf in ('kernel', 'bias'):
          tail = f'{name}/{leaf}'
          yield Rule(
            f'{block}MlpBlock_{number}/{tail}', f'{ours}MlpBlock_3/{tail}', same
          )


_GELU = {'activation': 'gelu', 'resize': 'timm'}
_ACTIVATION = Usual('gelu', "'gelu_tanh' in SigLIP, 'quick_gelu' in CLIP")
_POOL = Usual(None, "None is as the tensors say; 'gap' or 'token'")
_ORDER = Usual('before', "'branch' in timm's rpn")
_TIMM = {
  'activation': _ACTIVATION,
  'epsilon': Usual(1e-6, '1e-5'),
  'pool': _POOL,
  'norm_order': _ORDER,
}
_HF_VIT = {'activation': _ACTIVATION, 'epsilon': Usual(1e-12, '1e-6')}
_CLIP = {
  'activation': Usual('quick_gelu', "'gelu' in OpenCLIP"),
  'pool': _POOL,
}

LAYOUTS = (
  Layout(
    'AugReg or big_vision',
    ('Transformer/encoder_norm/scale',),
    _flax,
    by_shape.vit,
    ignored=(r'(opt|extra)/.*',),
    settings={'activation': 'gelu_tanh', 'resize': 'big_vision'},
  ),
  Layout(
    'MoCo v3',
    ('head.0.weight',),
    _timm,
    by_shape.vit,
    # The projection heads; the momentum encoder is a copy in training.
    ignored=(
      *_TRAINING,
      r'.*base_encoder\.head\..*',
      r'.*(momentum_encoder|predictor)\..*',
    ),
    settings={**_GELU},
    heads={384: 12, 768: 12, 1024: 16, 1280: 16},
  ),
  Layout(
    'CLIP of timm',
    ('norm_pre.weight',),
    _timm,
    by_shape.vit,
    settings={'resize': 'timm'},
    assumed={**_TIMM, 'epsilon': Usual(1e-5, '1e-6')},
    heads=_HEADS,
    architectures=True,
  ),
  Layout(
    'timm, DINO, DINOv2 or MAE',
    ('patch_embed.proj.weight',),
    _timm,
    by_shape.vit,
    ignored=(
      *_TRAINING,
      r'(.*\.)?mask_token',
      r'(.*\.)?decoder_.*',
      r'student\..*',
      # Of DINO and iBOT, not a classifier.
      r'teacher\.(module\.)?(head\.(mlp|last_layer)|dino_head|ibot_head)\..*',
    ),
    settings={'resize': 'timm'},
    assumed=_TIMM,
    heads=_HEADS,
    architectures=True,
  ),
  Layout(
    'CLIP',
    ('transformer.resblocks.0.attn.in_proj_weight',),
    _open_clip,
    by_shape.vit,
    ignored=(
      r'(module\.)?transformer\.resblocks\..*',
      r'(module\.)?token_embedding\.weight',
      r'(module\.)?positional_embedding',
      r'(module\.)?ln_final\..*',
      r'(module\.)?(text_projection|logit_scale|logit_bias)',
      r'(input_resolution|context_length|vocab_size)',
    ),
    settings={'epsilon': 1e-5, 'resize': 'timm'},
    assumed=_CLIP,
    heads={**_HEADS, 1664: 16},
  ),
  Layout(
    'CLIP of Hugging Face',
    ('vision_model.embeddings.class_embedding',),
    _hf_clip,
    by_shape.vit,
    ignored=(
      r'text_model\..*',
      r'text_projection\.weight',
      r'logit_scale',
      r'.*\.position_ids',
    ),
    settings={'resize': 'hf'},
    assumed={
      'activation': _CLIP['activation'],
      'epsilon': Usual(1e-5),
      'pool': _POOL,
    },
    heads={**_HEADS, 1664: 16},
    model_types=('clip', 'clip_vision_model'),
  ),
  Layout(
    'ViT of Hugging Face',
    (
      'vit.encoder.layer.0.layernorm_before.weight',
      'vit.layers.0.layernorm_before.weight',
    ),
    _hf_classifier,
    by_shape.vit,
    ignored=(r'vit\.pooler\..*', r'.*mask_token', r'decoder\..*'),
    settings={'resize': 'hf'},
    assumed=_HF_VIT,
    heads=_HEADS,
    model_types=('vit',),
  ),
  Layout(
    'headless ViT of Hugging Face',
    (
      'encoder.layer.0.layernorm_before.weight',
      'layers.0.layernorm_before.weight',
    ),
    _hf,
    by_shape.vit,
    ignored=(r'(.*\.)?mask_token', r'pooler\..*'),
    settings={'resize': 'hf'},
    assumed=_HF_VIT,
    heads=_HEADS,
    model_types=('vit',),
  ),
  Layout(
    'DINOv2 of Hugging Face',
    ('encoder.layer.0.norm1.weight',),
    _hf,
    by_shape.vit,
    ignored=(r'(.*\.)?mask_token',),
    settings={'resize': 'hf'},
    assumed={'activation': _ACTIVATION, 'epsilon': Usual(1e-6)},
    heads=_HEADS,
    model_types=('dinov2', 'dinov2_with_registers'),
  ),
  Layout(
    'Flax ViT of Hugging Face',
    ('vit/encoder/layer/0/layernorm_before/scale',),
    _hf_flax,
    by_shape.vit,
    ignored=(r'vit/pooler/.*',),
    settings={'resize': 'hf'},
    assumed=_HF_VIT,
    heads=_HEADS,
    model_types=('vit',),
  ),
  Layout(
    'ViT of torchvision',
    ('encoder.layers.encoder_layer_0.ln_1.weight',),
    _torchvision,
    by_shape.vit,
    settings=_GELU,
    heads=_HEADS,
  ),
)

"""Layouts of vision transformers; see `layout`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

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

BLOCK = 'Transformer/encoderblock_#/'
ATTENTION = f'{BLOCK}MultiHeadDotProductAttention_1/'
MLP = f'{BLOCK}MlpBlock_3/'
QKV = [f'{ATTENTION}{name}' for name in ('query', 'key', 'value')]
POSITIONS = 'Transformer/posembed_input/pos_embedding'
LAST_NORM = 'Transformer/encoder_norm'
MAP = 'MAPHead_0/'
MAP_ATTENTION = f'{MAP}MultiHeadDotProductAttention_0/'
MAP_QKV = [f'{MAP_ATTENTION}{name}' for name in ('query', 'key', 'value')]

# Published models; ViT-H of MAE and of OpenCLIP has heads of 80.
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16, 1536: 24}
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
  yield Rule('pos_embed', POSITIONS, same)
  yield from norm('norm_pre', 'Transformer/pre_norm')
  yield from norm('blocks.#.norm1', f'{BLOCK}LayerNorm_0')
  yield Rule('dist_token', 'distilled', same)
  yield from norm('patch_embed.norm', 'embedding_norm')
  yield from fused('blocks.#.attn.qkv', QKV)
  for letter, path in zip('qkv', QKV, strict=True):
    yield from dense(f'blocks.#.attn.{letter}_proj', path)
    yield Rule(f'blocks.#.attn.{letter}_bias', f'{path}/bias', same)
  yield from norm('blocks.#.attn.norm', f'{ATTENTION}norm')
  table = 'blocks.#.attn.relative_position_bias_table'
  yield Rule(table, f'{ATTENTION}relative/table', same)
  yield from norm('blocks.#.attn.q_norm', f'{ATTENTION}query_norm')
  yield from norm('blocks.#.attn.k_norm', f'{ATTENTION}key_norm')
  yield from dense('blocks.#.attn.proj', f'{ATTENTION}out')
  for i in (1, 2):
    for name in (f'ls{i}.gamma', f'gamma_{i}'):
      path = f'{BLOCK}LayerScale_{2 * i - 1}/gamma'
      yield Rule(f'blocks.#.{name}', path, same)
  yield from norm('blocks.#.norm2', f'{BLOCK}LayerNorm_2')
  gated = [f'{MLP}gate', f'{MLP}up']
  yield from fused('blocks.#.mlp.w12', gated)
  yield from dense('blocks.#.mlp.w3', f'{MLP}down')
  yield from norm('blocks.#.mlp.norm', f'{MLP}norm')
  wide = shapes.get('blocks.0.mlp.fc1.weight', (0,))[0]
  if wide and wide == 2 * shapes['blocks.0.mlp.fc2.weight'][1]:
    # timm packs gate and up into fc1.
    yield from fused('blocks.#.mlp.fc1', gated)
    yield from dense('blocks.#.mlp.fc2', f'{MLP}down')
  elif 'blocks.0.mlp.fc1_g.weight' in shapes:
    for name, path in zip(('fc1_g', 'fc1_x'), gated, strict=True):
      yield from dense(f'blocks.#.mlp.{name}', path)
    yield from dense('blocks.#.mlp.fc2', f'{MLP}down')
  else:
    yield from dense('blocks.#.mlp.fc1', f'{MLP}Dense_0')
    yield from dense('blocks.#.mlp.fc2', f'{MLP}Dense_1')
  yield from norm('norm', LAST_NORM)
  yield from norm('fc_norm', 'fc_norm')
  yield from dense('pre_logits.fc', 'pre_logits')
  yield from dense('head', 'head')
  yield from dense('head_dist', 'head_distilled')
  yield Rule('attn_pool.latent', f'{MAP}probe', same)
  yield from dense('attn_pool.q', MAP_QKV[0])
  yield from fused('attn_pool.kv', MAP_QKV[1:])
  yield from dense('attn_pool.proj', f'{MAP_ATTENTION}out')
  yield from norm('attn_pool.norm', f'{MAP}LayerNorm_0')
  for i in (1, 2):
    yield from dense(f'attn_pool.mlp.fc{i}', f'{MAP}MlpBlock_0/Dense_{i - 1}')


def _open_clip(shapes: Shapes) -> Iterable[Rule]:
  del shapes
  block = 'transformer.resblocks.#.'
  yield Rule('conv1.weight', 'embedding/kernel', hwio)
  yield Rule('class_embedding', 'cls', same)
  yield Rule('positional_embedding', POSITIONS, same)
  yield from norm('ln_pre', 'Transformer/pre_norm')
  yield from norm(f'{block}ln_1', f'{BLOCK}LayerNorm_0')
  yield from in_proj(f'{block}attn.')
  yield from dense(f'{block}attn.out_proj', f'{ATTENTION}out')
  yield Rule(f'{block}ls_1.gamma', f'{BLOCK}LayerScale_1/gamma', same)
  yield from norm(f'{block}ln_2', f'{BLOCK}LayerNorm_2')
  yield from dense(f'{block}mlp.c_fc', f'{MLP}Dense_0')
  yield from dense(f'{block}mlp.c_proj', f'{MLP}Dense_1')
  yield Rule(f'{block}ls_2.gamma', f'{BLOCK}LayerScale_3/gamma', same)
  yield from norm('ln_post', LAST_NORM)
  yield Rule('proj', 'head/kernel', same)


def _torchvision(shapes: Shapes) -> Iterable[Rule]:
  del shapes
  block = 'encoder.layers.encoder_layer_#.'
  yield from dense('conv_proj', 'embedding', hwio)
  yield Rule('class_token', 'cls', same)
  yield Rule('encoder.pos_embedding', POSITIONS, same)
  yield from norm(f'{block}ln_1', f'{BLOCK}LayerNorm_0')
  yield from in_proj(f'{block}self_attention.')
  yield from dense(f'{block}self_attention.out_proj', f'{ATTENTION}out')
  yield from norm(f'{block}ln_2', f'{BLOCK}LayerNorm_2')
  for names in (('0', '3'), ('linear_1', 'linear_2')):  # old files, new files
    for name, ours in zip(names, ('Dense_0', 'Dense_1'), strict=True):
      yield from dense(f'{block}mlp.{name}', f'{MLP}{ours}')
  yield from norm('encoder.ln', LAST_NORM)
  yield from dense('heads.head', 'head')


def in_proj(prefix: str, paths: Sequence[str] = tuple(QKV)) -> Iterable[Rule]:
  """Of torch.nn.MultiheadAttention, whose q, k, v are its own parameters."""
  for rule in fused(f'{prefix}in_proj', paths):
    yield rule._replace(pattern=rule.pattern.replace('proj.', 'proj_'))


def _flax(shapes: Shapes) -> Iterable[Rule]:
  """AugReg and big_vision: our own names, or other numbers in them."""
  del shapes
  for leaf in ('kernel', 'bias'):
    for path in ('embedding', 'pre_logits', 'head'):
      yield Rule(f'{path}/{leaf}', f'{path}/{leaf}', same)
  yield Rule('cls', 'cls', same)
  yield Rule(f'{MAP}probe', f'{MAP}probe', same)
  for leaf in ('kernel', 'bias'):
    for path in (
      *MAP_QKV,
      f'{MAP_ATTENTION}out',
      f'{MAP}MlpBlock_0/Dense_0',
      f'{MAP}MlpBlock_0/Dense_1',
    ):
      yield Rule(f'{path}/{leaf}', f'{path}/{leaf}', same)
  for leaf in ('scale', 'bias'):
    path = f'{MAP}LayerNorm_0/{leaf}'
    yield Rule(path, path, same)
  yield Rule('pos_embedding', POSITIONS, same)
  yield Rule(POSITIONS, POSITIONS, same)
  for leaf in ('scale', 'bias'):
    yield Rule(f'{LAST_NORM}/{leaf}', f'{LAST_NORM}/{leaf}', same)
  for block, ours in (
    ('Transformer/encoderblock_#/', BLOCK),
    # A scanned model's stack of all blocks.
    ('Transformer/encoderblock/', BLOCK.replace('#', '{layer}')),
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
ACTIVATION = Usual('gelu', "'gelu_tanh' in SigLIP, 'quick_gelu' in CLIP")
POOL = Usual(None, "None is as the tensors say; 'gap' or 'token'")
_ORDER = Usual('before', "'branch' in timm's rpn")
_TIMM = {
  'activation': ACTIVATION,
  'epsilon': Usual(1e-6, '1e-5'),
  'pool': POOL,
  'norm_order': _ORDER,
  'rotation': Usual(None, 'not in EVA-02 and DINOv3'),
}
_CLIP = {
  'activation': Usual('quick_gelu', "'gelu' in OpenCLIP"),
  'pool': POOL,
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
    heads=HEADS,
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
      r'(.*\.)?rope\.periods',
      r'(.*\.)?decoder_.*',
      r'student\..*',
      # Of DINO and iBOT, not a classifier.
      r'teacher\.(module\.)?(head\.(mlp|last_layer)|dino_head|ibot_head)\..*',
    ),
    settings={'resize': 'timm'},
    assumed=_TIMM,
    heads=HEADS,
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
    heads={**HEADS, 1664: 16},
  ),
  Layout(
    'ViT of torchvision',
    ('encoder.layers.encoder_layer_0.ln_1.weight',),
    _torchvision,
    by_shape.vit,
    settings=_GELU,
    heads=HEADS,
    architectures=True,
  ),
)

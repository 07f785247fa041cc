"""Writes what timm's architecture names say, from timm's own modules.

  python tests/parity/timm_names.py

Needs the `parity` extra. Every architecture is built without memory for its
weights; those whose parts our models have go to
`utilized_rank/models/importing/timm_names.txt` with the options that no shape
tells. All of them, the others with the reason why they are refused, and what is
read of Hugging Face, go to `docs/checkpoints.md`, in which `hf_types.py` writes
a part of its own.
"""

from __future__ import annotations

import pathlib
import sys
import warnings

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import hf_types  # noqa: E402
import originals  # noqa: E402, F401 (torchvision is imported as it can be)
import timm  # noqa: E402
from timm import layers  # noqa: E402
from timm.layers.grn import GlobalResponseNorm  # noqa: E402
from timm.models import _efficientnet_blocks as mobile  # noqa: E402
from timm.models import beit  # noqa: E402
from timm.models import convnext  # noqa: E402
from timm.models import deit  # noqa: E402
from timm.models import efficientnet  # noqa: E402
from timm.models import eva  # noqa: E402
from timm.models import mobilenetv3  # noqa: E402
from timm.models import resnet  # noqa: E402
from timm.models import swin_transformer as swin  # noqa: E402
from timm.models import swin_transformer_v2 as swin_v2  # noqa: E402
from timm.models import vision_transformer as vit  # noqa: E402
import torch  # noqa: E402

import utilized_rank  # noqa: E402
from utilized_rank.models.importing import open_checkpoint  # noqa: E402

TABLE = 'models/importing/timm_names.txt'
POOLS = {'token': 'token', 'avg': 'gap', 'map': 'map'}
NORMS = (layers.LayerNorm, layers.RmsNorm, torch.nn.LayerNorm)
MLPS = (layers.Mlp, layers.SwiGLU, layers.SwiGLUPacked, layers.GluMlp)


class Unknown(Exception):
  """Has a part that our models do not have."""


def only(what, found, *known):
  if type(found) not in known and found not in known:
    raise Unknown(f'{what}: {found if found is None else type(found).__name__}')


def activation(module):
  name = type(module).__name__
  if name == 'GELU':
    exact = getattr(module, 'approximate', 'none') == 'none'
    return 'gelu' if exact else 'gelu_tanh'
  known = {'GELUTanh': 'gelu_tanh', 'QuickGELU': 'quick_gelu'}
  known |= {'ReLU': 'relu', 'SiLU': 'silu', 'QuickGELUActivation': 'quick_gelu'}
  known |= {'ReLU6': 'relu6', 'Hardswish': 'hard_swish', 'Swish': 'silu'}
  if name not in known:
    raise Unknown(f'activation: {name}')
  return known[name]


def mlp_facts(mlp):
  only('mlp', mlp, *MLPS)
  if isinstance(mlp, (layers.SwiGLU, layers.GluMlp)):
    if getattr(mlp, 'gate_last', False):
      raise Unknown('mlp: the gate is the second half')
    return {'gate_activation': activation(mlp.act), 'activation': 'gelu'}
  return {'activation': activation(mlp.act)}


def epsilon(model):
  norms = [m for m in model.modules() if 'Norm' in type(m).__name__]
  for norm in norms:
    only('norm', norm, *NORMS)
  if len({(type(n).__name__, n.eps) for n in norms}) > 1:
    raise Unknown('norms of several kinds')
  return norms[0].eps


def pool(model):
  name = model.global_pool
  if name not in POOLS:
    raise Unknown(f'pooling: {name}')
  if name == 'map':
    head = model.attn_pool
    only('pooling', head, vit.AttentionPoolLatent)
    if head.num_heads != model.blocks[0].attn.num_heads or head.latent_len != 1:
      raise Unknown('pooling: with heads of its own')
    if head.pos_embed is not None or isinstance(head.q, torch.nn.Identity):
      raise Unknown('pooling: with positions')
    return 'map_all' if getattr(model, 'pool_include_prefix', True) else 'map'
  whole = getattr(model, 'pool_include_prefix', False)
  return 'all' if whole and name == 'avg' else POOLS[name]


def transformer(model, blocks, **more):
  only('patch embedding', model.patch_embed, layers.PatchEmbed)
  for block in model.blocks:
    only('block', block, *blocks)
  block = model.blocks[0]
  if (
    getattr(model, 'fc_norm', None) is not None
    and type(model.norm) is type(model.fc_norm) is not torch.nn.Identity
  ):
    raise Unknown('a norm before and after the pooling')
  return {
    'heads': block.attn.num_heads,
    'epsilon': epsilon(model),
    'norm_order': 'before',
    'pool': pool(model),
    **mlp_facts(block.mlp),
    **more,
  }


def of_vit(model):
  for block in model.blocks:
    only('block', block, vit.Block, vit.ResPostBlock)
  only('attention', model.blocks[0].attn, vit.Attention)
  post = type(model.blocks[0]) is vit.ResPostBlock
  order = {'norm_order': 'branch' if post else 'before'}
  if type(model) is deit.VisionTransformerDistilled:
    order['distilled'] = 'average'
  return transformer(model, (vit.Block, vit.ResPostBlock), **order)


def of_eva(model):
  attention = model.blocks[0].attn
  only('attention', attention, eva.EvaAttention, eva.AttentionRope)
  if getattr(attention, 'gate', None) is not None:
    raise Unknown('attention: gated')
  kv = {getattr(b.attn, 'num_kv_heads', None) for b in model.blocks}
  if kv - {None, attention.num_heads}:
    raise Unknown('attention: heads that share keys')
  block = model.blocks[0]
  only('block', block, eva.EvaBlock)
  if (block.gamma_1 is None) != (block.gamma_2 is None):
    raise Unknown('layer scale on one branch')
  more = {}
  rope = model.rope
  if rope is not None:
    only(
      'rotation', rope, layers.RotaryEmbeddingCat, layers.RotaryEmbeddingDinoV3
    )
    if rope.grid_indexing != 'ij' or rope.grid_offset:
      raise Unknown('rotation: of another grid')
    centered = type(rope) is layers.RotaryEmbeddingDinoV3
    reference = getattr(rope, 'ref_feat_shape', None)
    more['rope'] = {
      'theta': float(rope.temperature),
      'centered': centered,
      'reference': None if reference is None else reference[0],
      'interleaved': not rope.rotate_half,
    }
    if model.pos_embed is None:
      more['input_size'] = model.pretrained_cfg['input_size'][-1]
  return transformer(model, (eva.EvaBlock,), **more)


def of_beit(model):
  if model.rel_pos_bias is not None:
    raise Unknown('relative positions that blocks share')
  return transformer(model, (beit.Block,))


def of_resnet(model):
  block = model.layer1[0]
  only('block', block, resnet.BasicBlock, resnet.Bottleneck)
  last = model.layer2[0]
  blurs = {'Identity': None, 'AvgPool2d': 'average', 'BlurPool2d': 'binomial'}
  if block.se is not None:
    raise Unknown('attention over channels')
  if any(
    m.groups > 1 for m in model.modules() if isinstance(m, torch.nn.Conv2d)
  ):
    raise Unknown('groups of channels')
  only('stem', model.conv1, torch.nn.Conv2d)
  only('norm', model.bn1, torch.nn.BatchNorm2d, layers.BatchNormAct2d)
  if block.conv1.out_channels != model.conv1.out_channels:
    raise Unknown('blocks of another width')
  if last.downsample is not None and not isinstance(
    last.downsample[0], torch.nn.Conv2d
  ):
    raise Unknown('shortcuts with a pooling')
  kind = type(last.aa).__name__
  if kind not in blurs or model.conv1.kernel_size != (7, 7):
    raise Unknown('stem or strides')
  if model.global_pool.pool_type != 'avg' or last.conv1.in_channels * 2 < 64:
    raise Unknown('pooling')
  if any(
    m.eps != 1e-5
    for m in model.modules()
    if isinstance(m, torch.nn.BatchNorm2d)
  ):
    raise Unknown('epsilon of the batch norms')
  return {'activation': activation(block.act1), 'blur': blurs[kind]}


def mean(model):
  if model.head.global_pool.pool_type != 'avg':
    raise Unknown(f'pooling: {model.head.global_pool.pool_type}')
  return 'gap'


def of_convnext(model):
  norms = {
    layers.LayerNorm: 'layer',
    layers.LayerNorm2d: 'layer',
    layers.RmsNorm: 'rms',
    layers.RmsNorm2d: 'rms',
  }
  others = (convnext.NormMlpClassifierHead, GlobalResponseNorm)
  others += (layers.GlobalResponseNormMlp,)
  found = [
    m
    for m in model.modules()
    if 'Norm' in type(m).__name__ and not isinstance(m, others)
  ]
  for norm in found:
    only('norm', norm, *norms)
  kinds = {(norms[type(m)], m.eps) for m in found}
  if len(kinds) > 1:
    raise Unknown('norms of several kinds')
  ((norm, epsilon),) = kinds
  for stage in model.stages:
    for block in stage.blocks:
      only('shortcut', block.shortcut, torch.nn.Identity)
      only('mlp', block.mlp, layers.Mlp, layers.GlobalResponseNormMlp)
  act = activation(model.stages[0].blocks[0].mlp.act)
  hidden = getattr(model.head, 'pre_logits', torch.nn.Identity())
  if type(hidden) is not torch.nn.Identity and activation(hidden.act) != act:
    raise Unknown('activation: another in the head')
  return {
    'activation': act,
    'epsilon': epsilon,
    'norm': norm,
    'pool': mean(model),
  }


def of_swin(model):
  only('patch embedding', model.patch_embed, layers.PatchEmbed)
  rows = model.patch_embed.grid_size[0]
  for stage in model.layers:
    for block in stage.blocks:
      window = block.window_size
      if block.always_partition or rows % window[0] or len(set(window)) > 1:
        raise Unknown('windows that do not divide the image')
    rows = -(-rows // 2)
  if block.window_size[0] != block.input_resolution[0]:
    raise Unknown('the last windows do not cover the image')
  return {
    'activation': activation(block.mlp.act),
    'epsilon': epsilon(model),
    'pool': mean(model),
  }


def of_swin_v2(model):
  first = [stage.blocks[0] for stage in model.layers]
  return {
    **of_swin(model),
    'windows': tuple(block.window_size[0] for block in first),
    'trained_windows': tuple(
      block.attn.pretrained_window_size[0] for block in first
    ),
  }


BLOCKS = {
  mobile.DepthwiseSeparableConv: ('conv_dw', 'conv_pw'),
  mobile.InvertedResidual: ('conv_pw', 'conv_dw', 'conv_pwl'),
  mobile.EdgeResidual: ('conv_exp', 'conv_pwl'),
  mobile.ConvBnAct: ('conv',),
}
GATES = {'Sigmoid': 'sigmoid', 'Hardsigmoid': 'hard_sigmoid'}


def convolutions(model):
  """Whose padding it is."""
  found = [m for m in model.modules() if hasattr(m, 'kernel_size')]
  for conv in found:
    sides = {*conv.kernel_size}
    if len(sides) > 1 or max(conv.dilation) > 1 or not max(sides) % 2:
      raise Unknown('convolution: of another form')
    if conv.groups not in (1, conv.in_channels):
      raise Unknown('groups of channels')
  strided = {type(m) for m in found if max(m.stride) > 1}
  if len(strided) > 1:
    raise Unknown('paddings of several kinds')
  same = strided == {layers.Conv2dSame}
  for conv in found:
    if type(conv) is torch.nn.Conv2d and (
      conv.padding != (conv.kernel_size[0] // 2,) * 2
    ):
      raise Unknown('convolution: of another padding')
  return 'SAME' if same else 'symmetric'


def mobile_block(block, strides):
  """Activations of a block and of its squeeze-and-excitation, and more."""
  only('block', block, *BLOCKS)
  if getattr(block, 'conv_s2d', None) is not None:
    raise Unknown('block: from space to depth')
  names = BLOCKS[type(block)]
  convs = [getattr(block, name) for name in names]
  for conv in convs:
    only('convolution', conv, torch.nn.Conv2d, layers.Conv2dSame)
  acts = [getattr(block, f'bn{i + 1}').act for i in range(len(convs))]
  separable = type(block) is mobile.DepthwiseSeparableConv
  final = acts.pop() if type(block) is not mobile.ConvBnAct else None
  ends = final is not None and type(final) is not torch.nn.Identity
  if ends and not separable:
    raise Unknown('block: an activation at its end')
  acts = {activation(act) for act in acts}
  if len(acts) > 1 or (ends and {activation(final)} != acts):
    raise Unknown('activation: several in a block')
  aa = getattr(block, 'aa', torch.nn.Identity())
  stride = max(conv.stride[0] for conv in convs)
  blurs = type(aa) is layers.BlurPool2d
  if blurs:
    if aa.filt_size != 3 or aa.pad_mode != 'constant':
      raise Unknown('blur: of another form')
    stride = aa.stride
  else:
    only('blur', aa, torch.nn.Identity)
  strides.append((stride, blurs))
  fits = stride == 1 and convs[0].in_channels == convs[-1].out_channels
  if block.has_skip and not (fits and not ends):
    raise Unknown('block: a shortcut')
  bare = not block.has_skip if fits and not ends else None
  se = getattr(block, 'se', torch.nn.Identity())
  only('attention over channels', se, torch.nn.Identity, mobile.SqueezeExcite)
  squeeze = gate = None
  if type(se) is mobile.SqueezeExcite:
    squeeze, gate = activation(se.act1), type(se.gate).__name__
    if gate not in GATES:
      raise Unknown(f'gate: {gate}')
  return acts.pop(), squeeze, gate, ends if separable else None, bare


def one_of(what, values):
  values = {value for value in values if value is not None}
  if len(values) > 1:
    raise Unknown(f'{what}: several')
  return values.pop() if values else None


def of_efficientnet(model):
  norms = [m for m in model.modules() if 'Norm' in type(m).__name__]
  for norm in norms:
    if type(norm) is not mobile.ConvBnAct:
      only('norm', norm, layers.BatchNormAct2d)
  first, found, stages, blurs, bare = [], [], [], set(), []
  for i, stage in enumerate(model.blocks):
    strides = []
    blocks = [mobile_block(block, strides) for block in stage]
    if any(stride != 1 for stride, _ in strides[1:]):
      raise Unknown('strides within a stage')
    first.append(strides[0][0])
    blurs |= {b for stride, b in strides if stride > 1}
    stages.append(one_of('activation', (b[0] for b in blocks)))
    if one_of('shortcuts', (b[4] for b in blocks)):
      bare.append(i)
    found += blocks
  if model.global_pool.pool_type != 'avg':
    raise Unknown(f'pooling: {model.global_pool.pool_type}')
  late = type(model) is mobilenetv3.MobileNetV3
  if late:
    only('head', model.norm_head, torch.nn.Identity)
  act = activation(model.bn1.act)
  last = model.act2 if late else getattr(model.bn2, 'act', model.bn1.act)
  one_of('activation', (act, activation(last)))
  squeezes = {
    None if squeeze == whole else squeeze
    for whole, squeeze, *_ in found
    if squeeze is not None
  }
  if None in squeezes and len(squeezes) > 1:  # of some it is the block's own
    squeezes = {squeeze for _, squeeze, *_ in found}
  return {
    'activation': act,
    'stage_activations': None if {act} == {*stages} else tuple(stages),
    'squeeze_activation': one_of('activation of the gate', squeezes),
    'gate': GATES[one_of('gate', (b[2] for b in found)) or 'Sigmoid'],
    'strides': tuple(first),
    'without_shortcut': tuple(bare),
    'separable_activation': bool(one_of('blocks', (b[3] for b in found))),
    'blur': bool(one_of('blur', blurs)),
    'padding': convolutions(model),
    'epsilon': one_of('epsilon', (getattr(n, 'eps', None) for n in norms)),
    'pool': 'gap',
  }


KINDS = {
  efficientnet.EfficientNet: of_efficientnet,
  mobilenetv3.MobileNetV3: of_efficientnet,
  vit.VisionTransformer: of_vit,
  deit.VisionTransformerDistilled: of_vit,
  eva.Eva: of_eva,
  beit.Beit: of_beit,
  convnext.ConvNeXt: of_convnext,
  resnet.ResNet: of_resnet,
  swin.SwinTransformer: of_swin,
  swin_v2.SwinTransformerV2: of_swin_v2,
}


MODULES = {'timm.models.hardcorenas', *(kind.__module__ for kind in KINDS)}


def facts(name):
  module = timm.model_entrypoint(name).__module__
  if module not in MODULES:
    raise Unknown(f'of {module}')
  with torch.device('meta'), warnings.catch_warnings():
    warnings.simplefilter('ignore')
    model = timm.create_model(name, pretrained=False)
  if type(model) not in KINDS:
    raise Unknown(f'a {type(model).__name__}')
  return KINDS[type(model)](model)


HEAD = """# Checkpoints that load

Written by `python tests/parity/timm_names.py` with timm {timm}. What is not
here is refused with a reason: no model is read as a near relative.

`tests/parity` compares outputs with the original code on random weights at
small sizes in float32: every `model_type` of the first table, and one name of
timm for each kind of block, norm, pooling and positions in the last but one.
The bar is 1e-4 of the largest output; the largest difference that was found is
4.1e-6.
What a name says of other sizes of the same kind is not compared one by one, and
a tensor that does not fit is an error.

## Hugging Face, by `model_type`

A directory, or a file with its `config.json` beside it or given as `config=`.
Keys of a config that nobody reads are an error, and so are kinds of rotary
positions other than `default`, `linear`, `llama3` and `yarn`.

| layout | `model_type` |
|---|---|
{hugging_face}

{types}

## timm, by the architecture's name

The name is in the `config.json` of timm's repositories, in what timm's training
script saves, or given as `architecture=`. A name that loads says what the
tensors' shapes do not:

| what the name says | names |
|---|---|
{named}

The others are refused; for the reasons:

| reason | names |
|---|---|
{refused}
"""


def rows(groups):
  return '\n'.join(
    f'| {key} | {" ".join(f"`{name}`" for name in names)} |'
    for key, names in groups.items()
  )


def hugging_face():
  return '\n'.join(
    f'| {x.name} | {", ".join(f"`{t}`" for t in x.model_types)} |'
    for x in open_checkpoint.LAYOUTS
    if x.model_types and not x.name.startswith('headless')
  )


def main():
  groups: dict[str, list[str]] = {}
  refused: dict[str, list[str]] = {}
  for name in timm.list_models():
    try:
      groups.setdefault(repr(facts(name)), []).append(name)
    except Unknown as reason:
      refused.setdefault(str(reason), []).append(name)
  package = pathlib.Path(utilized_rank.__file__).parent
  lines = [f'{key}\n' + '\n'.join(names) for key, names in groups.items()]
  (package / TABLE).write_text('\n'.join(lines) + '\n')
  path = package.parent / 'docs' / 'checkpoints.md'
  text = HEAD.format(
    timm=timm.__version__,
    hugging_face=hugging_face(),
    types=hf_types.kept(path.read_text()),
    named=rows({f'`{key[1:-1]}`': names for key, names in groups.items()}),
    refused=rows(refused),
  )
  path.write_text(text)


if __name__ == '__main__':
  main()

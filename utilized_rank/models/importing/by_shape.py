"""Models whose hyper-parameters are read off the shapes of their leaves.

Each function has the form of `layouts.Layout.family`. The shapes are those of
the file: heads are not apart where the file has them together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
import dataclasses
import itertools
import math
import re
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from utilized_rank.host.extras import extra
from utilized_rank.models.bert import Bert
from utilized_rank.models.gpt import GPT
from utilized_rank.models.kwt import KeywordTransformer
from utilized_rank.models.llama import Llama
from utilized_rank.models.mlp import MLP
from utilized_rank.models.positions import square_grid
from utilized_rank.models.resnet import ResNet
from utilized_rank.models.rotary import GridRotation
from utilized_rank.models.vgg import VGG
from utilized_rank.models.vit import ViT

with extra('models'):
  import flax.linen as nn

if TYPE_CHECKING:
  from utilized_rank.models.importing.layouts import Layout

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
Options = Mapping[str, Any]
Built = tuple[nn.Module, jax.ShapeDtypeStruct]


def vit(
  layout: Layout, mapped: Shapes, source: Shapes, options: Options
) -> Built:
  del source
  options = dict(options)
  block = 'params/Transformer/encoderblock_0/'
  attention = f'{block}MultiHeadDotProductAttention_1/'
  mlp = f'{block}MlpBlock_3/'
  patch, _, channels, width = mapped['params/embedding/kernel']
  class_token = 'params/cls' in mapped
  distilled = 'params/distilled' in mapped
  registers = mapped.get('params/registers', (0, 0, 0))[-2]
  before = class_token + distilled
  side, tokens = _grid(mapped, patch, options, (before, before + registers))
  query = mapped[f'{attention}query/kernel']
  if len(query) == 3:
    heads = query[1]
  elif f'{attention}relative/table' in mapped:
    heads = mapped[f'{attention}relative/table'][1]
  elif f'{attention}query_norm/scale' in mapped:
    heads = width // mapped[f'{attention}query_norm/scale'][0]
  else:
    heads = options['heads']
  if (rope := options.pop('rope', None)) is not None:
    options['rotation'] = grid_rotation(width // heads, **rope)
  swiglu = f'{mlp}gate/kernel' in mapped
  hidden = 'gate' if swiglu else 'Dense_0'
  norm_after_pool = 'params/fc_norm/scale' in mapped
  head = mapped.get('params/head/kernel', (0, 0))
  pool = 'token' if class_token and not norm_after_pool else 'gap'
  if 'params/MAPHead_0/probe' in mapped:
    pool = 'map'
  elif head[0] == 2 * width:
    pool = 'token_and_gap'
  model = build(
    ViT,
    {
      'num_classes': head[1],
      'patch_size': patch,
      'width': width,
      'depth': count(mapped, r'params/Transformer/encoderblock_(\d+)/.*'),
      'heads': heads,
      'mlp_dim': mapped[f'{mlp}{hidden}/kernel'][1],
      'pool': pool,
      'class_token': class_token,
      'distilled': 'token' if distilled else None,
      'positions': 'params/Transformer/posembed_input/pos_embedding' in mapped,
      'class_position': tokens > 0,
      'registers': registers,
      'register_position': tokens > before,
      'representation_size': mapped.get('params/pre_logits/kernel', (0, None))[
        1
      ],
      'patch_bias': 'params/embedding/bias' in mapped,
      'patch_norm': 'params/embedding_norm/scale' in mapped,
      'head_bias': 'params/head/bias' in mapped,
      'pre_norm': 'params/Transformer/pre_norm/scale' in mapped,
      'last_norm': norm_after_pool
      or 'params/Transformer/encoder_norm/scale' in mapped,
      'norm_after_pool': norm_after_pool,
      'swiglu': swiglu,
      'mlp_bias': f'{mlp}{hidden}/bias' in mapped,
      'mlp_norm': f'{mlp}norm/scale' in mapped,
      'qkv_bias': f'{attention}query/bias' in mapped,
      'key_bias': f'{attention}key/bias' in mapped,
      'out_bias': f'{attention}out/bias' in mapped,
      'attention_norm': f'{attention}norm/scale' in mapped,
      'relative_positions': f'{attention}relative/table' in mapped,
      'qk_norm': f'{attention}query_norm/scale' in mapped,
      'norm': 'layer' if f'{block}LayerNorm_0/bias' in mapped else 'rms',
      'layer_scale': 1e-5 if f'{block}LayerScale_1/gamma' in mapped else None,
    },
    options,
  )
  return model, images(side * patch, channels)


def _grid(
  mapped: Shapes, patch: int, options: dict[str, Any], before: Shape
) -> tuple[int, int]:
  """Side of the grid of patches, and tokens that have a position."""
  asked = options.pop('input_size', None)
  table = mapped.get('params/Transformer/posembed_input/pos_embedding')
  relative = mapped.get(
    'params/Transformer/encoderblock_0/MultiHeadDotProductAttention_1/'
    'relative/table'
  )
  if table is not None:
    found = square_grid(table[-2], sorted({0, *before}))
    if found is None:
      raise ValueError(
        f'{table[-2]} position embeddings are no square grid of patches, with '
        f'none or {" or ".join(map(str, sorted(set(before))))} tokens in front.'
      )
    return found[0][0], found[1]
  if relative is not None:
    return (math.isqrt(relative[0] - 3) + 1) // 2, 0
  if options.get('rotation') is None and options.get('rope') is None:
    raise KeyError('params/Transformer/posembed_input/pos_embedding')
  return (asked or 224) // patch, 0


def grid_rotation(
  head_dim: int,
  theta: float,
  centered: bool,
  reference: int | None = None,
  interleaved: bool = False,
) -> GridRotation:
  """Of DINOv3 (`centered`) or EVA-02, for heads of that width."""
  rates = theta ** -(np.arange(head_dim // 4) / (head_dim // 4))
  turns = 2 * np.pi if centered else 1.0
  return GridRotation(
    tuple(float(rate) for rate in turns * rates),
    centered,
    reference,
    interleaved,
  )


def resnet(
  layout: Layout, mapped: Shapes, source: Shapes, options: Options
) -> Built:
  del layout, source
  size, _, channels, width = mapped['params/conv1/kernel']
  stages = count(mapped, r'params/layer(\d+)_.*', first=1)
  shortcut = 'pad'
  if any('conv_shortcut' in path for path in mapped):
    norms = any('bn_shortcut' in path for path in mapped)
    shortcut = 'norm' if norms else 'conv'
  model = build(
    ResNet,
    {
      'num_classes': mapped['params/head/kernel'][1],
      'stages': tuple(
        count(mapped, rf'params/layer{i + 1}_(\d+)/.*') for i in range(stages)
      ),
      'width': width,
      'bottleneck': 'params/layer1_0/conv3/kernel' in mapped,
      'small_images': size == 3,
      'shortcut': shortcut,
    },
    options,
  )
  return model, images(32 if size == 3 else 224, channels)


def vgg(
  layout: Layout, mapped: Shapes, source: Shapes, options: Options
) -> Built:
  del layout
  widths = [
    mapped[f'params/conv{i}/kernel'][3]
    for i in range(count(mapped, r'params/conv(\d+)/kernel'))
  ]
  batch_norm = 'batch_stats/bn0/mean' in mapped
  at = places(source, 'features', 4)
  stages: list[list[int]] = [[widths[0]]]
  for (before, after), width in zip(
    itertools.pairwise(at), widths[1:], strict=True
  ):
    # A pooling lies between them.
    if after - before > (3 if batch_norm else 2):
      stages.append([])
    stages[-1].append(width)
  hidden = [
    mapped[f'params/fc{i}/kernel'][1]
    for i in range(count(mapped, r'params/fc(\d+)/kernel'))
  ]
  first = mapped['params/fc0/kernel' if hidden else 'params/head/kernel'][0]
  pool_size = math.isqrt(first // widths[-1])
  model = build(
    VGG,
    {
      'num_classes': mapped['params/head/kernel'][1],
      'stages': tuple(map(tuple, stages)),
      'hidden': tuple(hidden),
      'pool_size': pool_size,
      'batch_norm': batch_norm,
    },
    options,
  )
  side = pool_size * 2 ** len(stages)
  return model, images(side, mapped['params/conv0/kernel'][2])


def keyword_transformer(
  layout: Layout, mapped: Shapes, source: Shapes, options: Options
) -> Built:
  del source
  coefficients, width = mapped['params/embedding/kernel']
  block = 'params/Transformer/encoderblock_0/'
  model = build(
    KeywordTransformer,
    {
      'num_classes': mapped['params/head/kernel'][1],
      'width': width,
      'depth': count(mapped, r'params/Transformer/encoderblock_(\d+)/.*'),
      'heads': options['heads'],
      'mlp_dim': mapped[f'{block}MlpBlock_3/Dense_0/kernel'][1],
    },
    options,
  )
  positions = mapped['params/Transformer/posembed_input/pos_embedding'][-2]
  shape = (1, positions - 1, coefficients)
  return model, jax.ShapeDtypeStruct(shape, jnp.float32)


def _of_tokens(
  mapped: Shapes, options: Options
) -> tuple[dict[str, Any], jax.ShapeDtypeStruct]:
  """Sizes of a transformer with learnt positions, and its input."""
  vocabulary, width = mapped['params/embedding/embedding']
  context = mapped['params/positions'][0]
  sizes = {
    'vocabulary': vocabulary,
    'context': context,
    'width': width,
    'depth': count(mapped, r'params/block_(\d+)/.*'),
    'heads': options['heads'],
    'mlp_dim': mapped['params/block_0/MlpBlock_3/Dense_0/kernel'][1],
  }
  return sizes, jax.ShapeDtypeStruct((1, context), jnp.int32)


def gpt(
  layout: Layout, mapped: Shapes, source: Shapes, options: Options
) -> Built:
  del layout
  sizes, tokens = _of_tokens(mapped, options)
  model = build(
    GPT,
    {
      **sizes,
      'tied': 'params/head/kernel' not in mapped,
      'head': any(name.startswith('transformer.') for name in source),
    },
    options,
  )
  return model, tokens


def bert(
  layout: Layout, mapped: Shapes, source: Shapes, options: Options
) -> Built:
  del layout, source
  sizes, tokens = _of_tokens(mapped, options)
  classes = mapped.get('params/head/kernel', (0, 0))[1]
  output = 'vocabulary' if 'params/logits_bias' in mapped else 'tokens'
  model = build(
    Bert,
    {
      **sizes,
      'types': mapped.get('params/types/embedding', (0,))[0],
      'output': 'classes' if classes else output,
      'num_classes': classes,
    },
    options,
  )
  return model, tokens


def llama(
  layout: Layout, mapped: Shapes, source: Shapes, options: Options
) -> Built:
  del layout
  vocabulary, width = mapped['params/embedding/embedding']
  heads = options['heads']
  head_dim = mapped['params/block_0/query/kernel'][1] // heads
  qk_norm = None
  if norm := mapped.get('params/block_0/query_norm/scale'):
    qk_norm = 'head' if norm[0] == head_dim else 'width'
  model = build(
    Llama,
    {
      'vocabulary': vocabulary,
      'width': width,
      'depth': count(mapped, r'params/block_(\d+)/.*'),
      'heads': heads,
      'kv_heads': mapped['params/block_0/key/kernel'][1] // head_dim,
      'mlp_dim': mapped['params/block_0/mlp/gate/kernel'][1],
      'head_dim': head_dim,
      'tied': 'params/head/kernel' not in mapped,
      'qkv_bias': 'params/block_0/query/bias' in mapped,
      'out_bias': 'params/block_0/out/bias' in mapped,
      'mlp_bias': 'params/block_0/mlp/gate/bias' in mapped,
      'qk_norm': qk_norm,
      # A model saved without a head has no name in front.
      'head': 'embed_tokens.weight' not in source,
    },
    options,
  )
  return model, jax.ShapeDtypeStruct((1, 8), jnp.int32)


def mlp(
  layout: Layout, mapped: Shapes, source: Shapes, options: Options
) -> Built:
  del layout, source
  kernels = [
    mapped[f'params/Dense_{i}/kernel']
    for i in range(count(mapped, r'params/Dense_(\d+)/kernel'))
  ]
  model = build(MLP, {'widths': tuple(k[1] for k in kernels)}, options)
  return model, jax.ShapeDtypeStruct((1, kernels[0][0]), jnp.float32)


def places(shapes: Shapes, sequential: str, ndim: int) -> list[int]:
  """Where in an `nn.Sequential` the weights of so many axes are.

  >>> places({'f.0.weight': (2, 3), 'f.1.weight': (2,)}, 'f', 2)
  [0]
  """
  pattern = re.compile(re.escape(sequential) + r'\.(\d+)\.weight')
  return sorted(
    int(m[1])
    for name, shape in shapes.items()
    if len(shape) == ndim and (m := pattern.fullmatch(name))
  )


def width_without_heads(mapped: Shapes) -> int | None:
  """Width of the queries where no shape tells how many heads they have."""
  told = set(mapped)
  for path, shape in mapped.items():
    if path.endswith('/query/kernel') and len(shape) == 2:
      attention = path.removesuffix('query/kernel')
      if {f'{attention}{x}' for x in ('relative/table', 'logit_scale')} & told:
        return None  # it has a number for each head
      norm = mapped.get(path.replace('query/kernel', 'query_norm/scale'))
      # A norm per head is as wide as a head.
      return shape[1] if norm in (None, (shape[1],)) else None
  return None


def build(kind: type, read: dict[str, Any], options: Options) -> nn.Module:
  known = {f.name for f in dataclasses.fields(kind)} - {'parent', 'name'}
  if unknown := set(options) - known:
    raise TypeError(
      f'{kind.__name__} has no options {sorted(unknown)}; it has '
      f'{sorted(known)}.'
    )
  told = {k: v for k, v in options.items() if v is not None or k not in read}
  return kind(**{**read, **told})


def count(paths: Iterable[str], pattern: str, first: int = 0) -> int:
  """How many there are of what is numbered without a gap."""
  numbers = {int(m[1]) for path in paths if (m := re.fullmatch(pattern, path))}
  expected = set(range(first, first + len(numbers)))
  if numbers != expected:
    raise ValueError(f'the numbers {sorted(numbers)} in {pattern} have a gap.')
  return len(numbers)


def images(side: int, channels: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct((1, side, side, channels), jnp.float32)

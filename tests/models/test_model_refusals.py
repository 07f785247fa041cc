"""What models and loaders refuse, each in a call of its own."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from utilized_rank.models import bert
from utilized_rank.models import positions
from utilized_rank.models import resnet
from utilized_rank.models import stacking
from utilized_rank.models import transformer_parts
from utilized_rank.models import vit
from utilized_rank.models.importing import layouts
from utilized_rank.models.importing import model_types
from utilized_rank.models.importing import open_checkpoint
from utilized_rank.models.importing import vision_types
from utilized_rank.models.importing.config import Config
from utilized_rank.models.importing.files import factored
from utilized_rank.models.importing.files import safetensors_file
from utilized_rank.models.importing.files import shards

GEMMA = dict(
  hidden_size=8,
  num_attention_heads=2,
  num_hidden_layers=2,
  intermediate_size=8,
  vocab_size=9,
)


def made(model, *inputs):
  return jax.eval_shape(model.init, jax.random.key(0), *inputs)


def sentence(length=4, **more):
  sizes = dict(vocabulary=9, context=8, width=8, depth=1, heads=2, mlp_dim=8)
  return made(bert.Bert(**sizes, **more), jnp.zeros((1, length), jnp.int32))


def image(model):
  return made(model, jnp.zeros((1, 8, 8, 3)))


def gemma(kind, **more):
  config = Config({**GEMMA, **more}, 'the config')
  return model_types._FACTS[kind](config)


def pieces():
  rule, *_ = layouts.fused('qkv', ['q', 'k'], [1, 2])
  return rule.convert(np.ones((4, 2)))


CASES = {
  'more tokens than there are positions': (
    lambda: sentence(length=9),
    r'9 tokens do not fit into context=8\.',
  ),
  'an output that a sentence has not': (
    lambda: sentence(output='words'),
    "output='words'; it is one of",
  ),
  'two grids that fit': (
    lambda: positions.square_grid(5, before=(1, 4)),
    r'5 positions are \(2, 2\) patches behind 1 tokens or \(1, 1\) behind 4',
  ),
  'a blur that is none': (
    lambda: image(resnet.ResNet(num_classes=2, stages=(1,), blur='sinc')),
    "blur='sinc'; it is one of",
  ),
  'stacked blocks of two depths': (
    lambda: stacking.unstack_blocks(
      {'Transformer': {'encoderblock': {'a': np.ones(2), 'b': np.ones(3)}}}
    ),
    r'leading axes of lengths \[2, 3\]',
  ),
  'positions without a grid': (
    lambda: transformer_parts.BlockOptions(2, 8, relative_positions=True),
    'need grid=',
  ),
  'a distillation that is none': (
    lambda: image(vit.ViT(2, patch_size=4, width=8, heads=2, distilled='both')),
    "distilled='both'; it is None, 'token' or 'average'",
  ),
  'a key that the config has not': (
    lambda: Config({'a': 1}, 'the config')('width'),
    r"the config has no width; it has \['a'\]",
  ),
  'layers of a kind that is not known': (
    lambda: gemma('gemma2', layer_types=['full_attention', 'linear']),
    r"the config has layer_types \['linear'\]",
  ),
  'two activations': (
    lambda: gemma('gemma', hidden_act='gelu', hidden_activation='silu'),
    "has hidden_act 'gelu' and hidden_activation 'silu'",
  ),
  'a rotation for no kind of layer': (
    lambda: gemma('gemma3_text', rope_parameters={'rope_theta': 1e4}),
    'has rope_parameters for no kind of layer',
  ),
  'images that are no squares': (
    lambda: vision_types._side(Config({'image_size': [8, 9]}, 'the config')),
    r'the config has image_size \[8, 9\], which is no square',
  ),
  'parts that do not divide': (
    pieces,
    r'an axis of 4 does not divide into parts as \[1, 2\]',
  ),
  'pairs of another format': (
    lambda: factored.Factored.of(
      {f'__metadata__.{factored.KEY}': {'format': 99}}
    ),
    'in format 99, known here is',
  ),
  'a pair that is not there': (
    lambda: factored.Factored(None, {}, {'w': {'a': 'w.a', 'b': 'w.b'}}).leaf(
      'w', {}, (2, 2), np.float32
    ),
    r"w should be in \['w.a', 'w.b'\], which are not there",
  ),
  'a type that safetensors has not': (
    lambda: safetensors_file.header({'x': (np.dtype('c16'), (2,))}, {}),
    'x is of type complex128; known are',
  ),
}


@pytest.mark.parametrize('name', CASES)
def test_it_is_refused(name):
  call, message = CASES[name]
  with pytest.raises(ValueError, match=message):
    call()


def test_files_that_are_none(tmp_path):
  path = tmp_path / 'model.safetensors'
  path.write_bytes((4).to_bytes(8, 'little') + b'[1] ')
  with pytest.raises(
    ValueError, match='has no header of safetensors'
  ) as raised:
    safetensors_file.read(str(path))
  assert 'a list is none' in str(raised.value.__cause__)
  index = tmp_path / 'model.safetensors.index.json'
  index.write_text(json.dumps({'weight_map': ['a', 'b']}))
  with pytest.raises(ValueError, match='index.json has no weight_map'):
    shards._indexed(str(index))


def test_a_model_that_no_layout_is_of():
  metadata = types.SimpleNamespace(
    architecture=None, config={'model_type': 'llama5'}, source='config.json'
  )
  with pytest.raises(ValueError, match="has model_type 'llama5', which is not"):
    open_checkpoint._candidates(metadata)

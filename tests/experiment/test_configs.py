"""Every config fits the options that it is read into."""

import dataclasses
import re

import ml_collections
import pytest

from configs import cifar_resnet
from configs import cifar_vgg
from configs import digits_vit
from configs import imagenet_resnet50
from configs import imagenet_vit_b16
from configs import imagenet_vit_l16
from configs import self_supervised
from configs import ssl_vit
from configs import tfds_vit
from utilized_rank.data import splits
from utilized_rank.host import options
from utilized_rank.models import vit
from utilized_rank.training import train
from utilized_rank.training.config import FinetuneConfig

CONFIGS = {
  'digits': digits_vit.get_config(),
  'digits:testing': digits_vit.get_config('testing'),
  'cifar10': tfds_vit.get_config(),
  'imagenet2012': tfds_vit.get_config('imagenet2012'),
}


@pytest.mark.quick
@pytest.mark.parametrize('name', CONFIGS)
def test_sections_are_read(name):
  config = CONFIGS[name]
  options.from_config(splits.DataConfig, config.data, 'config.data')
  options.from_config(train.TrainConfig, config.train, 'config.train')
  options.from_config(FinetuneConfig, config.finetune, 'config.finetune')
  # Flags can only override what is there.
  keys = {field.name for field in dataclasses.fields(FinetuneConfig)}
  assert set(config.finetune) == keys - {'seed'}
  fields = {field.name for field in dataclasses.fields(vit.ViT)}
  assert set(config.model) <= fields
  assert set(config.model) >= {'patch_size', 'width', 'depth', 'heads'}


# Their sections are read in test_paper_configs.py.
PAPER = {
  module.__name__: module.get_config()
  for module in (
    cifar_resnet,
    cifar_vgg,
    imagenet_resnet50,
    imagenet_vit_b16,
    imagenet_vit_l16,
    self_supervised,
    ssl_vit,
  )
}


@pytest.mark.parametrize('argument', self_supervised.ARGUMENTS)
def test_self_supervised(argument):
  config = self_supervised.get_config(argument)
  options.from_config(splits.DataConfig, config.data, 'config.data')
  for section in (config.supervised, config.masked):
    options.from_config(train.TrainConfig, section, 'config.train')
  with pytest.raises(ValueError, match='argument is one of cpu, gpu'):
    self_supervised.get_config('tpu')


@pytest.mark.parametrize('name', [*CONFIGS, *PAPER])
def test_no_lists(name):
  """ml_collections cannot override a list on the command line."""

  def check(value):
    assert not isinstance(value, list)
    if isinstance(value, ml_collections.ConfigDict):
      for child in value.values():
        check(child)

  check((CONFIGS | PAPER)[name])


@pytest.mark.parametrize(
  ('path', 'selected'),
  [
    ('params/Transformer/encoderblock_0/MlpBlock_3/Dense_1/kernel', True),
    (
      'params/Transformer/encoderblock_11/MultiHeadDotProductAttention_1/'
      'out/kernel',
      True,
    ),
    ('params/Transformer/encoderblock/MlpBlock_3/Dense_0/kernel', True),
    ('params/Transformer/encoderblock_0/MlpBlock_3/Dense_1/bias', False),
    ('params/Transformer/encoder_norm/scale', False),
    ('params/head/kernel', False),
    ('params/embedding/kernel', False),
  ],
)
def test_rules_select_the_block_kernels(path, selected):
  rules = CONFIGS['digits'].compress.select
  assert next(take for rule, take in rules if re.fullmatch(rule, path)) is (
    selected
  )


def test_unknown_argument():
  with pytest.raises(ValueError, match="argument is 'testing'"):
    digits_vit.get_config('tiny')

"""The paper's configs, each through the whole pipeline on tiny made data."""

import importlib
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from utilized_rank.experiment import network
from utilized_rank.experiment import pipeline
from utilized_rank.models.resnet import ResNet
from utilized_rank.models.vit import ViT
from utilized_rank.tree import paths

pytestmark = pytest.mark.slow

CLASSES = 3


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Made images, and checkpoints of tiny networks as others write them."""
  path = tmp_path_factory.mktemp('paper')
  rng = np.random.default_rng(0)
  for name, count in (('train', 40), ('test', 12)):
    images = rng.integers(0, 256, (count, 18, 20, 3), np.uint8)
    labels = (np.arange(count) % CLASSES).astype(np.uint8)
    np.savez(path / f'{name}.npz', x=images, y=labels)
  vit = dict(patch_size=8, width=8, depth=1, heads=2, mlp_dim=16)
  np.savez(path / 'vit.npz', **augreg(ViT(CLASSES, **vit)))
  np.savez(path / 'headless.npz', **augreg(ViT(0, **vit)))
  model = ResNet(CLASSES, stages=(1, 1), width=4, bottleneck=True)
  np.savez(path / 'resnet.npz', **torchvision(variables_of(model)))
  return path


def variables_of(model):
  shapes = jax.eval_shape(
    model.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3))
  )
  rng = np.random.default_rng(0)
  draw = lambda x: rng.uniform(0.1, 1, x.shape) / math.sqrt(x.size)
  return jax.tree.map(lambda x: draw(x).astype(np.float32), shapes)


def augreg(model):
  return paths.flatten(variables_of(model)['params'])[0]


def torchvision(variables):
  """Our tree of a ResNet under torchvision's names."""
  leaves = {}
  params, stats = (paths.flatten(variables[k])[0] for k in variables)
  norm = {'scale': 'weight', 'mean': 'running_mean', 'var': 'running_var'}
  for path, value in {**params, **stats}.items():
    *layer, leaf = path.replace('head', 'fc').split('/')
    name = '.'.join(layer)
    number, _, block = name.partition('_')
    if name.startswith('layer'):
      name = f'{number}.{block}'
    name = name.replace('conv_shortcut', 'downsample.0')
    name = name.replace('bn_shortcut', 'downsample.1')
    if leaf == 'kernel':
      leaf = 'weight'
      value = value.T if value.ndim == 2 else value.transpose(3, 2, 0, 1)
    leaves[f'{name}.{norm.get(leaf, leaf)}'] = value
  return leaves


def config_of(name, folder, checkpoint=None, **overrides):
  config = importlib.import_module(f'configs.{name}').get_config('testing')
  config.data.data_dir = str(folder)
  if checkpoint:
    config.checkpoint.path = str(folder / checkpoint)
  config.update_from_flattened_dict(overrides)
  return config


@pytest.mark.parametrize(
  ('name', 'checkpoint', 'kernels'),
  [
    ('imagenet_vit_b16', 'vit.npz', 6),
    ('imagenet_vit_l16', 'vit.npz', 6),
    ('imagenet_resnet50', 'resnet.npz', 8),
    ('cifar_resnet', None, 5),
    ('cifar_vgg', None, 2),
  ],
)
def test_the_whole_pipeline(name, checkpoint, kernels, folder, tmp_path):
  config = config_of(name, folder, checkpoint)
  if name == 'imagenet_vit_l16':  # in place of a budget of predicted damage
    config.compress.allocation = 'compress'
  result = pipeline.run(config, tmp_path / 'run')
  assert len(result['layers']) == kernels
  first = 'restore' if checkpoint else 'train'
  assert (tmp_path / 'run' / 'stages' / f'{first}.json').exists()
  assert first in result['seconds']
  (small,) = result['compressed']
  for run in (result['dense'], small):
    assert run['test_count'] == 12
    assert run['test_accuracy'] == run['test_correct'] / 12
    # Five of three classes.
    assert run['test_top5_accuracy'] == 1.0
  assert small['kernel_params'] <= 0.5 * result['dense']['kernel_params']
  assert small['test_accuracy_before_finetune'] is not None
  assert all(layer['count'] % 8 == 0 for layer in result['layers'])


def test_self_supervised_encoders_are_measured_alone(folder, tmp_path):
  config = config_of('ssl_vit', folder, 'headless.npz')
  result = pipeline.run(config, tmp_path / 'run')
  assert len(result['layers']) == 6
  assert result['compressed'] == []
  assert result['dense']['test_accuracy'] is None
  json.dumps(result, allow_nan=False)
  assert '<!doctype html>' in (tmp_path / 'run' / 'report.html').read_text()


def test_folded_batch_norms(folder, tmp_path):
  images = np.random.default_rng(0).normal(size=(2, 16, 16, 3))
  logits = []
  for fold in (False, True):
    overrides = {'checkpoint.fold_batch_norm': fold}
    config = config_of('imagenet_resnet50', folder, 'resnet.npz', **overrides)
    job = pipeline.Job(config, tmp_path / f'{fold}')
    job.workdir.stage('restore', job.restore)
    assert ('batch_stats' in job.dense) is not fold
    logits.append(job.forward(job.dense, images))
  # Kernels are scaled in float64 and rounded to float32.
  np.testing.assert_allclose(*logits, rtol=1e-4, atol=1e-5)


def test_the_checkpoint_is_what_is_measured(folder, tmp_path):
  """The run's numbers are those of the file's weights."""
  config = config_of('ssl_vit', folder, 'headless.npz')
  job = pipeline.Job(config, tmp_path / 'run')
  job.workdir.stage('restore', job.restore)
  kernel = job.dense['params']['embedding']['kernel']
  with np.load(folder / 'headless.npz') as file:
    np.testing.assert_array_equal(kernel, file['embedding/kernel'])


@pytest.mark.parametrize(
  ('name', 'arguments', 'numbers'),
  [
    ('imagenet_vit_b16', [None, ''], ['35 %', '50 %', '0.2 %']),
    ('imagenet_vit_l16', [None, ''], ['20 %', '25 %', '0.2 %']),
    ('imagenet_resnet50', [None, ''], ['could not establish']),
    ('cifar_resnet', ['train', 'checkpoint'], ['could not establish']),
    ('cifar_vgg', ['train', 'checkpoint'], ['could not establish']),
    ('ssl_vit', ['mae', 'dino', 'dinov2', 'clip'], ['up to 70 %']),
  ],
)
def test_every_argument_is_a_config(name, arguments, numbers, tmp_path):
  module = importlib.import_module(f'configs.{name}')
  for argument in arguments:
    config = module.get_config(argument)
    if 'checkpoint' in config:
      with pytest.raises(ValueError, match='checkpoint.path is not given'):
        pipeline.Job(config, tmp_path / 'run')
      config.checkpoint.path = 'file.npz'
    pipeline.Job(config, tmp_path / f'run_{argument}')
  text = ' '.join(module.__doc__.split())
  assert all(number in text for number in [*numbers, '2407.04797', 'launch'])
  with pytest.raises(ValueError, match=f'configs/{name}.py:x is unknown'):
    module.get_config('x')


@pytest.mark.parametrize(
  ('section', 'message'),
  [
    ({'name': 'vitt'}, "name='vitt'; it is one of vit, resnet, vgg"),
    ({'variant': 'B/15'}, "variant='B/15'; vit has Ti/8"),
    ({'name': 'resnet', 'patch_size': 4}, "unknown key 'patch_size'"),
    ({'num_classes': 4}, "unknown key 'num_classes'"),
  ],
)
def test_wrong_models_are_named(section, message):
  with pytest.raises(ValueError, match=message):
    network.ModelConfig.of(section)


@pytest.mark.parametrize(
  ('section', 'message'),
  [
    ({'name': 'resnet', 'variant': '50'}, 'holds a ViT; .* is .resnet.'),
    ({'variant': 'B/16'}, 'holds a vit with patch_size=8; B/16 has 16'),
  ],
)
def test_a_checkpoint_of_another_model(section, message, folder):
  checkpoint = network.CheckpointConfig(str(folder / 'vit.npz'))
  with pytest.raises(ValueError, match=message):
    network.ModelConfig.of(section).restore(checkpoint, 16)


def test_train_or_checkpoint(folder, tmp_path):
  config = config_of('imagenet_vit_b16', folder, 'vit.npz').to_dict()
  both = {**config, 'train': config['finetune']}
  with pytest.raises(ValueError, match="both of 'train' and 'checkpoint'"):
    pipeline.Job(both, tmp_path / 'run')
  del config['checkpoint']
  with pytest.raises(ValueError, match="neither of 'train' and 'checkpoint'"):
    pipeline.Job(config, tmp_path / 'run')

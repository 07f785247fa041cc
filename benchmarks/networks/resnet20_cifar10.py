"""CIFAR ResNet-20 (akamaster, BSD-2-Clause): torch names and OIHW kernels."""

from __future__ import annotations

import io
import os

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from benchmarks.networks import common

CALIBRATION, JUDGED = 1024, 500


def _conv(x, kernel, stride=1):
  return jax.lax.conv_general_dilated(
    x,
    kernel,
    (stride, stride),
    ((1, 1), (1, 1)),
    dimension_numbers=('NHWC', 'OIHW', 'NHWC'),
  )


def _norm(x, p, name):
  scale = p[f'{name}.weight'] * jax.lax.rsqrt(p[f'{name}.running_var'] + 1e-5)
  return (x - p[f'{name}.running_mean']) * scale + p[f'{name}.bias']


def fn(params, batch):
  mean = jnp.array([0.485, 0.456, 0.406])
  std = jnp.array([0.229, 0.224, 0.225])
  x = (jnp.asarray(batch['x'], jnp.float32) / 255 - mean) / std
  x = jax.nn.relu(_norm(_conv(x, params['conv1.weight']), params, 'bn1'))
  for layer in (1, 2, 3):
    for block in range(3):
      name = f'layer{layer}.{block}'
      stride = 2 if layer > 1 and not block else 1
      y = _conv(x, params[f'{name}.conv1.weight'], stride)
      y = jax.nn.relu(_norm(y, params, f'{name}.bn1'))
      y = _conv(y, params[f'{name}.conv2.weight'])
      y = _norm(y, params, f'{name}.bn2')
      if stride == 2:  # the shortcut without parameters, option A
        more = x.shape[-1] // 2
        x = jnp.pad(x[:, ::2, ::2], ((0, 0),) * 3 + ((more, more),))
      x = jax.nn.relu(x + y)
  x = x.mean((1, 2))
  return x @ params['linear.weight'].T + params['linear.bias']


def _jpeg(root: str, name: str, count: int) -> common.Batch:
  """The first `count` images of a file of JPEG bytes."""
  file = common.read(os.path.join(root, 'data'), name)
  data, offsets = file['bytes'].tobytes(), file['offsets']
  images = [
    np.asarray(Image.open(io.BytesIO(data[offsets[i] : offsets[i + 1]])))
    for i in range(count)
  ]
  return {'x': np.stack(images), 'y': file['y'][:count]}


def load(root: str) -> common.Network:
  params = common.read(root, 'networks', 'resnet20_cifar10.npz')
  golden = common.read(root, 'networks', 'golden', 'resnet20_cifar10.npz')
  lossless = common.read(root, 'data', 'cifar10_test_lossless200.npz')
  common.check_golden(fn, params, lossless['x'][:16], golden['logits'], 1e-4)
  log_p = common.scores(fn, params, lossless, 100)
  common.check_close(
    'accuracy', common.accuracy(log_p, lossless['y']), 0.90, 1e-4
  )
  return common.Network(
    'resnet20_cifar10',
    fn,
    params,
    [('layer.*conv..weight', True)],
    [
      (
        _jpeg(root, 'cifar10_train_jpeg.npz', CALIBRATION),
        _jpeg(root, 'cifar10_test_jpeg.npz', JUDGED),
      )
    ],
    f'calibrated on {CALIBRATION} training images, judged on {JUDGED} test '
    'images, both JPEG copies (which cost this network about 8 points '
    'themselves); all convolutions but the first',
    128,
  )

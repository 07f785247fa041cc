"""CIFAR-10 ResNets: akamaster's 20 and 56 (BSD-2-Clause), UvA's Flax (MIT)."""

from __future__ import annotations

import functools
import io
import os
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from PIL import Image

from benchmarks.networks import common
from utilized_rank.models.importing import load_checkpoint

CALIBRATION, JUDGED = 1024, 500


class _Published(NamedTuple):
  """A file, its normalisation, and its accuracy on 200 lossless images."""

  file: str
  mean: tuple[float, float, float]
  std: tuple[float, float, float]
  accuracy: float


_TORCH = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_FLAX = (
  (0.49139968, 0.48215841, 0.44653091),
  (0.24703223, 0.24348513, 0.26158784),
)
NETWORKS = {
  'resnet20_cifar10': _Published('resnet20_cifar10.npz', *_TORCH, 0.90),
  'resnet56_cifar10': _Published('resnet56_cifar10.npz', *_TORCH, 0.91),
  'resnet_flax_cifar10': _Published(
    'resnet_flax_cifar10.msgpack', *_FLAX, 0.875
  ),
}


def jpeg(root: str, name: str, count: int) -> common.Batch:
  """The first `count` images of a file of JPEG bytes."""
  file = common.read(os.path.join(root, 'data'), name)
  data, offsets = file['bytes'].tobytes(), file['offsets']
  images = [
    np.asarray(Image.open(io.BytesIO(data[offsets[i] : offsets[i + 1]])))
    for i in range(count)
  ]
  return {'x': np.stack(images), 'y': file['y'][:count]}


def load(name: str, root: str) -> common.Network:
  published = NETWORKS[name]
  model, params, _ = load_checkpoint(
    os.path.join(root, 'networks', published.file),
    activation='relu',
    blur=None,
  )
  mean = np.asarray(published.mean, np.float32)
  std = np.asarray(published.std, np.float32)

  def fn(params, batch):
    x = (jnp.asarray(batch['x'], jnp.float32) / 255 - mean) / std
    return model.apply(params, x)

  golden = common.read(root, 'networks', 'golden', f'{name}.npz')
  lossless = common.read(root, 'data', 'cifar10_test_lossless200.npz')
  common.check_golden(fn, params, lossless['x'][:16], golden['logits'], 1e-4)
  log_p = common.scores(fn, params, lossless, 100)
  common.check_close(
    'accuracy',
    common.accuracy(log_p, lossless['y']),
    published.accuracy,
    1e-4,
  )
  return common.Network(
    name,
    fn,
    params,
    [('params/layer.*conv.*kernel', True)],
    [
      (
        jpeg(root, 'cifar10_train_jpeg.npz', CALIBRATION),
        jpeg(root, 'cifar10_test_jpeg.npz', JUDGED),
      )
    ],
    f'calibrated on {CALIBRATION} training images, judged on {JUDGED} test '
    'images, both JPEG copies (which cost this network about 8 points '
    'themselves); all convolutions but the first',
    128,
  )


LOADERS = {name: functools.partial(load, name) for name in NETWORKS}

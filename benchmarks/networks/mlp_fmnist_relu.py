"""Flax MLP 784-512-256-256-128-10 on Fashion-MNIST (UvA tutorial 3, MIT)."""

from __future__ import annotations

import os

import jax.numpy as jnp
import numpy as np

from benchmarks.networks import common
from utilized_rank.models.importing import load_checkpoint

CALIBRATION = 8192


def load(root: str) -> common.Network:
  model, params, _ = load_checkpoint(
    os.path.join(root, 'networks', 'mlp_fmnist_relu.npz'), activation='relu'
  )

  def fn(params, batch):
    x = (batch['x'].astype(jnp.float32) / 255 - 0.5) / 0.5
    return model.apply(params, x)

  train = common.read(root, 'data', 'fmnist_train60000.npz')
  test = common.read(root, 'data', 'fmnist_test5000.npz')
  log_p = common.scores(fn, params, test, 500)
  common.check_close(
    'accuracy', common.accuracy(log_p, test['y']), 0.8836, 1e-4
  )
  # The file is sorted by class.
  rows = np.random.default_rng(0).permutation(len(train['y']))[:CALIBRATION]
  calibration = {k: v[rows] for k, v in train.items()}
  return common.Network(
    'mlp_fmnist_relu',
    fn,
    params,
    [('params/Dense_4/.*', False), ('.*kernel', True)],
    [(calibration, test)],
    f'calibrated on {CALIBRATION} training images drawn at random, judged on '
    '5,000 test images; all kernels but the head',
    512,
  )

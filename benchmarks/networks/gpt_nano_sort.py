"""Karpathy's minGPT gpt-nano that sorts six digits of 0, 1, 2 (MIT)."""

from __future__ import annotations

import itertools
import os

import numpy as np

from benchmarks.networks import common
from utilized_rank.models.importing import load_checkpoint

LENGTH = 6


def _all_inputs() -> common.Batch:
  """Every input followed by its sorted digits; only the latter are judged."""
  given = np.array(list(itertools.product(range(3), repeat=LENGTH)), np.int32)
  text = np.concatenate([given, np.sort(given, axis=1)], axis=1)
  y = text[:, 1:].copy()
  y[:, : LENGTH - 1] = -1
  return {'x': text[:, :-1], 'y': y}


def load(root: str) -> common.Network:
  path = os.path.join(root, 'networks', 'gpt_nano_sort.npz')
  model, params, _ = load_checkpoint(path, heads=3, activation='gelu_tanh')

  def fn(params, batch):
    return model.apply(params, batch['x'])

  data = _all_inputs()
  right = common.scores(fn, params, data, 243).argmax(-1) == data['y']
  # With every next digit right the generated text is the sorted one.
  exact = float((right | (data['y'] < 0)).all(axis=1).mean())
  common.check_close('exactly sorted', exact, 1.0, 1e-9)
  rows = np.random.default_rng(0).permutation(len(data['y']))
  return common.Network(
    'gpt_nano_sort',
    fn,
    params,
    [('params/block_.*kernel', True)],
    common.halves_both_ways(data, rows),
    'all 729 inputs in two random halves: calibrated on one, judged on the '
    'other, then the reverse, the judgements pooled; accuracy is that of the '
    "six sorted digits; the blocks' kernels",
    81,
  )

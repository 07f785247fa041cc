"""Llama-style language model of 260K parameters (Karpathy, tinyllamas, MIT)."""

from __future__ import annotations

import os

import numpy as np

from benchmarks.networks import common
from utilized_rank.models.importing import load_checkpoint


def _pairs(tokens: np.ndarray) -> common.Batch:
  """Inputs and next tokens; -1 is padding."""
  tokens = tokens.astype(np.int32)
  return {'x': np.maximum(tokens[:, :-1], 0), 'y': tokens[:, 1:]}


def load(root: str) -> common.Network:
  path = os.path.join(root, 'networks', 'stories260k.npz')
  with np.load(path) as file:
    assert np.array_equal(file['out'], file['tok_emb'])  # so it can be tied
  model, params, _ = load_checkpoint(
    path, heads=8, theta=1e4, epsilon=1e-5, ignore=('out',)
  )

  def fn(params, batch):
    return model.apply(params, batch['x'])

  golden = common.read(root, 'networks', 'golden', 'stories260k.npz')
  common.check_golden(
    fn, params, golden['tokens'][None], golden['logits'], 1e-4
  )
  judged = _pairs(common.read(root, 'data', 'tinystories_tokens.npz')['tokens'])
  log_p = common.scores(fn, params, judged, 5)
  real = judged['y'] >= 0
  picked = np.take_along_axis(log_p, np.maximum(judged['y'], 0)[..., None], -1)[
    ..., 0
  ]
  common.check_close('cross-entropy', float(-picked[real].mean()), 1.266, 6e-4)
  own = common.read(root, 'data', 'stories_selfgen64.npz')['tokens']
  return common.Network(
    'stories260k',
    fn,
    params,
    [('params/block_.*kernel', True)],
    [(_pairs(own), judged)],
    'calibrated on 64 texts of 256 tokens that the model itself sampled, '
    f'judged on {int(real.sum())} tokens of TinyStories; accuracy is that '
    "of the next token; the blocks' kernels",
    8,
  )

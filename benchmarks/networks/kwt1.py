"""KWT-1 Keyword Transformer (Berg et al., Interspeech 2021; Arm, Apache-2.0).

A vision transformer on the frames of a spectrogram: 12 post-norm blocks of
width 64, one head, no bias in q, k, v.
"""

from __future__ import annotations

import os

import jax.numpy as jnp
import numpy as np

from benchmarks.networks import common
from utilized_rank.models.importing import load_checkpoint


def load(root: str) -> common.Network:
  model, params, _ = load_checkpoint(
    os.path.join(root, 'networks', 'kwt1_speechcommands.npz'), heads=1
  )

  def fn(params, batch):
    return model.apply(params, jnp.asarray(batch['x'], jnp.float32))

  golden = common.read(root, 'networks', 'golden', 'kwt1_speechcommands.npz')
  data = common.read(root, 'data', 'speechcommands_mfcc500.npz')
  common.check_golden(fn, params, data['x'][:16], golden['logits'], 1e-3)
  data.pop('classes')
  log_p, y = common.scores(fn, params, data, 50), data['y']
  common.check_close('accuracy', common.accuracy(log_p, y), 0.938, 1e-4)
  heard = np.flatnonzero(y)
  common.check_close(
    'accuracy without silence',
    common.accuracy(log_p[heard], y[heard]),
    0.980,
    6e-4,
  )
  return common.Network(
    'kwt1',
    fn,
    params,
    [('.*encoderblock.*kernel', True)],
    common.halves_both_ways(data, heard),
    f'{len(heard)} clips that are not silence, in two halves (even and odd '
    'places): calibrated on one, judged on the other, then the reverse, the '
    "judgements pooled; the blocks' kernels",
    115,
  )

"""KWT-1 Keyword Transformer (Berg et al., Interspeech 2021; Arm, Apache-2.0).

A vision transformer on the frames of a spectrogram: 12 post-norm blocks of
width 64, one head, no bias in q, k, v.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.networks import common


def _norm(x, p):
  mean = x.mean(-1, keepdims=True)
  variance = jnp.square(x - mean).mean(-1, keepdims=True)
  return (x - mean) * jax.lax.rsqrt(variance + 1e-6) * p['scale'] + p['bias']


def _dense(x, p):
  return x @ p['kernel'] + p['bias']


def _attention(x, p):
  q, k, v = (x @ p[name]['kernel'] for name in 'qkv')
  weights = jax.nn.softmax(jnp.einsum('bqd,bkd->bqk', q, k) / 8)
  return _dense(jnp.einsum('bqk,bkd->bqd', weights, v), p['out'])


def fn(params, batch):
  x = _dense(jnp.asarray(batch['x'], jnp.float32), params['embed'])
  token = jnp.broadcast_to(params['class_emb'], (len(x), 1, x.shape[-1]))
  x = jnp.concatenate([token, x], 1) + params['pos_emb']
  for i in range(12):
    p = params[f'block{i}']
    x = _norm(x + _attention(x, p['attn']), p['ln1'])
    hidden = jax.nn.gelu(_dense(x, p['mlp']['fc1']), approximate=True)
    x = _norm(x + _dense(hidden, p['mlp']['fc2']), p['ln2'])
  return _dense(x[:, 0], params['head'])


def load(root: str) -> common.Network:
  params = common.nest(common.read(root, 'networks', 'kwt1_speechcommands.npz'))
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
  halves = [{k: data[k][heard[start::2]] for k in 'xy'} for start in (0, 1)]
  return common.Network(
    'kwt1',
    fn,
    params,
    [('block.*kernel', True)],
    [(halves[0], halves[1]), (halves[1], halves[0])],
    f'{len(heard)} clips that are not silence, in two halves (even and odd '
    'places): calibrated on one, judged on the other, then the reverse, the '
    "judgements pooled; the blocks' kernels",
    115,
  )

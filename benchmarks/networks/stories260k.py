"""Llama-style language model of 260K parameters (Karpathy, tinyllamas, MIT)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.networks import common

LAYERS, HEADS, KV_HEADS, WIDTH = 5, 8, 4, 8


def _norm(x, scale):
  square = jnp.square(x).mean(-1, keepdims=True)
  return x * jax.lax.rsqrt(square + 1e-5) * scale


def _rotate(x):
  """Rotary positions on interleaved pairs; x is (B, T, H, WIDTH)."""
  rates = 10000.0 ** (-jnp.arange(0, WIDTH, 2) / WIDTH)
  angles = (jnp.arange(x.shape[1])[:, None] * rates)[:, None]
  even, odd = x[..., ::2], x[..., 1::2]
  cos, sin = jnp.cos(angles), jnp.sin(angles)
  turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], -1)
  return turned.reshape(x.shape)


def _attention(x, p):
  q, k, v = (
    (x @ p[name].T).reshape(*x.shape[:2], -1, WIDTH)
    for name in ('wq', 'wk', 'wv')
  )
  q, k = _rotate(q), _rotate(k)
  k, v = (jnp.repeat(y, HEADS // KV_HEADS, axis=2) for y in (k, v))
  logits = jnp.einsum('bqhd,bkhd->bhqk', q, k) / WIDTH**0.5
  past = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))
  weights = jax.nn.softmax(jnp.where(past, logits, -1e30))
  y = jnp.einsum('bhqk,bkhd->bqhd', weights, v)
  return y.reshape(x.shape) @ p['wo'].T


def fn(params, batch):
  x = params['tok_emb'][batch['x']]
  for p in params['layers']:
    x = x + _attention(_norm(x, p['att_norm']), p)
    y = _norm(x, p['ffn_norm'])
    y = jax.nn.silu(y @ p['w1'].T) * (y @ p['w3'].T)
    x = x + y @ p['w2'].T
  return _norm(x, params['final_norm']) @ params['tok_emb'].T


def _pairs(tokens: np.ndarray) -> common.Batch:
  """Inputs and next tokens; -1 is padding."""
  tokens = tokens.astype(np.int32)
  return {'x': np.maximum(tokens[:, :-1], 0), 'y': tokens[:, 1:]}


def load(root: str) -> common.Network:
  flat = common.read(root, 'networks', 'stories260k.npz')
  params = {k: flat.pop(k) for k in ('tok_emb', 'final_norm')}
  assert np.array_equal(flat.pop('out'), params['tok_emb'])
  # A rank for every layer: the stacks of five are taken apart.
  params['layers'] = [{k: v[i] for k, v in flat.items()} for i in range(LAYERS)]
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
    [('layers/.*/w.', True)],
    [(_pairs(own), judged)],
    'calibrated on 64 texts of 256 tokens that the model itself sampled, '
    f'judged on {int(real.sum())} tokens of TinyStories; accuracy is that '
    "of the next token; the blocks' kernels",
    8,
  )

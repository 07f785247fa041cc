"""A language model as plain functions over dictionaries and lists."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from frameworks.case import Case
from frameworks.case import normal
from frameworks.case import rows
from frameworks.case import tokens

WIDTH, HEADS, HIDDEN, VOCABULARY = 8, 2, 12, 11


def init():
  def block():
    return {
      'scale': jnp.ones(WIDTH),
      'qkv': 0.4 * normal(3, WIDTH, HEADS, WIDTH // HEADS),
      'proj': 0.4 * normal(HEADS, WIDTH // HEADS, WIDTH),
      'mlp': [
        {'w': 0.4 * normal(WIDTH, HIDDEN), 'b': normal(HIDDEN)},
        {'w': 0.4 * normal(HIDDEN, WIDTH), 'b': normal(WIDTH)},
      ],
    }

  return {
    'tokens': 0.4 * normal(VOCABULARY, WIDTH),
    'blocks': [block(), block()],
    'unembed': 0.4 * normal(VOCABULARY, WIDTH),
  }


def norm(x, scale):
  mean_square = jnp.mean(jnp.square(x), -1, keepdims=True)
  return x * jax.lax.rsqrt(mean_square + 1e-6) * scale


def attend(p, x):
  q, k, v = jnp.einsum('bsd,tdhe->tbshe', x, p['qkv'])
  scores = jnp.einsum('bshe,bthe->bhst', q, k) / np.sqrt(q.shape[-1])
  causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))
  weights = jax.nn.softmax(jnp.where(causal, scores, -1e9))
  return jnp.einsum('bhst,bthe->bshe', weights, v)


def forward(params, ids, see=lambda name, x: x):
  x = params['tokens'][ids]
  for i, p in enumerate(params['blocks']):
    y = see(f'blocks/{i}/qkv', norm(x, p['scale']))
    y = see(f'blocks/{i}/proj', attend(p, y))
    x = x + jnp.einsum('bshe,hed->bsd', y, p['proj'])
    first, second = p['mlp']
    y = see(f'blocks/{i}/mlp/0/w', x)
    y = see(f'blocks/{i}/mlp/1/w', jax.nn.silu(y @ first['w'] + first['b']))
    x = x + y @ second['w'] + second['b']
  return see('unembed', x) @ params['unembed'].T


def transformer() -> Case:
  params = init()
  kernels = {'unembed': (WIDTH, VOCABULARY)}
  for i in range(2):
    kernels |= {
      f'blocks/{i}/qkv': (WIDTH, 3 * WIDTH),
      f'blocks/{i}/proj': (WIDTH, WIDTH),
      f'blocks/{i}/mlp/0/w': (WIDTH, HIDDEN),
      f'blocks/{i}/mlp/1/w': (HIDDEN, WIDTH),
    }

  def inputs():
    seen = {}

    def see(name, x):
      seen[name] = rows(x, kernels[name][-2])
      return x

    forward(params, tokens(), see)
    return seen

  return Case(
    forward, params, tokens(), kernels, inputs, unseen={'tokens': 'gather'}
  )

"""Character MLP on Tiny Shakespeare: 16 x 24 embedding, three layers of 512.

The one network here that no one has published: it is small enough to be
trained on the spot, in a minute or two, with a fixed seed.
"""

from __future__ import annotations

import os
from typing import Any

from flax.traverse_util import flatten_dict
from flax.traverse_util import unflatten_dict
import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.networks import common

CONTEXT, EMBEDDING, WIDTH, CHARACTERS = 16, 24, 512, 65
STEPS, BATCH, RATE, DECAY = 3000, 512, 1.5e-3, 0.1
CALIBRATION, JUDGED = 8192, 20_000


def fn(params, batch):
  x = params['embedding'][batch['x']].reshape(len(batch['x']), -1)
  for name in ('dense_0', 'dense_1', 'dense_2'):
    x = jax.nn.relu(x @ params[name]['kernel'] + params[name]['bias'])
  return x @ params['head']['kernel'] + params['head']['bias']


def _init(seed: int):
  rng = np.random.default_rng(seed)
  sizes = [CONTEXT * EMBEDDING, WIDTH, WIDTH, WIDTH, CHARACTERS]
  names = ['dense_0', 'dense_1', 'dense_2', 'head']
  params: dict[str, Any] = {
    name: {
      'kernel': rng.normal(0, (2 / d) ** 0.5, (d, m)).astype(np.float32),
      'bias': np.zeros(m, np.float32),
    }
    for name, d, m in zip(names, sizes, sizes[1:])
  }
  params['head']['kernel'] *= 0.1
  shape = CHARACTERS, EMBEDDING
  params['embedding'] = rng.normal(0, 0.5, shape).astype(np.float32)
  return jax.tree.map(jnp.asarray, params)


def train(text: np.ndarray, seed: int = 0):
  """Trains on windows drawn at random; one compiled loop.

  Args:
    text: (N,) int32, characters.
    seed: decides the initial parameters and the windows.
  """
  rates = optax.warmup_cosine_decay_schedule(0.0, RATE, 200, STEPS)
  decayed = lambda params: jax.tree.map(lambda v: v.ndim == 2, params)
  optimizer = optax.adamw(rates, weight_decay=DECAY, mask=decayed)
  characters = jnp.asarray(text)

  def loss(params, key):
    at = jax.random.randint(key, (BATCH, 1), 0, len(characters) - CONTEXT)
    rows = characters[at + jnp.arange(CONTEXT + 1)]
    logits = fn(params, {'x': rows[:, :-1]})
    return optax.softmax_cross_entropy_with_integer_labels(
      logits, rows[:, -1]
    ).mean()

  keys = jax.random.split(jax.random.key(seed), STEPS)
  return common.train(loss, _init(seed), optimizer, keys)


def _rows(text: np.ndarray, at: np.ndarray) -> common.Batch:
  windows = text[at[:, None] + np.arange(CONTEXT + 1)]
  return {'x': windows[:, :-1], 'y': windows[:, -1]}


def load(root: str, cache: str | None = None, seed: int = 0) -> common.Network:
  """Trains the network, or reads it from `cache`, an .npz written before."""
  with open(os.path.join(root, 'data', 'tinyshakespeare.txt'), 'rb') as file:
    letters = np.frombuffer(file.read(), np.uint8)
  alphabet, text = np.unique(letters, return_inverse=True)
  assert len(alphabet) == CHARACTERS, len(alphabet)
  text = text.astype(np.int32)
  split = len(text) * 9 // 10
  if cache is not None and os.path.exists(cache):
    with np.load(cache, allow_pickle=False) as file:
      params = unflatten_dict(dict(file), sep='/')
  else:
    params = jax.tree.map(np.asarray, train(text[:split], seed))
    if cache is not None:
      np.savez(cache, **flatten_dict(params, sep='/'))
  rng = np.random.default_rng(seed)
  calibration = rng.integers(0, split - CONTEXT, CALIBRATION)
  judged = rng.integers(split, len(text) - CONTEXT, JUDGED)
  return common.Network(
    'char_mlp',
    fn,
    params,
    [('dense_.*/kernel', True)],
    [(_rows(text, calibration), _rows(text, judged))],
    f'calibrated on {CALIBRATION} positions of the training text, judged on '
    f'{JUDGED} of the last tenth of the text; the three hidden kernels',
    512,
  )

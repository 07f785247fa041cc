"""The guide's fine-tuning, as it is written there, in three frameworks."""

import pathlib
import re
import warnings

import equinox as eqx
from flax import nnx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import utilized_rank as ur

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]
RNG = np.random.default_rng(0)
STEPS = 60


def example(name):
  """The block of the guide that begins with this comment."""
  text = (ROOT / 'docs' / 'guide.md').read_text('utf-8')
  found = re.search(rf'^```python\n# {name}\n(.*?)^```$', text, re.M | re.S)
  lines = found[1].splitlines()
  assert len(lines) <= 10
  return found[1]


def run(name, **given):
  """What the example makes of what a newcomer has."""
  names = {'ur': ur, 'jax': jax, 'jnp': jnp, 'optax': optax, 'steps': STEPS}
  names |= given
  with warnings.catch_warnings():
    # Few rows, on purpose.
    warnings.simplefilter('ignore', UserWarning)
    exec(example(name), names)
  return names


class CNN(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.Conv(8, (3, 3), strides=2)(x))
    x = nn.relu(nn.Conv(16, (3, 3), strides=2)(x))
    return nn.Dense(3)(x.mean((1, 2)))


def test_linen():
  model = CNN()
  x = RNG.normal(size=(64, 8, 8, 2)).astype(np.float32)
  y = (x[..., 0].mean((1, 2)) > 0).astype(np.int32) + 1
  data = [{'x': x[i : i + 16], 'y': y[i : i + 16]} for i in range(0, 64, 16)]
  variables = model.init(jax.random.key(0), x[:1])
  made = run(
    'linen', model=model, variables=variables, batches=data[:3],
    held_out=data[3:],
  )  # fmt: skip
  fn, loss = ur.low_rank(made['fn']), made['loss']
  score = lambda tree: float(loss(fn(tree, data[3]), data[3]).mean())
  assert score(made['tuned']) < score(made['small'])
  assert ur.count_params(made['tuned']) == ur.count_params(made['small'])


class Transformer(nnx.Module):
  def __init__(self, rngs):
    self.embed = nnx.Embed(11, 16, rngs=rngs)
    self.attention = nnx.MultiHeadAttention(2, 16, decode=False, rngs=rngs)
    self.norm = nnx.LayerNorm(16, rngs=rngs)
    self.up = nnx.Linear(16, 32, rngs=rngs)
    self.down = nnx.Linear(32, 16, rngs=rngs)
    self.head = nnx.Linear(16, 11, rngs=rngs)

  def __call__(self, tokens):
    x = self.embed(tokens)
    x = x + self.attention(self.norm(x))
    x = x + self.down(nnx.gelu(self.up(self.norm(x))))
    return self.head(x)


def test_nnx():
  module = Transformer(nnx.Rngs(0))
  data = [{'x': RNG.integers(0, 11, (8, 6)).astype(np.int32)} for _ in range(4)]
  made = run('nnx', module=module, batches=data)
  assert isinstance(made['tuned'], Transformer)
  far = lambda tree: np.mean([
    ur.kl_divergence()(module(b['x']), ur.low_rank(made['fn'])(tree, b), b)
    for b in data
  ])  # fmt: skip
  assert far(made['tuned']) < 0.9 * far(made['small'])


def test_equinox():
  module = eqx.nn.MLP(6, 4, 16, 2, key=jax.random.key(0))
  x = RNG.normal(size=(64, 6)).astype(np.float32)
  data = [
    {'x': v, 'y': np.stack([v[:, 0], v[:, 1] * v[:, 2], v[:, 3], v[:, 4]], 1)}
    for v in np.split(x, 4)
  ]
  made = run('equinox', module=module, batches=data)
  assert isinstance(made['tuned'], eqx.nn.MLP)
  assert made['tuned'].activation is module.activation
  fn, loss = ur.low_rank(made['fn']), made['loss']
  score = lambda tree: np.mean([loss(fn(tree, b), b) for b in data])
  assert score(made['tuned']) < 0.9 * score(made['small'])

"""haliax, which Levanter's models are made of: named axes, stacked blocks."""

from __future__ import annotations

from unittest import mock

import equinox as eqx
import jax
import jax.core
import numpy as np

# The only name that the newest haliax misses in the newest JAX, which took it
# away.
if 'is_constant_dim' not in dir(jax.core):
  jax.core.is_constant_dim = lambda size: isinstance(size, int)

import haliax as hax  # noqa: E402
import haliax.nn as hnn  # noqa: E402

from frameworks.case import Case  # noqa: E402
from frameworks.case import filled  # noqa: E402
from frameworks.case import tokens  # noqa: E402

EMBED, MLP, HEADS, SIZE, VOCAB, LAYERS = hax.make_axes(
  embed=8, mlp=12, heads=2, head_size=4, vocab=11, layers=2
)
BATCH, POSITION = hax.make_axes(batch=4, position=7)
KEYS = POSITION.alias('key_position')


class Block(eqx.Module):
  norm: hnn.LayerNorm
  q: hnn.Linear
  k: hnn.Linear
  v: hnn.Linear
  o: hnn.Linear
  up: hnn.Linear
  down: hnn.Linear

  @staticmethod
  def init(*, key):
    keys = jax.random.split(key, 6)
    heads = [
      hnn.Linear.init(EMBED, (HEADS, SIZE), key=k, use_bias=False, out_first=t)
      for k, t in zip(keys[:3], (True, True, False), strict=True)
    ]
    return Block(
      hnn.LayerNorm.init(EMBED),
      *heads,
      hnn.Linear.init((HEADS, SIZE), EMBED, key=keys[3]),
      hnn.Linear.init(EMBED, MLP, key=keys[4], out_first=True),
      hnn.Linear.init(MLP, EMBED, key=keys[5]),
    )

  def __call__(self, x):
    y = self.norm(x)
    k, v = (f(y).rename({'position': 'key_position'}) for f in (self.k, self.v))
    x = x + self.o(
      hnn.attention.dot_product_attention(KEYS, SIZE, self.q(y), k, v)
    )
    return x + self.down(hnn.gelu(self.up(x)))


class Net(eqx.Module):
  embed: hnn.Embedding
  blocks: hnn.Stacked
  head: hnn.Linear

  @staticmethod
  def init(key):
    keys = jax.random.split(key, 3)
    return Net(
      hnn.Embedding.init(VOCAB, EMBED, key=keys[0]),
      hnn.Stacked.init(LAYERS, Block)(
        key=jax.random.split(keys[1], LAYERS.size)
      ),
      hnn.Linear.init(EMBED, VOCAB, key=keys[2]),
    )

  def __call__(self, ids):
    return self.head(self.blocks.fold(self.embed(ids)))


def transformer() -> Case:
  model = filled(eqx.filter_eval_shape(Net.init, jax.random.key(0)))
  named = lambda ids: hax.named(ids, (BATCH.resize(len(ids)), POSITION))
  kernels = {'head/weight/0': (8, 11)}
  for name in 'qkvo':
    kernels[f'blocks/stacked/{name}/weight/0'] = (2, 8, 8)
  kernels['blocks/stacked/up/weight/0'] = (2, 8, 12)
  kernels['blocks/stacked/down/weight/0'] = (2, 12, 8)

  unseen = {
    'embed/weight/0': 'gather',
    'blocks/stacked/norm/weight/0': 'used by mul',
    'blocks/stacked/norm/bias/0': 'used by add',
  }

  def inputs():
    seen, names = {}, {id(model.head): 'head/weight/0'}
    call = hnn.Linear.__call__

    def recording(layer, x, *, key=None):
      features = x.flatten_axes((BATCH, POSITION), 'rows')
      features = features.flatten_axes(layer.In, 'features')
      x_rows = features.rearrange(('rows', 'features')).array
      seen.setdefault(names[id(layer)], []).append(
        np.asarray(x_rows, np.float64)
      )
      return call(layer, x, key=key)

    with mock.patch.object(hnn.Linear, '__call__', recording):
      x = model.embed(named(tokens()))
      for block in model.blocks.unstacked():
        for name in ('q', 'k', 'v', 'o', 'up', 'down'):
          names[id(getattr(block, name))] = f'blocks/stacked/{name}/weight/0'
        x = block(x)
      model.head(x)
    return {k: np.squeeze(np.stack(v)) for k, v in seen.items()}

  return Case(
    lambda model, ids: model(named(ids)).array, model, tokens(), kernels,
    inputs, unseen,
  )  # fmt: skip

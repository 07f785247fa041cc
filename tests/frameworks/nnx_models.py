"""An NNX transformer: as a module, and as a state split from its graph.

A module is a pytree, so it goes in as it is and comes out as a module:

  small = ur.factorize(model, ur.collect(fn, model, batches), ranks)
  outputs = ur.low_rank(lambda model, x: model(x))(small, x)

For training, where states other than parameters must stay out of the
optimizer, split it first and merge it inside:

  graph, params, rest = nnx.split(model, nnx.Param, ...)
  fn = lambda params, x: nnx.merge(graph, params, rest)(x)
  model = nnx.merge(graph, ur.merge(small), rest)
"""

from __future__ import annotations

from unittest import mock

from flax import nnx

from frameworks.case import Case
from frameworks.case import filled
from frameworks.case import rows
from frameworks.case import tokens

WIDTH, HEADS, HIDDEN, CLASSES = 8, 2, 12, 5


class Block(nnx.Module):
  def __init__(self, rngs: nnx.Rngs):
    self.norm1 = nnx.LayerNorm(WIDTH, rngs=rngs)
    self.attn = nnx.MultiHeadAttention(
      HEADS, WIDTH, dropout_rate=0.1, decode=False, rngs=rngs
    )
    self.norm2 = nnx.LayerNorm(WIDTH, rngs=rngs)
    self.up = nnx.Linear(WIDTH, HIDDEN, rngs=rngs)
    self.down = nnx.Linear(HIDDEN, WIDTH, rngs=rngs)
    self.dropout = nnx.Dropout(0.1, rngs=rngs)

  def __call__(self, x):
    x = x + self.dropout(self.attn(self.norm1(x)))
    return x + self.dropout(self.down(nnx.gelu(self.up(self.norm2(x)))))


class Transformer(nnx.Module):
  def __init__(self, rngs: nnx.Rngs):
    self.embed = nnx.Embed(11, WIDTH, rngs=rngs)
    self.blocks = nnx.List([Block(rngs) for _ in range(2)])
    self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
    self.head = nnx.Linear(WIDTH, CLASSES, rngs=rngs)

  def __call__(self, ids):
    x = self.embed(ids)
    for block in self.blocks:
      x = block(x)
    return self.head(self.norm(x))


def _kernels():
  kernels = {'head/kernel/value': (WIDTH, CLASSES)}
  for i in range(2):
    for name in ('query', 'key', 'value', 'out'):
      kernels[f'blocks/{i}/attn/{name}/kernel/value'] = (WIDTH, WIDTH)
    kernels[f'blocks/{i}/up/kernel/value'] = (WIDTH, HIDDEN)
    kernels[f'blocks/{i}/down/kernel/value'] = (HIDDEN, WIDTH)
  return kernels


def _inputs(model, ids, kernels):
  """Runs the module eagerly with calls of its linear layers recorded."""
  names = {
    id(module): '/'.join(map(str, path))
    for path, module in nnx.iter_modules(model)
  }
  seen = {}

  def recorded(original):
    def call(self, x, *args, **kwargs):
      path = f'{names[id(self)]}/kernel/value'
      seen[path] = rows(x, kernels[path][-2])
      return original(self, x, *args, **kwargs)

    return call

  with (
    mock.patch.object(nnx.Linear, '__call__', recorded(nnx.Linear.__call__)),
    mock.patch.object(
      nnx.LinearGeneral, '__call__', recorded(nnx.LinearGeneral.__call__)
    ),
  ):
    model(ids)
  return seen


def _make():
  shapes = nnx.eval_shape(lambda: Transformer(nnx.Rngs(0)))
  model = filled(shapes)
  model.eval()
  return model, _kernels()


def module() -> Case:
  model, kernels = _make()
  return Case(
    lambda model, ids: model(ids), model, tokens(), kernels,
    lambda: _inputs(model, tokens(), kernels),
    unseen={'embed/embedding/value': 'gather'},
  )  # fmt: skip


def split() -> Case:
  model, kernels = _make()
  graph, params, rest = nnx.split(model, nnx.Param, ...)
  return Case(
    lambda params, ids: nnx.merge(graph, params, rest)(ids),
    params, tokens(), kernels, lambda: _inputs(model, tokens(), kernels),
    unseen={'embed/embedding/value': 'gather'},
  )  # fmt: skip

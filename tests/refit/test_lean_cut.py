"""A function cut where the least lies between two blocks."""

import jax
import jax.numpy as jnp
import numpy as np

from utilized_rank.moments.capture import find_sites
from utilized_rank.refit import blocks
from utilized_rank.refit.streams import Streams

DEPTH, WIDTH, HIDDEN = 3, 6, 10


def norm(x, scale):
  return x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5) * scale


def fn(params, tokens):
  x = params['table'][tokens]
  for i in range(DEPTH):
    p = params[f'block_{i}']
    h = jax.nn.silu(norm(x, p['scale']) @ p['up'] + p['bias'])
    x = x + h @ p['down']
  return norm(x, params['scale']) @ params['head']


def make():
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  params = {
    'table': draw(9, WIDTH), 'head': draw(WIDTH, 40), 'scale': draw(WIDTH),
  }  # fmt: skip
  for i in range(DEPTH):
    params[f'block_{i}'] = {
      'scale': draw(WIDTH), 'up': draw(WIDTH, HIDDEN), 'bias': draw(HIDDEN),
      'down': draw(HIDDEN, WIDTH),
    }  # fmt: skip
  return params, jnp.asarray(rng.integers(0, 9, (2, 4)), jnp.int32)


def kernels(params, tokens):
  select = [(r'block_\d/(up|down)', True), ('.*', False)]
  sites = find_sites(fn, params, tokens, select=select)
  return {path: site.layout for path, site in sites.items()}


def group(path):
  return path.split('/')[0]


def test_the_residual_stream_alone_lies_between_blocks():
  params, tokens = make()
  layouts = kernels(params, tokens)
  lean = blocks.cut(fn, params, tokens, layouts, group, lean=True)
  first, *middle, last = lean.blocks
  # What is looked up is before the blocks, what makes logits behind them.
  assert first.params == ['table'] and not first.reads
  assert last.params == ['head'] and not last.reads
  assert len(middle) == DEPTH
  for i, block in enumerate(middle):
    names = {f'block_{i}/{n}' for n in ('scale', 'up', 'bias', 'down')}
    # The last norm is as large as what it norms.
    assert set(block.params) == names | (
      {'scale'} if block is middle[-1] else set()
    )
  for block in [first, *middle]:
    assert [v.aval.shape for v in block.kept] == [(2, 4, WIDTH)]
  usual = blocks.cut(fn, params, tokens, layouts, group)
  assert len(usual.blocks) == DEPTH + 1
  # Before a product: the residual stream, and it normalised.
  assert len(usual.blocks[1].kept) == 2


def test_the_blocks_are_the_function():
  params, tokens = make()
  layouts = kernels(params, tokens)
  streams = Streams(fn, params, [tokens], layouts, group, lean=True)
  program = streams.programs[0]
  leaves = {
    f'{key}/{name}' if isinstance(of, dict) else key: value
    for key, of in params.items()
    for name, value in (of.items() if isinstance(of, dict) else [('', of)])
  }
  for number in range(len(program.blocks) - 1):
    streams.through(number, leaves, streams.dense)
  last = program.blocks[-1]
  (found,) = program.run(last, leaves, blocks.needs_of(last, streams.dense[0]))
  # A few sums of ten products in float32.
  np.testing.assert_allclose(found, fn(params, tokens), rtol=1e-5, atol=1e-5)

"""A 1.3-billion-parameter decoder, collected and factorized in 20 GiB.

  python -m benchmarks.decoder --out benchmarks/results/decoder.json

Random bfloat16 weights, 24 layers under `lax.scan`, d = 2048, SwiGLU 5504, a
handful of short sequences. The whole process is held to `--limit` by the
kernel (RLIMIT_DATA). Bars: it finishes; the memory that the plan predicted is
within 15 % of what was measured (the largest resident set while collecting,
less what the process held before). Takes four minutes on two CPU cores. Needs
20 GiB of memory.
"""

from __future__ import annotations

import json
import resource

import jax
import jax.numpy as jnp

from benchmarks.shared import arguments
from benchmarks.shared import memory
from benchmarks.shared import record
from benchmarks.shared import timing
import utilized_rank as ur

GIB = 2**30


def shapes(layers, width, hidden, vocabulary):
  """Shapes of the parameter tree; the layers' kernels are stacked."""
  square, up = (layers, width, width), (layers, width, hidden)
  return {
    'embedding': (vocabulary, width),
    'layers': {
      'attention_norm': (layers, width),
      **dict.fromkeys(('query', 'key', 'value', 'out'), square),
      'mlp_norm': (layers, width),
      'gate': up,
      'up': up,
      'down': (layers, hidden, width),
    },
    'norm': (width,),
  }


def decoder(params, tokens, heads):
  """Llama-like: RMS norm, rotary positions, SwiGLU, tied embedding."""
  table = params['embedding']
  width = table.shape[1]
  size = width // heads
  x = table[tokens]
  length = tokens.shape[1]
  frequency = 1e4 ** -jnp.linspace(0, 1, size // 2, endpoint=False)
  angle = jnp.arange(length)[:, None, None] * frequency
  mask = jnp.tril(jnp.ones((length, length), bool))

  def norm(x, scale):
    wide = x.astype(jnp.float32)
    root = jax.lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + 1e-6)
    return (wide * root).astype(x.dtype) * scale

  def rotate(x):
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1).astype(
      x.dtype
    )

  def block(x, p):
    y = norm(x, p['attention_norm'])
    split = lambda z: z.reshape(*z.shape[:-1], heads, size)
    q, k = rotate(split(y @ p['query'])), rotate(split(y @ p['key']))
    scores = jnp.einsum('bqhd,bkhd->bhqk', q, k).astype(jnp.float32)
    scores = jnp.where(mask, scores * size**-0.5, -1e9)
    weights = jax.nn.softmax(scores).astype(x.dtype)
    y = jnp.einsum('bhqk,bkhd->bqhd', weights, split(y @ p['value']))
    x = x + y.reshape(x.shape) @ p['out']
    y = norm(x, p['mlp_norm'])
    y = jax.nn.silu(y @ p['gate']) * (y @ p['up'])
    return x + y @ p['down'], None

  x, _ = jax.lax.scan(block, x, params['layers'])
  return norm(x, params['norm']) @ table.T


def draw(tree):
  """Weights of unit gain, made where they stay."""
  leaves, treedef = jax.tree.flatten(tree, is_leaf=lambda s: type(s) is tuple)
  key = jax.random.key(0)

  @jax.jit(static_argnums=1)
  def one(key, shape):
    if len(shape) < 2 or shape[-2] < 100:  # scales of norms
      return jnp.ones(shape, jnp.bfloat16)
    scale = shape[-2] ** -0.5 if len(shape) == 3 else 1.0
    row = lambda key: (
      jax.random.normal(key, shape[-2:], jnp.bfloat16) * jnp.bfloat16(scale)
    )
    if len(shape) == 2:
      return row(key)
    return jax.lax.map(row, jax.random.split(key, shape[0]))

  arrays = [
    one(jax.random.fold_in(key, i), shape) for i, shape in enumerate(leaves)
  ]
  return jax.block_until_ready(jax.tree.unflatten(treedef, arrays))


def main():
  parser = arguments.parser(__doc__)
  parser.add_argument('--limit', type=float, default=20, help='GiB')
  parser.add_argument('--layers', type=int, default=24)
  parser.add_argument('--width', type=int, default=2048)
  parser.add_argument('--hidden', type=int, default=5504)
  parser.add_argument('--vocabulary', type=int, default=32000)
  parser.add_argument('--sequences', type=int, default=4)
  parser.add_argument('--length', type=int, default=128)
  parser.add_argument('--batches', type=int, default=2)
  parser.add_argument(
    '--memory_limit', type=float, help='GiB for collect; default all at once'
  )
  parser.add_argument(
    '--factorize', nargs='*', default=['layers/query', 'layers/down']
  )
  args = parser.parse_args()
  limit = int(args.limit * GIB)
  resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
  heads = args.width // 128
  fn = lambda params, tokens: decoder(params, tokens, heads)
  tree = shapes(args.layers, args.width, args.hidden, args.vocabulary)
  abstract = jax.tree.map(
    lambda s: jax.ShapeDtypeStruct(s, jnp.bfloat16),
    tree,
    is_leaf=lambda s: type(s) is tuple,
  )
  count = sum(a.size for a in jax.tree.leaves(abstract))
  batches = [
    jax.random.randint(
      jax.random.key(i), (args.sequences, args.length), 0, args.vocabulary
    )
    for i in range(args.batches)
  ]
  rules = [(f'layers/{k}', True) for k in tree['layers'] if 'norm' not in k]
  memory_limit = args.memory_limit and int(args.memory_limit * GIB)
  seconds = {}
  seconds['plan'], costs = timing.once(
    lambda: ur.plan(
      fn, abstract, batches[0], select=rules, memory_limit=memory_limit
    )
  )
  print(costs, flush=True)
  before = memory.resident()
  params = draw(tree)
  memory.forget_peak()
  seconds['collect'], moments = timing.once(
    lambda: ur.collect(
      fn,
      params,
      batches,
      select=rules,
      memory_limit=memory_limit,
      progress=False,
    )
  )
  measured = memory.resident('VmHWM') - before
  row = {
    'parameters': count,
    'tokens': args.sequences * args.length * args.batches,
    'passes': len(costs.passes),
    'predicted_bytes': costs.peak_bytes,
    'measured_bytes': measured,
    'predicted_over_measured': costs.peak_bytes / measured,
  }
  print(json.dumps(row | {'seconds': seconds}), flush=True)

  def share_left(path):
    ranks = {path: args.width // 4}
    small = ur.factorize(params, moments, ranks, compensate_mean=False)
    return ur.count_params(small) / count

  seconds['factorize'], ratio = timing.once(
    lambda: {path: share_left(path) for path in args.factorize}
  )
  result = {
    **row,
    'limit_bytes': limit,
    'seconds': seconds,
    'factorized': ratio,
    'peak_bytes': memory.resident('VmHWM'),
  }
  print(json.dumps(result, indent=1))
  record.write(args.out, 'decoder', result)


if __name__ == '__main__':
  main()

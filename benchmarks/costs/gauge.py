"""What a pair with an identity block costs, by how it is run.

  python -m benchmarks.gauge --out benchmarks/results/gauge.json

Times of x W, and of its gradient by the factors, over those of a plain pair of
the same rank in the same run: with the outputs put in order, with the block
written out, and as `low_rank` chooses. Then the same of all of ViT-B/16.
"""

from __future__ import annotations

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.shared import arguments
from benchmarks.shared import record
from benchmarks.shared import timing
from benchmarks.shared import vits
import utilized_rank as ur
from utilized_rank.products import gauge

_CHOSEN = gauge.pays_written_out
_FORMS = {
  'in_order': lambda *_: False,
  'written_out': lambda *_: True,
  'chosen': _CHOSEN,
}
_SHAPES = [  # rows, d, m: ViT-B/16 on 8 images and 1, ViT-Ti, KWT-1
  (1576, 768, 768),
  (1576, 768, 3072),
  (1576, 3072, 768),
  (197, 768, 768),
  (6304, 192, 192),
  (3168, 64, 256),
]
_SHARES = (0.1, 0.25, 0.5, 0.75)


def random_pairs(d, m, rank):
  """A plain pair and one with an identity block, of one rank."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
  layout = ur.Layout.of((d, m), inputs=(0,), outputs=(1,))
  order = gauge.Order(rng.permutation(m))
  return (
    ur.LowRank(draw(d, rank), draw(rank, m), None, layout),
    ur.LowRank(draw(d, rank), draw(rank, m - rank), None, layout, order),
  )


def compiled(fn, form, backward, tree, x):
  """A call of fn or of the gradient of its outputs' sum of squares."""
  fn = ur.low_rank(fn)
  loss = lambda tree, x: jnp.sum(fn(tree, x) ** 2)
  run = jax.jit(jax.grad(loss) if backward else fn)
  with mock.patch.object(gauge, 'pays_written_out', form):
    jax.block_until_ready(run(tree, x))
  return functools.partial(run, tree, x)


def compared(fn, plain, identity, x, repeats):
  """Times of each form, forward and backward, over those of plain pairs."""
  row = {}
  for name, backward in (('forward', False), ('gradient', True)):
    fns = {'pair': compiled(fn, _CHOSEN, backward, plain, x)}
    for form, choose in _FORMS.items():
      fns[form] = compiled(fn, choose, backward, identity, x)
    times = timing.interleaved(fns, repeats)
    seconds = {form: t['wall'] for form, t in times.items()}
    pair = seconds.pop('pair')
    row[f'{name}_pair_milliseconds'] = round(1e3 * pair, 3)
    row[name] = {form: round(s / pair, 2) for form, s in seconds.items()}
  return row


def measure(rows, d, m, rank, repeats):
  plain, identity = random_pairs(d, m, rank)
  x = jax.random.normal(jax.random.key(0), (rows, d))
  row = dict(rows=rows, d=d, m=m, rank=rank)
  row['block_written_out'] = bool(_CHOSEN(rows, rank, m))
  row |= compared(lambda w, x: x @ w, plain, identity, x, repeats)
  print(row, flush=True)
  return row


def measure_network(fraction, batch, repeats):
  """All of ViT-B/16 at 224 px, its kernels of one rank."""
  pixels = 224
  forms = (None, gauge.IDENTITY)
  model, trees = vits.trees('B/16', pixels, (fraction,), forms)
  _, plain, identity = trees.values()
  images = vits.random_images(batch, pixels)
  row = dict(network='ViT-B/16', kept=fraction, batch=batch)
  row |= compared(model.apply, plain, identity, images, repeats)
  print(row, flush=True)
  return row


def main():
  parser = arguments.parser(__doc__, repeats=20)
  args = parser.parse_args()
  rows = [
    measure(n, d, m, max(8, round(share * min(d, m)) // 8 * 8), args.repeats)
    for n, d, m in _SHAPES
    for share in _SHARES
  ]
  networks = [
    measure_network(fraction, batch, max(2, args.repeats // 4))
    for fraction in (0.5, 0.25)
    for batch in (1, 8)
  ]
  result = {'rows': rows, 'networks': networks}
  record.write(args.out, 'gauge', result)


if __name__ == '__main__':
  main()

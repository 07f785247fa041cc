"""What capture costs over the plain forward pass: time and peak memory.

  python -m benchmarks.collect --out benchmarks/results/collect.json

ViT-B/16 at 224 px. Times are the least of interleaved repeats in one run. The
floor is (forward FLOPs + symmetric Gram FLOPs) / forward FLOPs. Bars: within
1.25 x of the floor on two CPU cores (1.3 x on a GPU), peak memory within 10 %
of plain forward pass + sums: the `matrices` that sums are, and what is kept of
them (`sums`). Memory is that of one process each: on the CPU the largest
resident set, less what the process held before it made parameters, while
batches run and (`with_compiler`) from the first line on; the allocator's peak
elsewhere.
"""

from __future__ import annotations

import json
import sys

import jax

from benchmarks.shared import processes
from benchmarks.shared import record
from benchmarks.shared import timing
from benchmarks.shared import vits
from benchmarks.shared.memory import forget_peak
from benchmarks.shared.memory import resident
import utilized_rank as ur
from utilized_rank.models.vit import VARIANTS
from utilized_rank.models.vit import ViT


def job(args):
  """The function, its parameters and a batch."""
  # Not `vits.random_vit`: what the process holds depends on the order of this.
  model = ViT(num_classes=1000, **VARIANTS[args.variant])
  key = jax.random.key(0)
  images = jax.random.normal(key, (args.batch, args.pixels, args.pixels, 3))
  params = jax.jit(model.init)(key, images[:1])
  return model.apply, params, images


def times(args, costs):
  fn, params, images = job(args)
  plain = jax.jit(fn)
  capture = ur.capture(fn)
  captured = timing.Adding(
    lambda *args: capture(*args)[1], params, images, merge=ur.merge_moments
  )
  fns = {'plain': lambda: plain(params, images), 'captured': captured}
  took = timing.interleaved(fns, args.repeats)
  row = {'seconds': took}
  for kind in ('wall', 'cpu'):
    ratio = took['captured'][kind] / took['plain'][kind]
    row[f'{kind}_ratio'] = ratio
    row[f'{kind}_over_floor'] = ratio / costs.floor
  return row


def peak(args, what):
  """Runs one job in this process; bytes that it took at its worst."""
  before = resident()
  fn, params, images = job(args)
  jax.block_until_ready(params)
  forget_peak()
  held = {}

  def batches():
    """The first compiles; when the third is asked for, one has run."""
    yield images
    yield images
    held['with_compiler'] = resident('VmHWM') - before
    forget_peak()
    yield images
    yield images

  if what == 'plain':
    plain = jax.jit(fn)
    for batch in batches():
      jax.block_until_ready(plain(params, batch))
  else:
    moments = ur.collect(fn, params, batches(), progress=False)
    assert int(moments['params/head/kernel'].count) == 4 * args.batch
  held['running'] = resident('VmHWM') - before
  stats = jax.local_devices()[0].memory_stats()
  if stats:
    held = dict.fromkeys(held, stats['peak_bytes_in_use'])
  print(json.dumps(held))


def memory(argv, costs):
  run = lambda what: processes.printed(
    '-m', 'benchmarks.collect', *argv, '--peak', what
  )
  taken = {'plain': run('plain'), 'captured': run('captured')}
  taken['xla'] = {
    'plain': costs.forward_bytes,
    'captured': costs.peak_bytes,
  }
  # What is kept of the sums, and the matrices that they are.
  held = {'sums': costs.sums_bytes, 'matrices': matrices_bytes(costs)}
  plain = {**taken['plain'], 'by_xla': taken['xla']['plain']}
  captured = {**taken['captured'], 'by_xla': taken['xla']['captured']}
  ratios = {
    f'over_plain_and_{name}_{how}': captured[how] / (plain[how] + size)
    for name, size in held.items()
    for how in plain
  }
  return {'bytes': {**taken, **held}, **ratios}


def matrices_bytes(costs):
  """Of the distinct inputs' second moments in full, float32."""
  sites = (k.site for k in costs.kernels.values() if k.sums_bytes)
  return sum(4 * s.layout.num_groups * s.matrix_shape[0] ** 2 for s in sites)


def main():
  parser = vits.parser(__doc__, repeats=5)
  parser.add_argument('--batch', type=int, default=8)
  parser.add_argument('--peak', choices=['plain', 'captured'])
  args = parser.parse_args()
  if args.peak:
    return peak(args, args.peak)
  fn, params, images = job(args)
  costs = ur.plan(fn, params, images)
  print(costs, flush=True)
  rows = {
    'variant': args.variant,
    'batch': args.batch,
    'forward_flops': costs.forward_flops,
    'gram_flops': costs.gram_flops,
    'floor': costs.floor,
    'memory': memory(sys.argv[1:], costs),
    'time': times(args, costs),
  }
  print(json.dumps(rows, indent=1))
  record.write(args.out, 'collect', rows)


if __name__ == '__main__':
  main()

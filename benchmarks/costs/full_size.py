"""ViT-B/16- and L/16-sized runs through the whole library, timed.

  python -m benchmarks.full_size [--variants B/16 L/16]

Random weights and made images: what is shown is that the sizes of the paper
run, how long each step takes and how much memory the process needs; a few steps
of fine-tuning show what one costs. Each size is a process of its own, so that
its peak memory is its own. Writes `full_size.json`.
Takes two minutes for B/16 and seven for L/16 on two CPU cores.
"""

from __future__ import annotations

import itertools
import json
import sys

import jax
import numpy as np

from benchmarks.shared import arguments
from benchmarks.shared import memory
from benchmarks.shared import processes
from benchmarks.shared import record
from benchmarks.shared import timing
from benchmarks.shared import vits
import utilized_rank as ur
from utilized_rank.training import train

IMAGES, BATCH, SIDE, STEPS = 16, 8, 224, 4
SELECT = (
  (r'params/Transformer/encoderblock_\d+/.*kernel', True),
  ('.*', False),
)


def main() -> None:
  parser = arguments.parser(__doc__, out=record.RESULTS)
  parser.add_argument('--variants', nargs='+', default=['B/16', 'L/16'])
  parser.add_argument('--one', action='store_true', help='run in this process')
  args = parser.parse_args()
  if args.one:
    print(json.dumps(measure(args.variants[0])))
    return
  sizes = {}
  for variant in args.variants:
    sizes[variant] = processes.printed(
      '-m', 'benchmarks.full_size', '--one', '--variants', variant
    )
    print(variant, json.dumps(sizes[variant], indent=1), flush=True)
  record.write(args.out / 'full_size.json', 'full_size', {'sizes': sizes})


def measure(variant: str) -> dict:
  """Seconds of every step, and what came out."""
  fraction = {'B/16': 0.5, 'L/16': 0.25}.get(variant, 0.5)
  rng = np.random.default_rng(0)
  images = rng.normal(size=(IMAGES, SIDE, SIDE, 3)).astype(np.float32)
  labels = rng.integers(0, 1000, IMAGES)
  batches = [
    {'image': images[i : i + BATCH], 'label': labels[i : i + BATCH]}
    for i in range(0, IMAGES, BATCH)
  ]
  seconds: dict[str, float] = {}

  def timed(name, step):
    taken, result = timing.once(lambda: jax.block_until_ready(step()))
    seconds[name] = round(taken, 1)
    print(f'  {variant} {name}: {seconds[name]} s', file=sys.stderr, flush=True)
    return result

  model, params = timed('init', lambda: vits.random_vit(variant, SIDE))
  forward = train.linen_forward(model)
  # The head starts from zeros, and every network would give the same logits.
  head = params['params']['head']
  head['kernel'] = jax.random.normal(jax.random.key(1), head['kernel'].shape)
  moments = timed(
    'collect',
    lambda: ur.collect(
      lambda p, batch: forward(p, batch['image'], train=False, rng=None),
      params,
      batches,
      select=SELECT,
      progress=False,
    ),
  )
  report = timed('measure', lambda: ur.measure(params, moments))
  ranks = timed(
    'budget',
    lambda: ur.budget_ranks(
      params, moments, params_fraction=fraction, method='output'
    ),
  )
  small = timed('factorize', lambda: ur.factorize(params, moments, ranks))
  tuned = timed(
    'finetune',
    lambda: train.fit(
      ur.low_rank(forward),
      small,
      lambda start: itertools.islice(itertools.cycle(batches), start, None),
      train.TrainConfig(steps=STEPS, batch_size=BATCH, learning_rate=1e-4),
    ),
  )
  dense_scores = timed(
    'evaluate dense', lambda: train.evaluate(forward, params, batches)
  )
  tuned_scores = timed(
    'evaluate finetuned',
    lambda: train.evaluate(ur.low_rank(forward), tuned, batches),
  )
  page = timed('report', report.html)
  return {
    'images': IMAGES,
    'tokens': (SIDE // model.patch_size) ** 2 + 1,
    'params_fraction': fraction,
    'finetune_steps': STEPS,
    'report_bytes': len(page),
    'params_dense': ur.count_params(params),
    'params_small': ur.count_params(small),
    'kernels': len(report.layers),
    'mean_layer_utilization': report.json()['mean_layer_utilization'],
    'cross_entropy_dense': dense_scores['cross_entropy'],
    'cross_entropy_finetuned': tuned_scores['cross_entropy'],
    'seconds': seconds,
    'peak_memory_gib': memory.peak_gib(),
  }


if __name__ == '__main__':
  main()

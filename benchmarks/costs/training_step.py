"""A training step of ViT-B/16 with pairs over one of the dense network.

  python -m benchmarks.training_step --out benchmarks/results/training_step.json

Forward pass, gradient, and the step of `ur.finetune` with AdamW, of the dense
network and of its kernels as pairs at 25 % of their parameters, one rank for
all, plain and with an identity block; in turns within one run. Seconds are of
the processor, which other programs disturb least, and the ratio is what counts;
beside it stand that of the FLOPs and what XLA says of memory. Bar: 0.45.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks.shared import record
from benchmarks.shared import timing
from benchmarks.shared import vits
import utilized_rank as ur
from utilized_rank.products import gauge
from utilized_rank.training import step as steps
from utilized_rank.training.goal import Goal
from utilized_rank.training.parts import take_apart
from utilized_rank.walk.cost import forward_flops

FRACTION = 0.25
BAR = 0.45


def labels(logits, batch):
  return optax.softmax_cross_entropy_with_integer_labels(logits, batch['y'])


class Stepping:
  """A step of `ur.finetune` that goes on from its own state."""

  def __init__(self, fn, tree, batch):
    parts = take_apart(tree)
    goal = Goal(fn, parts, tree, labels, ur.squared_error, 0, None, None, None)
    optimizer = ur.FactorOptimizer().build(parts, 1000)
    trained, moving, self._fixed = goal.arrays()
    self._state = steps.begin(trained, moving, optimizer, 0.0)
    self._batch = batch
    update = steps.make(goal, optimizer, seed=0, accumulate=1, ema=0.0)
    jitted = jax.jit(update, donate_argnums=0)
    self._update = jitted.lower(self._state, batch, self._fixed).compile()
    found = self._update.memory_analysis()
    # The state is donated: it is there once.
    self.bytes = found.temp_size_in_bytes + found.argument_size_in_bytes

  def __call__(self):
    self._state, values = self._update(self._state, self._batch, self._fixed)
    return values


def calls(fn, tree, batch) -> dict[str, Any]:
  """Forward pass, gradient and step of one tree."""
  run = ur.low_rank(fn)

  def loss(tree, batch):
    return jnp.mean(labels(run(tree, batch), batch))

  made: dict[str, Any] = {
    name: functools.partial(
      jax.jit(f).lower(tree, batch).compile(), tree, batch
    )
    for name, f in (('forward', run), ('gradient', jax.grad(loss)))
  }
  return made | {'step': Stepping(fn, tree, batch)}


def main():
  parser = vits.parser(__doc__, repeats=5)
  parser.add_argument('--batch', type=int, default=8)
  parser.add_argument('--blocks', type=int, help='fewer blocks than it has')
  args = parser.parse_args()
  sizes = {} if args.blocks is None else {'depth': args.blocks}
  model, dense = vits.random_vit(args.variant, args.pixels, **sizes)

  def fn(params, batch):
    return model.apply(params, batch['x'])

  batch = {
    'x': vits.random_images(args.batch, args.pixels),
    'y': jnp.arange(args.batch),
  }
  sites = ur.find_sites(fn, dense, batch)
  sites = {k: v for k, v in sites.items() if 'encoderblock' in k}
  trees = {'dense': dense}
  for name, form in (('pairs', None), ('identity', gauge.IDENTITY)):
    trees[name] = vits.factorized(dense, sites, FRACTION, form)
  made = {name: calls(fn, tree, batch) for name, tree in trees.items()}
  flat = {(t, c): f for t, of in made.items() for c, f in of.items()}
  times = timing.interleaved(flat, args.repeats)
  flops = {
    name: forward_flops(ur.low_rank(fn), tree, batch)
    for name, tree in trees.items()
  }
  rows = []
  for name in trees:
    row: dict[str, Any] = {'tree': name}
    for call in made[name]:
      seconds = times[name, call]['cpu']
      row[f'{call}_cpu_seconds'] = round(seconds, 4)
      dense_seconds = times['dense', call]['cpu']
      row[f'{call}_over_dense'] = round(seconds / dense_seconds, 3)
    row['flops_over_dense'] = round(flops[name] / flops['dense'], 3)
    step, base = made[name]['step'], made['dense']['step']
    row['step_bytes_over_dense'] = round(step.bytes / base.bytes, 3)
    rows.append(row)
    print(row, flush=True)
  size = {'variant': args.variant, 'batch': args.batch, 'blocks': args.blocks}
  record.write(args.out, 'training_step', {**size, 'bar': BAR, 'rows': rows})


if __name__ == '__main__':
  main()

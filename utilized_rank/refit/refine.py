"""Factors refined block by block on what the dense network makes there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from utilized_rank.factorization.methods import DAMPING
from utilized_rank.host.extras import extra
from utilized_rank.host.progress import track
from utilized_rank.lowrank.leaf import is_low_rank
from utilized_rank.lowrank.low_rank import low_rank
from utilized_rank.moments.gradients import LossFn
from utilized_rank.refit.anchor import checked
from utilized_rank.refit.anchor import find_kernels
from utilized_rank.refit.blocks import Group
from utilized_rank.refit.blocks import State
from utilized_rank.refit.blocks import needs_of
from utilized_rank.refit.streams import Leaves
from utilized_rank.refit.streams import Streams
from utilized_rank.tree import paths
from utilized_rank.walk import compat
from utilized_rank.walk import tracing

_TINY = float(np.finfo(np.float32).tiny)
# Share of the batches on which a refined block must be better.
HELD_OUT = 0.2


@compat.moves_data
def refine(
  fn: Callable[[Any, Any], Any],
  params: Any,
  small: Any,
  batches: Iterable[Any],
  *,
  loss: LossFn | None = None,
  steps: int = 200,
  learning_rate: float = 0.01,
  group: Group | None = None,
  progress: bool = True,
) -> Any:
  """Trains the factors of each block to make what the dense block makes.

  Needs no labels and no run of the whole network: between two blocks the values
  of the dense and of the compressed network are known for all batches, and a
  block's factors, with the biases of its kernels, are trained by Adam so that
  it turns the latter into what the dense block makes of the former. A block is
  only changed if its error on the last fifth of the batches, which train
  nothing, falls.

  Args:
    fn: `fn(params, batch) -> outputs`.
    params: dense parameters.
    small: the same with `LowRank` leaves, from `factorize` or `anchor`.
    batches: as for `anchor`, two at least.
    loss: `loss(outputs, batch) -> (B,)`, nats per example, such as
      `sampled_cross_entropy()`, to measure errors in: each value that a block
      gives to later ones in the metric of the second moment of the loss's
      gradient there, over its last axis. Costs a run of the rest of the
      network and its gradient for each block. Without, the error is the
      squared difference as a share of the value's variance, which may undo
      what factors of method 'loss' have gained.
    steps: updates of each block, each on one batch, in turns.
    learning_rate: its peak, as a share of the factors' root mean square; it
      falls to 0 along a cosine.
    group: as for `anchor`; a wider block is matched where it ends.
    progress: show a progress bar.

  Returns:
    The tree with refined leaves; ranks, shapes and dtypes are the same.

  Raises:
    ValueError: `small` has no `LowRank` leaf or is of another structure, there
      are fewer than two batches, or steps or rate are not positive.
    UnsupportedError: as `anchor`.

  The block-wise training of AA-SVD (arXiv 2604.02119) with a held-out guard.
  """
  if steps < 1 or not learning_rate > 0:
    raise ValueError(
      f'steps and learning_rate must be positive, got {steps} and '
      f'{learning_rate}'
    )
  named, treedef = paths.flatten(small, is_low_rank)
  leaves, _ = paths.flatten(params)
  if list(named) != list(leaves):
    odd = sorted(set(named) ^ set(leaves))[:4]
    raise ValueError(f'params and small differ in their paths: {odd}')
  kernels = [path for path, leaf in named.items() if is_low_rank(leaf)]
  first, stream = checked(batches)
  held: list[Any] = []
  if loss is not None:
    held = list(stream)
    stream = iter(held)
  sites = find_kernels(fn, params, first, kernels)
  layouts = {path: site.layout for path, site in sites.items()}
  streams = Streams(fn, params, stream, layouts, group)
  if len(streams.dense) < 2:
    raise ValueError('refine needs two batches: one trains, one judges')
  arrays = lambda tree: {
    k: jax.tree.map(jnp.asarray, v)
    for k, v in tree.items()
    if is_low_rank(v) or tracing.is_array(v)
  }
  dense, now = arrays(leaves), arrays(named)
  count = len(streams.blocks)
  numbers: Iterable[int] = range(count)
  if progress:
    numbers = track(numbers, total=count, desc='refine', unit='block')
  for number in numbers:
    block = streams.blocks[number]
    biases = [sites[p].bias for p in block.paths]
    own = {p: now[p] for p in [*block.paths, *biases] if p is not None}
    inputs = [streams.small[i] for i in range(len(streams.small))]
    streams.advance(number, dense, streams.dense)
    if own:  # what comes before the first kernel has none
      metrics = [None] * len(block.gives)
      if loss is not None:
        metrics = streams.gradients(number, dense, loss, held)
      new = _refined(
        streams, number, inputs, now, own, metrics, steps, learning_rate
      )
      now, named = now | new, named | new
    streams.advance(number, now, streams.small)
  return paths.unflatten(treedef, named)


def _refined(
  streams: Streams,
  number: int,
  inputs: Sequence[State],
  leaves: Leaves,
  own: Leaves,
  metrics: Sequence[Any],
  steps: int,
  learning_rate: float,
) -> Leaves:
  """A block's own leaves, trained; as they were if that does not help.

  Args:
    streams: the dense run, beyond the block.
    number: the block's.
    inputs: values of the compressed run before the block.
    leaves: its leaves.
    own: those that are trained.
    metrics: for each value that it gives, G or None.
    steps: number of updates.
    learning_rate: in root mean squares of the factors.
  """
  with extra('train'):
    import optax

  wide = lambda v: v.astype(jnp.promote_types(v.dtype, jnp.float32))
  trained = jax.tree.map(wide, own)
  factors = [v.a for v in trained.values() if is_low_rank(v)]
  size = np.mean([float(jnp.sqrt(jnp.mean(jnp.square(a)))) for a in factors])
  rates = optax.cosine_decay_schedule(learning_rate * size, steps)
  adam = optax.adam(rates)

  def error(program, block):
    run = low_rank(lambda leaves, values: program.run(block, leaves, values))

    def of(trained, leaves, values, targets):
      mine = jax.tree.map(lambda v, old: v.astype(old.dtype), trained, own)
      outs = run(leaves | mine, values)
      return sum(
        _share(y, target) if g is None else _nats(y, target, g)
        for y, target, g in zip(outs, targets, metrics, strict=True)
        if jnp.issubdtype(target.dtype, jnp.floating)
      )

    return of

  def update(program, block):
    of = error(program, block)

    def step(trained, state, leaves, values, targets):
      gradient = jax.grad(of)(trained, leaves, values, targets)
      with jax.numpy_dtype_promotion('standard'):  # optax wants it
        change, state = adam.update(gradient, state, trained)
        return optax.apply_updates(trained, change), state

    return step

  def data(i, block):
    return (
      leaves,
      needs_of(block, inputs[i]),
      [streams.dense[i][var] for var in block.gives],
    )

  training = min(round((1 - HELD_OUT) * len(inputs)), len(inputs) - 1)
  judges = list(streams.each(number, error))[training:]
  judge = lambda tree: sum(
    float(run(tree, *data(i, block))) for i, block, run in judges
  )
  before, state = judge(trained), adam.init(trained)
  runs = list(streams.each(number, update))[:training]
  for i, block, run in itertools.islice(itertools.cycle(runs), steps):
    trained, state = run(trained, state, *data(i, block))
  if not judge(trained) < before:
    return {}
  return jax.tree.map(lambda v, old: v.astype(old.dtype), trained, own)


def _nats(y: Any, target: Any, g: Any) -> Any:
  """Half of sum e^T G e over the rows of an example, G damped."""
  m = len(g)
  g = g + DAMPING * jnp.trace(g) / m * jnp.eye(m)
  e = (y - target).astype(jnp.float32).reshape(-1, m)
  return jnp.sum((e @ g) * e) / (2 * len(target))


def _share(y: Any, target: Any) -> Any:
  """Squared error of an array as a share of its variance over the batch."""
  y, target = (v.astype(jnp.float32) for v in (y, target))
  square = lambda v: jnp.sum(jnp.square(v))
  size = square(target - jnp.mean(target, axis=0, keepdims=True))
  # What is the same for every example is a share of itself.
  least = 1e-6 * square(target) + _TINY
  return square(y - target) / jnp.maximum(size, least)

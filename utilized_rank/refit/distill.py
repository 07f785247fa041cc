"""All that is small in a compressed tree, trained on the dense outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from utilized_rank.collection.one_pass import check_batch
from utilized_rank.collection.one_pass import several
from utilized_rank.host.kept import kept
from utilized_rank.host.progress import track
from utilized_rank.losses.divergence import Divergence
from utilized_rank.losses.divergence import comes_closer
from utilized_rank.losses.divergence import squared_error
from utilized_rank.lowrank.low_rank import low_rank
from utilized_rank.moments.gradients import first_line
from utilized_rank.ranks import trials
from utilized_rank.refit import descent
from utilized_rank.refit.mixup import Mix
from utilized_rank.refit.mixup import mixing
from utilized_rank.refit.trained import Trained
from utilized_rank.tree import paths
from utilized_rank.walk import compat
from utilized_rank.walk import tracing

# One batch of so many is held out; of fewer, as large a part of each batch.
HELD_OUT = 5
# Fewer examples cannot judge, more need not.
LEAST_HELD, MOST_HELD = 8, 1024
# How often the examples held out are looked at.
LOOKS = 10
# Rates that are tried, and the share of the updates that each gets for it.
RATES = (0.01, 0.002, 0.0005)
TRIAL = 0.1
# Outputs that differ by no more than so many roundings are the dense ones.
EXACT = 8
# Dense outputs are kept up to this, and computed anew beyond.
_MOST_BYTES = 2**30


class NoDerivative(ValueError):
  """The function cannot be differentiated in reverse."""


@compat.moves_data
def distill(
  fn: Callable[[Any, Any], Any],
  params: Any,
  small: Any,
  batches: Iterable[Any],
  *,
  divergence: Divergence = squared_error,
  steps: int = 300,
  learning_rate: float | None = None,
  batch_size: int = 64,
  mixup: bool = True,
  progress: bool = True,
) -> Any:
  """Trains a compressed tree end to end to give the dense outputs.

  Needs no labels. Factors and their constants are trained, whatever else is
  not as in the dense tree, and what is no kernel (biases, norms, scales), by
  Adam in float32; dense kernels stay. A fifth of the examples trains nothing:
  of ten looks at it the tree is taken that is nearest there, and only if it is
  nearer than `small` by more than the standard error of the difference.

  Args:
    fn: `fn(params, batch) -> outputs`.
    params: dense parameters.
    small: what `factorize`, `compress` or `anchor` made of them.
    batches: each a pytree whose arrays lead with the batch axis, as the outputs
      do; all are held. Every fifth is held out, or the last fifth of each where
      there are fewer than five.
    divergence: `divergence(dense outputs, outputs, batch) -> (B,)`.
    steps: number of updates.
    learning_rate: its peak, as a share of each array's root mean square; it
      rises over a tenth of the updates and falls to 0 along a cosine. Of what
      is above 0 everywhere the logarithm is moved, so that it stays so. By
      default three are tried for a tenth of the updates each, and the one that
      comes nearest on the examples held out is taken.
    batch_size: examples of an update; fewer where a batch has fewer.
    mixup: ask the dense function about mixtures of examples, and teach those:
      few of them fill more of the space then (Beyer et al., arXiv 2106.05237).
      Numbers and images are averaged, of tokens one example's first positions
      go on as another's (see `refit/mixup.py`); other inputs stay.
    progress: show a progress bar.

  Returns:
    The trained tree, of the same ranks, shapes and dtypes; `small` itself where
    outputs do not come closer or differ by float32's rounding alone, or fewer
    than eight examples are held out.

  Raises:
    ValueError: a number is not positive, there is no batch, or `fn` has no
      reverse derivative.

  >>> fn = lambda params, x: x @ params['w']
  >>> params = {'w': jnp.diag(jnp.array([2.0, 1.0]))}
  >>> x = jnp.tile(jnp.eye(2), (40, 1))
  >>> import utilized_rank as ur
  >>> layout = ur.Layout.of((2, 2), inputs=(0,), outputs=(1,))
  >>> a, b = jnp.array([[0.8], [0.1]]), jnp.array([[1.5, 0.1]])
  >>> small = {'w': ur.LowRank(a, b, None, layout)}
  >>> near = distill(fn, params, small, [x], steps=200, progress=False)
  >>> error = lambda tree: squared_error(x @ params['w'], x @ tree['w'].dense(),
  ...                                    x).mean()
  >>> bool(error(near) < error(small))
  True
  """
  rates = RATES if learning_rate is None else (learning_rate,)
  if steps < 1 or batch_size < 1 or not min(rates) > 0:
    raise ValueError(
      'steps, batch_size and learning_rate must be positive, got '
      f'{steps}, {batch_size} and {learning_rate}'
    )
  given = list(several(batches))
  if not given:
    raise ValueError('at least one batch is needed, got none')
  training, held = hold_out(given)
  if sum(check_batch(batch, 0) for batch in held) < LEAST_HELD:
    return small
  tree = Trained.of(fn, params, small, given[0])
  programs = kept([fn, divergence], 'distill', _Programs)
  dense = _Dense(trials.programs(fn, divergence).outputs, params)
  judge = functools.partial(programs.each, tree.kind)
  update = functools.partial(programs.update, tree.kind)
  rest = tree.rest()
  judged = [(batch, dense.outputs(batch)) for batch in held]

  def look(values):
    parts = [judge(values, rest, *pair) for pair in judged]
    return np.concatenate([np.asarray(part, np.float64) for part in parts])

  state = tree.start()
  before = look(state.values)
  batch, outputs = judged[0]
  if before.mean() <= float(programs.rounding(outputs, batch)):
    return small
  mix = mixing(training) if mixup else None
  pieces_of = functools.partial(_pieces, training, dense, batch_size, mix)
  piece = next(pieces_of())
  if why := tracing.failure(update, state, 1.0, 1.0, rest, *piece):
    raise NoDerivative(
      f'the function has no reverse derivative ({first_line(why)})'
    )

  def descend(peak, steps, looks):
    """Update by update: None, or how far outputs are, and the values."""
    now, every = state, max(1, steps // looks)
    for count, (batch, outputs) in zip(range(1, steps + 1), pieces_of()):
      rate = descent.rate_at(count, steps, peak)
      now = update(now, float(count), rate, rest, batch, outputs)
      is_seen = count % every == 0 or count == steps
      yield (look(now.values), now.values) if is_seen else None

  trial = max(1, round(TRIAL * steps)) if len(rates) > 1 else 0

  def every_update():
    ends = []
    for rate in rates if trial else ():
      for found in descend(rate, trial, 1):
        yield found
      ends.append(found[0].mean())
    chosen = int(np.argmin(np.nan_to_num(ends, nan=np.inf))) if trial else 0
    yield from descend(rates[chosen], steps, LOOKS)

  best, nearest = state.values, before
  updates: Iterable[Any] = every_update()
  if progress:
    updates = track(
      updates,
      total=steps + trial * len(rates),
      desc='distill',
      unit='step',
      status=lambda: f'divergence {nearest.mean():.4g}',
    )
  for found in updates:
    if found is not None and found[0].mean() < nearest.mean():
      nearest, best = found
  return tree.stored(best) if comes_closer(before, nearest) else small


def hold_out(batches: Sequence[Any]) -> tuple[list[Any], list[Any]]:
  """Batches to train on and others to judge by.

  Whole batches where there are enough, as what is alike often comes together.

  >>> [[part.tolist() for part in side] for side in hold_out([np.arange(5)])]
  [[[0, 1, 2, 3]], [[4]]]
  """
  training: list[Any] = []
  judging: list[Any] = []
  examples = 0
  for i, batch in enumerate(batches):
    size = check_batch(batch, i)
    cut = size - max(1, size // HELD_OUT)
    if len(batches) >= HELD_OUT:
      is_held = i % HELD_OUT == HELD_OUT - 1 and examples < MOST_HELD
      (judging if is_held else training).append(batch)
      examples += size * is_held
    elif cut:
      training.append(_rows(batch, slice(cut), size))
      judging.append(_rows(batch, slice(cut, None), size))
  return training, judging


def _rows(tree: Any, rows: Any, size: int) -> Any:
  """Those examples of a batch or of its outputs; what leads else stays."""
  return jax.tree.map(
    lambda v: v[rows] if np.shape(v)[:1] == (size,) else v, tree
  )


def _on_host(tree: Any) -> Any:
  """Arrays where rows are taken without a program for every number of them."""
  is_plain = lambda v: (
    isinstance(v, jax.Array)
    and not jnp.issubdtype(v.dtype, jax.dtypes.extended)
  )
  return jax.tree.map(lambda v: np.asarray(v) if is_plain(v) else v, tree)


class _Programs:
  """Compiled functions of `fn` and a divergence; their arguments are all."""

  def __init__(self, fn: Callable[[Any, Any], Any], divergence: Divergence):
    run = low_rank(fn)

    def each(kind, values, rest, batch, outputs):
      tree = kind.joined(values, rest)
      return divergence(outputs, run(tree, batch), batch)

    def mean(values, kind, *args):
      return jnp.mean(each(kind, values, *args))

    def update(kind, state, count, rate, *args):
      gradient = jax.grad(mean)(state.values, kind, *args)
      return descent.update(state, gradient, count, rate)

    def rounding(outputs, batch):
      """The mean divergence of outputs that are a few roundings off."""
      scale = 1 + EXACT * float(jnp.finfo(jnp.float32).eps)
      off = jax.tree.map(
        lambda y: y * scale if jnp.issubdtype(y.dtype, jnp.inexact) else y,
        outputs,
      )
      return jnp.mean(divergence(outputs, off, batch))

    self.rounding = jax.jit(rounding)
    compiled = functools.partial(jax.jit, static_argnums=0)
    self.each, self.update = map(compiled, (each, update))


class _Dense:
  """The dense function, some of whose outputs are remembered."""

  def __init__(self, run: Callable[..., Any], params: Any):
    leaves = tracing.on_device(paths.flatten(params)[0])
    self._run = functools.partial(run, tracing.Form(params), leaves)
    self._kept: dict[int, Any] = {}
    self._left = _MOST_BYTES

  def outputs(self, batch: Any) -> Any:
    return self._run(batch)

  def remembered(self, i: int, batch: Any) -> Any:
    """The outputs of batch i, from memory where there is room for them."""
    if i in self._kept:
      return self._kept[i]
    outputs = _on_host(self.outputs(batch))
    self._left -= sum(v.nbytes for v in jax.tree.leaves(outputs))
    if self._left >= 0:
      self._kept[i] = outputs
    return outputs


def _pieces(
  batches: Sequence[Any], dense: _Dense, size: int, mix: Mix | None
) -> Iterator[tuple[Any, Any]]:
  """(examples, dense outputs) without end, in another order every time.

  A batch is read in pieces, one after the other, so that its outputs are
  computed once where they are not remembered.
  """
  random = np.random.default_rng(0)
  while True:
    for i in random.permutation(len(batches)):
      batch = _on_host(batches[i])
      count = check_batch(batch, i)
      outputs = dense.remembered(int(i), batch) if mix is None else None
      order, some = random.permutation(count), min(size, count)
      for start in range(0, count - some + 1, some):
        rows = order[start : start + some]
        piece = _rows(batch, rows, count)
        if mix is None:
          yield piece, _rows(outputs, rows, count)
        else:
          piece = mix(piece, random)
          yield piece, dense.outputs(piece)

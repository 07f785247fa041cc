"""Fine-tuning of a compressed tree: any function, any tree, any optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
import itertools
import os
from typing import Any

import jax
from jax.sharding import Mesh

from utilized_rank.host.extras import extra
from utilized_rank.losses.divergence import Divergence
from utilized_rank.losses.divergence import squared_error
from utilized_rank.moments.gradients import LossFn
from utilized_rank.training import balance as balance_
from utilized_rank.training import batch_statistics
from utilized_rank.training import feeding
from utilized_rank.training import loop
from utilized_rank.training import optimizers
from utilized_rank.training.goal import Goal
from utilized_rank.training.goal import TrainFn
from utilized_rank.training.goal import Validation
from utilized_rank.training.optimizers import FactorOptimizer
from utilized_rank.training.parts import take_apart
from utilized_rank.tree import paths
from utilized_rank.walk import compat
from utilized_rank.walk import tracing

with extra('train'):
  import optax

FROZEN, TRAINED, REESTIMATED = NORMS = ('frozen', 'trained', 'reestimated')
# Enough to forget all statistics from before, with a momentum of 0.9.
_STATISTICS_BATCHES = 100

_ADAMW = FactorOptimizer()


@compat.moves_data
def finetune(
  fn: Callable[[Any, Any], Any],
  small: Any,
  params: Any,
  batches: feeding.Batches,
  *,
  loss: LossFn | None = None,
  divergence: Divergence | None = None,
  distill_weight: float | None = None,
  steps: int = 1000,
  optimizer: optax.GradientTransformation | FactorOptimizer = _ADAMW,
  trainable: paths.Rules = (),
  train_fn: TrainFn | None = None,
  statistics: batch_statistics.Statistics | None = None,
  norms: str = FROZEN,
  balance: bool = False,
  accumulate: int = 1,
  compute_dtype: Any = None,
  ema: float = 0.0,
  seed: int = 0,
  mesh: Mesh | None = None,
  batch_axes: Sequence[str] | None = None,
  validation: Iterable[Any] | None = None,
  metric: LossFn | None = None,
  validate_every: int = 0,
  patience: int = 0,
  directory: str | os.PathLike[str] | None = None,
  checkpoint_every: int = 0,
  log_every: int = 50,
  tensorboard: bool = False,
  progress: bool = True,
  desc: str = 'finetune',
) -> Any:
  """Trains a compressed tree, on labels, on what the dense one makes, or both.

  What is minimised is (1 - a) loss + a divergence from the dense outputs, with
  a = `distill_weight`. Without a loss no labels are needed. All floating leaves
  are trained but running statistics, in float32 at least; identity blocks of
  pairs stay. With a directory the run can be interrupted: started again with
  the same arguments it returns bit for bit what it would have.

  Args:
    fn: `fn(params, batch) -> outputs`, the dense model's own function.
    small: the compressed tree; it is copied.
    params: the dense one, which is only looked at where something is distilled.
    batches: pytrees of arrays that lead with the batch axis: a list or loader,
      gone through again and again; an iterator that does not end; or
      `batches(start_step)`, which makes the ones from that step on. Where a run
      goes on, it skips what was used, which only the last does without reading.
    loss: `loss(outputs, batch) -> (B,)`.
    divergence: `divergence(dense outputs, outputs, batch) -> (B,)`; default
      the loss's own, if it has one, else `squared_error`. `kl_divergence()` is
      for logits.
    distill_weight: a, in [0, 1]; default 1 without a loss, 0 with one, and 0.5
      with a loss and a divergence.
    steps: number of updates, each of one batch.
    optimizer: of optax, on a dict of arrays by name; or a `FactorOptimizer`,
      which knows of pairs.
    trainable: ordered `(regex, bool)` rules over leaf paths, as `select=`. A
      leaf that none matches is trained or not as without rules: Linen's
      `batch_stats` and NNX variables that are no `Param` are not.
    train_fn: `train_fn(params, batch, rng) -> outputs` in place of `fn` while
      it trains, where dropout and batch norms then act otherwise.
    statistics: `statistics(params, batch) -> params` with the running
      statistics after a batch, for what follows.
    norms: what becomes of running statistics. 'frozen': nothing. 'trained':
      every batch moves them. 'reestimated': afterwards, by a hundred batches;
      with `validation`, only if that is not worse.
    balance: train plain pairs A B with A^T A = B B^T, which have r^2 more
      numbers than those with an identity block, and give that back at the end.
    accumulate: parts of every batch that are run one after the other, to the
      gradient of the whole.
    compute_dtype: of parameters and batch inside `fn`; factors, gradients and
      losses stay float32.
    ema: decay of an average of the parameters, which then is what is validated
      and returned; 0 for none.
    seed: decides the keys of `train_fn`.
    mesh: devices that batches are spread over; default the mesh of the leaves,
      else the one in force. Leaves that are on it stay spread as they are, all
      others are on all its devices.
    batch_axes: axes of the mesh that batches are spread over; default the
      first.
    validation: batches that train nothing; the best parameters on them are
      returned, not the last; the ones that it began with among them.
    metric: `metric(outputs, batch) -> (B,)`, lower being better; default what
      is minimised.
    validate_every: steps between two validations; 0 for the end alone.
    patience: stop after so many validations without a new best; 0 for never.
    directory: where checkpoints and `metrics.jsonl` go; None keeps nothing.
    checkpoint_every: steps between two checkpoints; 0 for the last one only.
    log_every: steps between two lines of metrics; a NaN is noticed then.
    tensorboard: write events into the directory too; needs tensorboardX.
    progress: show a progress bar.
    desc: name of the run on the bar and in errors.

  Returns:
    The trained tree, of the type, shapes and dtypes of `small`.

  Raises:
    DivergedError: loss or gradient is not finite; names the steps.
    ValueError: a wrong option, several processes, batches that end, or a
      checkpoint that is damaged or belongs to other options.

  >>> from utilized_rank.tree.layout import Layout
  >>> from utilized_rank.lowrank.leaf import LowRank
  >>> fn = lambda params, x: x @ params['w']
  >>> dense, x = {'w': jnp.ones((4, 3))}, jnp.eye(4)
  >>> layout = Layout.of((4, 3), inputs=(0,), outputs=(1,))
  >>> a, b = jnp.full((4, 1), 0.5), jnp.full((1, 3), 0.5)
  >>> small = {'w': LowRank(a, b, None, layout)}
  >>> tuned = finetune(fn, small, dense, [x], steps=200,
  ...                  optimizer=optax.adam(0.02), progress=False)
  >>> bool(abs(tuned['w'].dense() - 1).max() < 0.01)
  True
  """
  if jax.process_count() > 1:
    raise ValueError(
      f'finetune runs in a single process, on all of its devices; there are '
      f'{jax.process_count()}'
    )
  tracing.check_values(small)
  _check_norms(norms, statistics)
  options = loop.Options(
    steps=steps,
    seed=seed,
    accumulate=accumulate,
    ema=ema,
    validate_every=validate_every,
    patience=patience,
    checkpoint_every=checkpoint_every,
    log_every=log_every,
    tensorboard=tensorboard,
    progress=progress,
  )
  if validation is None and (patience or validate_every or metric):
    raise ValueError(
      'validate_every, patience and metric are of validation=, which is None'
    )
  parts = take_apart(balance_.balanced(small) if balance else small, trainable)
  goal = Goal(
    fn=fn,
    parts=parts,
    dense=params,
    loss=loss,
    divergence=divergence or _usual(loss),
    weight=_weight(loss, divergence, distill_weight),
    train_fn=train_fn,
    statistics=statistics if norms == TRAINED else None,
    compute_dtype=compute_dtype,
  )
  trained, moving, fixed = goal.arrays()
  placed = feeding.placement((trained, fixed), mesh, batch_axes)
  judge = None
  if validation is not None:
    judge = Validation(goal, validation, metric, placed, fixed)
  transformation, schedule = optimizers.built(optimizer, parts, steps)
  arrays = loop.run(
    goal,
    transformation,
    trained,
    batches,
    options,
    moving=moving,
    fixed=fixed,
    validate=judge,
    placed=placed,
    directory=directory,
    identity={
      'optimizer': optimizers.describe(optimizer),
      'distill_weight': repr(goal.weight),
      'norms': norms,
      'balance': repr(balance),
      'compute_dtype': repr(compute_dtype),
      'trainable': repr([list(rule) for rule in trainable]),
    },
    schedule=schedule,
    desc=desc,
  )
  if norms == REESTIMATED:
    assert statistics is not None
    rest = itertools.islice(_after(batches, steps), _STATISTICS_BATCHES)
    new = batch_statistics.reestimate(
      statistics, goal.tree(arrays, fixed), rest, moving
    )
    found = take_apart(new, trainable).moving
    if judge is None or judge(arrays | found) <= judge(arrays):
      arrays |= found
  tuned = goal.tree(arrays, fixed)
  return balance_.reblocked(tuned, small) if balance else tuned


def _usual(loss: LossFn | None) -> Divergence:
  found: Divergence = getattr(loss, 'divergence', squared_error)
  return found


def _weight(
  loss: LossFn | None, divergence: Divergence | None, given: float | None
) -> float:
  """Part of the divergence in what is minimised."""
  if given is None:
    given = 1.0 if loss is None else 0.0 if divergence is None else 0.5
  if not 0 <= given <= 1:
    raise ValueError(f'distill_weight={given}; it must be in [0, 1]')
  if loss is None and given != 1:
    raise ValueError(
      f'distill_weight={given} leaves {1 - given} to a loss of labels; pass '
      'loss=, or distill_weight=1'
    )
  return given


def _check_norms(norms: str, statistics: Any) -> None:
  if norms not in NORMS:
    raise ValueError(f'norms={norms!r}; it is one of {NORMS}')
  if (statistics is not None) != (norms != FROZEN):
    raise ValueError(
      f'norms={norms!r} and {"no" if statistics is None else "a function"} '
      'statistics=: the latter is for norms that are trained or reestimated'
    )


def _after(batches: feeding.Batches, steps: int) -> Iterator[Any]:
  """The batches after the last step; an iterator is there already."""
  used = isinstance(batches, Iterator)
  return feeding.stream(batches, 0 if used else steps)

"""The one training loop: steps, validation, checkpoints, what is logged."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
import contextlib
import dataclasses
import math
import os
from typing import Any

import jax
import numpy as np

from utilized_rank.host import processes
from utilized_rank.host import stopping
from utilized_rank.host.extras import extra
from utilized_rank.host.progress import say
from utilized_rank.host.progress import track
from utilized_rank.storage import resume
from utilized_rank.training import feeding
from utilized_rank.training import metrics
from utilized_rank.training import step as steps_
from utilized_rank.training.parts import Arrays
from utilized_rank.training.step import Objective
from utilized_rank.training.step import State

with extra('train'):
  import optax


@dataclasses.dataclass(frozen=True)
class Options:
  """How a loop runs, whatever is minimised.

  Attributes:
    steps: number of updates.
    seed: decides the keys of all steps.
    accumulate: parts of every batch that are run one after the other.
    ema: decay of an average of the parameters, which then is what is validated
      and returned; 0 for none.
    validate_every: steps between two validations; 0 for the end alone.
    patience: validations without a new best after which it stops; 0 for never.
    checkpoint_every: steps between two checkpoints; 0 for the last one only.
    log_every: steps between two lines of metrics; a NaN is noticed then.
    tensorboard: write events for TensorBoard beside the lines.
    progress: show a progress bar.
  """

  steps: int
  seed: int = 0
  accumulate: int = 1
  ema: float = 0.0
  validate_every: int = 0
  patience: int = 0
  checkpoint_every: int = 0
  log_every: int = 50
  tensorboard: bool = False
  progress: bool = True

  def __post_init__(self):
    least = {'steps': 1, 'accumulate': 1, 'log_every': 1}
    for name in ('seed', 'validate_every', 'patience', 'checkpoint_every'):
      least[name] = 0
    for name, value in least.items():
      if getattr(self, name) < value:
        what = f'at least {value}' if value else 'not negative'
        raise ValueError(f'{name}={getattr(self, name)}; it must be {what}.')
    if not 0 <= self.ema < 1:
      raise ValueError(f'ema={self.ema}; it must be in [0, 1).')

  @property
  def identity(self) -> dict[str, str]:
    """What decides the result; the rest may change when a run goes on."""
    names = ('steps', 'seed', 'accumulate', 'ema', 'validate_every', 'patience')
    return {name: repr(getattr(self, name)) for name in names}


@dataclasses.dataclass
class Best:
  """The best parameters so far, on the host.

  Attributes:
    value: their score, lower being better; infinity before the first.
    step: when they were found.
    params: trained arrays and running statistics by name.
    waited: validations since then.
  """

  value: Any
  step: Any
  params: Arrays
  waited: Any

  @classmethod
  def none(cls, state: State) -> Best:
    zeros = lambda v: np.zeros(v.shape, v.dtype)
    params = jax.tree.map(zeros, state.judged | state.moving)
    zero = np.int32(0)
    return cls(np.float32(np.inf), zero, params, zero)

  def offer(self, value: float, step: int, state: State) -> None:
    """Takes the state's parameters if they are better."""
    if value < self.value:
      # A copy: on CPU np.asarray is a view, and the buffers get donated.
      params = jax.tree.map(np.array, state.judged | state.moving)
      self.value, self.step = np.float32(value), np.int32(step)
      self.params, self.waited = params, np.int32(0)
    else:
      self.waited = np.int32(self.waited + 1)

  def asdict(self) -> dict[str, Any]:
    return {k: v for k, v in vars(self).items()}


def run(
  objective: Objective,
  optimizer: optax.GradientTransformation,
  params: Arrays,
  batches: feeding.Batches,
  options: Options,
  *,
  moving: Arrays | None = None,
  fixed: Any = None,
  validate: Callable[[Arrays], float] | None = None,
  placed: feeding.Placement = feeding.ANYWHERE,
  directory: str | os.PathLike[str] | None = None,
  identity: dict[str, Any] | None = None,
  schedule: optax.Schedule | None = None,
  desc: str = 'train',
) -> Arrays:
  """Trains; resumes what was interrupted, to the same bits.

  Args:
    objective: what is minimised.
    optimizer: of a dict of arrays.
    params: trained arrays by name; they are copied, not donated.
    batches: see `feeding.stream`.
    options: how.
    moving: running statistics by name.
    fixed: the objective's constants.
    validate: of trained arrays and running statistics, a score, lower being
      better; the best ones are kept, and returned.
    placed: where arrays and batches are.
    directory: where checkpoints and `metrics.jsonl` go; None keeps nothing.
    identity: what else decides the result, besides the options.
    schedule: the learning rate, to log.
    desc: name of the run on the progress bar, in errors and in profiles.

  Returns:
    Trained arrays and running statistics by name.

  Raises:
    DivergedError: loss or gradient is not finite; names the steps.
    Preempted: with a directory, when the job's machines are taken away or a
      signal asks under `stopping.on_signals`; the step is saved.
    ValueError: there are fewer batches than steps, or a checkpoint is damaged
      or belongs to other options.
  """
  with contextlib.ExitStack() as stack:
    stack.enter_context(placed.within())
    # Copied first: what is moved to a mesh may be there already.
    state = placed.arrays(
      steps_.begin(placed.arrays(params), moving or {}, optimizer, options.ema)
    )
    best = Best.none(state) if validate is not None else None
    checkpoints = None
    if directory is not None:
      checkpoints = stack.enter_context(
        resume.Checkpoints(directory, options.identity | (identity or {}))
      )
      state, best = _restored(checkpoints, state, best)
    start = int(state.step)
    if options.progress and 0 < start < options.steps:
      say(f'{desc}: resuming at step {start + 1} of {options.steps}')
    log = stack.enter_context(
      metrics.Log(
        directory,
        start,
        desc,
        every=options.log_every,
        schedule=schedule,
        tensorboard=options.tensorboard,
      )
    )
    update = _compiled(objective, optimizer, options, state, placed)
    fixed = placed.arrays(fixed)
    if best is not None and not start:
      # What nothing improves on stays as it is.
      value = _judged(validate, state, start, desc)
      best.offer(value, start, state)
      log.write({'step': start, 'validation': value})
    source = feeding.stream(batches, start)
    # An iterator that makes batches ahead stops when it is closed.
    stack.callback(source.close)
    numbers: Iterable[int] = range(start + 1, options.steps + 1)
    if best is not None and _is_up(best, options):
      numbers = ()
    for step in _shown(numbers, options, start, desc, log):
      batch, examples = placed.batch(
        _next(source, step, options, desc), step, options.accumulate
      )
      state, values = update(state, batch, fixed)
      is_last = step == options.steps
      leaves = checkpoints is not None and processes.is_leaving(step)
      saves = _is_due(step, options.checkpoint_every) or is_last or leaves
      log.add(step, values, examples, flush=saves)
      stops = False
      if best is not None and (
        _is_due(step, options.validate_every) or is_last
      ):
        value = _judged(validate, state, step, desc)
        best.offer(value, step, state)
        log.write({'step': step, 'validation': value})
        stops = _is_up(best, options)
      if checkpoints is not None and (saves or stops):
        checkpoints.save(step, _saved(state, best))
      if stops:
        break
      if leaves and not is_last:
        raise stopping.Preempted(
          f'{desc} is stopped after step {step} of {options.steps}, which is '
          'saved; the same call goes on from it'
        )
    if best is not None:
      return feeding.like(best.params, state.judged | state.moving)
    return state.judged | state.moving


def _compiled(
  objective: Objective,
  optimizer: optax.GradientTransformation,
  options: Options,
  state: State,
  placed: feeding.Placement,
) -> Callable[..., tuple[State, dict[str, jax.Array]]]:
  update = steps_.make(
    objective,
    optimizer,
    seed=options.seed,
    accumulate=options.accumulate,
    ema=options.ema,
  )
  how: dict[str, Any] = {}
  if placed.mesh is not None:
    # Else the compiler may spread what the next step then takes apart again.
    how['out_shardings'] = jax.tree.map(lambda v: v.sharding, state), None
  return jax.jit(update, donate_argnums=0, **how)


def _judged(
  validate: Callable[[Arrays], float] | None, state: State, step: int, desc: str
) -> float:
  assert validate is not None
  value = validate(state.judged | state.moving)
  if not math.isfinite(value):
    raise metrics.DivergedError(
      f'{desc}: the validation after step {step} gives {value}'
    )
  return value


def _saved(state: State, best: Best | None) -> dict[str, Any]:
  return {'state': state, 'best': None if best is None else best.asdict()}


def _restored(
  checkpoints: resume.Checkpoints, state: State, best: Best | None
) -> tuple[State, Best | None]:
  """State and best of the newest checkpoint, or these."""
  found = checkpoints.restore(_saved(state, best))
  if found is None:
    return state, best
  saved = found[1]
  if best is not None:
    best = Best(**saved['best'])
  return feeding.like(saved['state'], state), best


def _is_up(best: Best, options: Options) -> bool:
  """Whether patience is."""
  return 0 < options.patience <= int(best.waited)


def _is_due(step: int, every: int) -> bool:
  return bool(every) and step % every == 0


def _next(source: Iterator[Any], step: int, options: Options, desc: str) -> Any:
  try:
    return next(source)
  except StopIteration:
    raise ValueError(
      f'{desc}: batches end after {step - 1} of {options.steps} steps. Give a '
      'list or a loader, which is gone through again, or '
      'batches(start_step), an endless iterator from that step on.'
    ) from None


def _shown(
  numbers: Iterable[int],
  options: Options,
  start: int,
  desc: str,
  log: metrics.Log,
) -> Iterable[int]:
  if not options.progress:
    return numbers
  return track(
    numbers,
    total=options.steps,
    initial=start,
    desc=desc,
    unit='step',
    status=log.status,
  )

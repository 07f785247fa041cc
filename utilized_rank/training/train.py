"""Training and fine-tuning of any classifier on any parameter tree."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
import contextlib
import dataclasses
import functools
import os
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from utilized_rank.host import options
from utilized_rank.host import processes
from utilized_rank.host import progress
from utilized_rank.host import stopping
from utilized_rank.host.extras import extra
from utilized_rank.storage import resume
from utilized_rank.training import metrics
from utilized_rank.training import objectives
from utilized_rank.training.evaluate import Forward
from utilized_rank.training.evaluate import evaluate
from utilized_rank.training.metrics import DivergedError

with extra('train'):
  import optax

__all__ = [
  'DivergedError',
  'Forward',
  'Teacher',
  'TrainConfig',
  'evaluate',
  'fit',
  'linen_forward',
  'minimize',
]


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """How to train; the sections `config.train` and `config.finetune`.

  Attributes:
    steps: number of updates.
    batch_size: images per update.
    learning_rate: peak of the schedule, which rises linearly over
      `warmup_steps` and falls to 0 along a cosine.
    warmup_steps: see above.
    weight_decay: of AdamW, multiplied by the learning rate.
    decay_rule: regular expression that the whole path of a leaf must match to
      be decayed; the default takes kernels and the factors of kernels.
    label_smoothing: probability spread over all classes.
    clip_norm: largest global norm of the gradient; infinity for none.
    seed: decides dropout, and the order of the data where the caller uses it
      for that.
    checkpoint_every: steps between two checkpoints; 0 for the last one only.
    log_every: steps between two lines of metrics; a NaN is noticed then.
    distill_weight: part a of the loss (1 - a) cross-entropy + a distillation.
    distill_temperature: see `losses.distillation`.
  """

  steps: int
  batch_size: int
  learning_rate: float = 1e-3
  warmup_steps: int = 0
  weight_decay: float = 0.0
  decay_rule: str = r'(.*/)?kernel(/(a|b(_\w+)?))?'
  label_smoothing: float = 0.0
  clip_norm: float = 1.0
  seed: int = 0
  checkpoint_every: int = 0
  log_every: int = 50
  distill_weight: float = 0.0
  distill_temperature: float = 1.0

  def __post_init__(self):
    _require(self, 'steps', self.steps >= 1, 'at least 1')
    _require(self, 'batch_size', self.batch_size >= 1, 'at least 1')
    _require(self, 'learning_rate', self.learning_rate > 0, 'positive')
    _require(
      self,
      'warmup_steps',
      0 <= self.warmup_steps < self.steps,
      f'in [0, steps={self.steps})',
    )
    _require(self, 'weight_decay', self.weight_decay >= 0, 'not negative')
    _require(
      self, 'label_smoothing', 0 <= self.label_smoothing < 1, 'in [0, 1)'
    )
    _require(self, 'clip_norm', self.clip_norm > 0, 'positive')
    _require(self, 'seed', self.seed >= 0, 'not negative')
    _require(
      self, 'checkpoint_every', self.checkpoint_every >= 0, 'not negative'
    )
    _require(self, 'log_every', self.log_every >= 1, 'at least 1')
    _require(self, 'distill_weight', 0 <= self.distill_weight <= 1, 'in [0, 1]')
    _require(
      self, 'distill_temperature', self.distill_temperature > 0, 'positive'
    )


# The batches from a step on; see `fit`.
Batches = Callable[[int], Iterator[Mapping[str, Any]]]


class Teacher(NamedTuple):
  """The model whose logits a fine-tune imitates."""

  forward: Forward
  params: Any


class _State(NamedTuple):
  params: Any
  optimizer: Any
  step: jax.Array  # shape=(), dtype=int32


def fit(
  forward: Forward,
  params: Any,
  batches: Batches,
  config: Any,
  *,
  directory: str | os.PathLike[str] | None = None,
  teacher: Teacher | None = None,
  desc: str = 'train',
) -> Any:
  """Trains with AdamW, warm-up and cosine; resumes what was interrupted.

  The result is a function of the arguments alone: a run that was killed and
  started again with the same ones returns bit for bit what an uninterrupted
  run returns, since parameters, optimizer and step are restored, and the data
  and the dropout of a step depend on nothing else.

  Example:
    >>> def forward(params, images, *, train, rng):
    ...   return images @ params['kernel']
    >>> batch = {'image': np.eye(2, dtype='f'), 'label': np.array([0, 1])}
    >>> params = fit(forward, {'kernel': jnp.zeros((2, 2))},
    ...              lambda start: iter(lambda: batch, None),
    ...              TrainConfig(steps=5, batch_size=2, learning_rate=0.1))
    >>> evaluate(forward, params, [batch])['accuracy']
    1.0

  Args:
    forward: `forward(params, images, *, train, rng)` to logits `(B, K)`.
    params: any pytree of arrays; it is copied, not donated.
    batches: `batches(start_step)` yields the batches from that step on, as
      `{'image': (B, H, W, C), 'label': (B,)}`.
    config: a `TrainConfig`, or a mapping of its fields.
    directory: where checkpoints and `metrics.jsonl` go; None keeps nothing.
    teacher: needed where `distill_weight` is positive.
    desc: name of the run on the progress bar, in errors and in profiles.

  Returns:
    The trained tree, of the type and shapes of `params`.

  Raises:
    DivergedError: loss or gradient is not finite; names the steps.
    ValueError: a wrong option, a teacher without distillation or the other
      way round, a decay rule that no leaf matches, or a checkpoint that is
      damaged or belongs to other options.
  """
  config = options.from_config(TrainConfig, config, f'config.{desc}')
  if (teacher is not None) != (config.distill_weight > 0):
    raise ValueError(
      f'{desc}: distill_weight={config.distill_weight} and '
      f'{"a" if teacher is not None else "no"} teacher; a teacher and a '
      'positive weight go together.'
    )
  objective = objectives.supervised(
    forward,
    config.label_smoothing,
    teacher.forward if teacher is not None else None,
    config.distill_weight,
    config.distill_temperature,
  )
  frozen = teacher.params if teacher is not None else None
  return minimize(
    objective,
    params,
    batches,
    config,
    frozen=frozen,
    directory=directory,
    desc=desc,
  )


def minimize(
  objective: objectives.Objective,
  params: Any,
  batches: Batches,
  config: Any,
  *,
  frozen: Any = None,
  directory: str | os.PathLike[str] | None = None,
  desc: str = 'train',
) -> Any:
  """`fit` for any objective, such as `mae.objective`.

  Example:
    >>> def distance(params, frozen, batch, rng):
    ...   return jnp.square(params['x'] - batch['image']).mean(), {}
    >>> params = minimize(distance, {'x': jnp.zeros(())},
    ...                   lambda start: iter(lambda: {'image': np.ones(2)}, 0),
    ...                   TrainConfig(steps=99, batch_size=2, learning_rate=.1))
    >>> round(float(params['x']), 2)
    1.0

  Args:
    objective: see `objectives.Objective`; the options of `config` that only
      concern labels and teachers are the caller's to pass on to it.
    params: see `fit`, as for the rest.
    batches: see there.
    config: see there.
    frozen: the objective's constants.
    directory: see there.
    desc: see there.

  Returns:
    The trained tree, of the type and shapes of `params`.

  Raises:
    DivergedError: loss or gradient is not finite; names the steps.
    Preempted: with a directory, when the job's machines are taken away or a
      signal asks under `stopping.on_signals`; the step is saved.
    ValueError: a wrong option, a decay rule that no leaf matches, or a
      checkpoint that is damaged or belongs to other options.
  """
  config = options.from_config(TrainConfig, config, f'config.{desc}')
  optimizer = _optimizer(config, params)
  # A copy: the step donates its state, and params stay the caller's.
  params = jax.tree.map(lambda x: jnp.array(x, copy=True), params)
  state = _State(params, optimizer.init(params), jnp.zeros((), jnp.int32))
  update = _make_update(objective, config)
  with contextlib.ExitStack() as stack:
    checkpoints = None
    if directory is not None:
      checkpoints = stack.enter_context(
        resume.Checkpoints(directory, _identity(config))
      )
      found = checkpoints.restore(state)
      if found is not None:
        state = jax.tree.map(jnp.asarray, found[1])
    start = int(state.step)
    if 0 < start < config.steps:
      progress.say(f'{desc}: resuming at step {start + 1} of {config.steps}')
    log = metrics.Log(
      directory,
      start,
      desc,
      batch_size=config.batch_size,
      every=config.log_every,
      schedule=_schedule(config),
    )
    stream = batches(start)
    # An iterator that makes batches ahead stops when it is closed.
    stack.callback(getattr(stream, 'close', lambda: None))
    for step in progress.track(
      range(start + 1, config.steps + 1),
      total=config.steps,
      initial=start,
      desc=desc,
      unit='step',
      status=log.status,
    ):
      state, values = update(state, next(stream), frozen)
      is_last, every = step == config.steps, config.checkpoint_every
      leaves = directory is not None and processes.is_leaving(step)
      saves = is_last or leaves or bool(every and step % every == 0)
      log.add(step, values, flush=saves)
      if saves and checkpoints is not None:
        checkpoints.save(step, state)
      if leaves and not is_last:
        raise stopping.Preempted(
          f'{desc} is stopped after step {step} of {config.steps}, which is '
          'saved'
        )
  return state.params


@functools.cache
def linen_forward(model: Any) -> Forward:
  """`forward` of a Flax Linen classifier on its variables.

  Equal models give the same function, so that they share compilations.

  Args:
    model: a module with `__call__(images, *, train)`.
  """

  def forward(
    params: Any,
    images: jax.Array,
    *,
    train: bool = False,
    rng: jax.Array | None = None,
  ) -> jax.Array:
    if not train:
      return model.apply(params, images, train=False)
    # Batch norms would write their statistics, which is
    # `batch_statistics.reestimate`'s work.
    logits, _ = model.apply(
      params,
      images,
      train=True,
      rngs={'dropout': rng},
      mutable=[name for name in params if name != 'params'],
    )
    return logits

  return forward


def _schedule(config: TrainConfig) -> optax.Schedule:
  return optax.warmup_cosine_decay_schedule(
    init_value=0.0 if config.warmup_steps else config.learning_rate,
    peak_value=config.learning_rate,
    warmup_steps=config.warmup_steps,
    decay_steps=config.steps,
  )


def _optimizer(
  config: TrainConfig, params: Any
) -> optax.GradientTransformation:
  if config.weight_decay and not any(
    jax.tree.leaves(_decayed(config.decay_rule, params))
  ):
    raise ValueError(
      f'decay_rule={config.decay_rule!r} matches no leaf of the parameters; '
      'correct it or set weight_decay=0.'
    )
  return _transform(config)


def _transform(config: TrainConfig) -> optax.GradientTransformation:
  return optax.chain(
    optax.clip_by_global_norm(config.clip_norm),
    optax.adamw(
      _schedule(config),
      weight_decay=config.weight_decay,
      mask=functools.partial(_decayed, config.decay_rule),
    ),
  )


def _decayed(rule: str, params: Any) -> Any:
  def matches(path: Any, leaf: Any) -> bool:
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    return re.fullmatch(rule, name) is not None and np.ndim(leaf) >= 2

  return jax.tree_util.tree_map_with_path(matches, params)


# Cached, so that runs which differ in data or parameters alone, such as the
# second half of an interrupted one, share one compilation.
@functools.lru_cache(maxsize=8)
def _make_update(
  objective: objectives.Objective, config: TrainConfig
) -> Callable[..., tuple[_State, dict[str, jax.Array]]]:
  optimizer = _transform(config)

  @functools.partial(jax.jit, donate_argnums=0)
  def update(
    state: _State, batch: Mapping[str, jax.Array], frozen: Any
  ) -> tuple[_State, dict[str, jax.Array]]:
    rng = jax.random.fold_in(jax.random.key(config.seed), state.step)
    grad_fn = jax.value_and_grad(objective, has_aux=True)
    (loss, more), grads = grad_fn(state.params, frozen, batch, rng)
    change, moments = optimizer.update(grads, state.optimizer, state.params)
    values = {'loss': loss, **more, 'grad_norm': _norm(grads)}
    params = optax.apply_updates(state.params, change)
    return _State(params, moments, state.step + 1), values

  return update


def _norm(tree: Any) -> jax.Array:
  return jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(tree)))


def _identity(config: TrainConfig) -> dict[str, Any]:
  """What decides the result; the rest may change when a run goes on."""
  identity = dataclasses.asdict(config)
  del identity['checkpoint_every'], identity['log_every']
  # JSON has no infinity.
  return {key: repr(value) for key, value in identity.items()}


def _require(config: TrainConfig, name: str, holds: bool, what: str) -> None:
  if not holds:
    raise ValueError(f'{name}={getattr(config, name)!r}; it must be {what}.')

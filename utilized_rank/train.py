"""Training and fine-tuning of any classifier on any parameter tree."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
import contextlib
import dataclasses
import functools
import json
import math
import os
import re
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from utilized_rank import losses
from utilized_rank import options
from utilized_rank import progress
from utilized_rank import resume
from utilized_rank.evaluate import Forward
from utilized_rank.evaluate import evaluate

__all__ = [
  'DivergedError',
  'Forward',
  'Teacher',
  'TrainConfig',
  'evaluate',
  'fit',
  'linen_forward',
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
  decay_rule: str = r'(.*/)?kernel(/[ab])?'
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


class Teacher(NamedTuple):
  """The model whose logits a fine-tune imitates."""

  forward: Forward
  params: Any


class DivergedError(FloatingPointError):
  """The loss or the gradient became NaN or infinite."""


class _State(NamedTuple):
  params: Any
  optimizer: Any
  step: jax.Array  # shape=(), dtype=int32


def fit(
  forward: Forward,
  params: Any,
  batches: Callable[[int], Iterator[Mapping[str, Any]]],
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
  optimizer = _optimizer(config, params)
  # A copy: the step donates its state, and params stay the caller's.
  params = jax.tree.map(lambda x: jnp.array(x, copy=True), params)
  state = _State(params, optimizer.init(params), jnp.zeros((), jnp.int32))
  update = _make_update(
    forward, teacher.forward if teacher is not None else None, config
  )
  teacher_params = teacher.params if teacher is not None else None
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
    log = _Log(directory, start, config, desc)
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
      state, metrics = update(state, next(stream), teacher_params)
      saves = step == config.steps or (
        config.checkpoint_every and step % config.checkpoint_every == 0
      )
      log.add(step, metrics, flush=bool(saves))
      if saves and checkpoints is not None:
        checkpoints.save(step, state)
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
    rngs = {'dropout': rng} if train else None
    return model.apply(params, images, train=train, rngs=rngs)

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
  forward: Forward, teacher_forward: Forward | None, config: TrainConfig
) -> Callable[..., tuple[_State, dict[str, jax.Array]]]:
  optimizer = _transform(config)
  weight = config.distill_weight

  @functools.partial(jax.jit, donate_argnums=0)
  def update(
    state: _State, batch: Mapping[str, jax.Array], teacher_params: Any
  ) -> tuple[_State, dict[str, jax.Array]]:
    rng = jax.random.fold_in(jax.random.key(config.seed), state.step)
    images, labels = batch['image'], batch['label']

    def loss_fn(params: Any) -> tuple[jax.Array, jax.Array]:
      logits = forward(params, images, train=True, rng=rng)
      loss = losses.cross_entropy(logits, labels, config.label_smoothing)
      if teacher_forward is not None:
        target = teacher_forward(teacher_params, images, train=False, rng=None)
        imitation = losses.distillation(
          logits, target, config.distill_temperature
        )
        loss = (1 - weight) * loss + weight * imitation
      return loss.mean(), logits

    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, logits), grads = grad_fn(state.params)
    change, moments = optimizer.update(grads, state.optimizer, state.params)
    metrics = {
      'loss': loss,
      'accuracy': jnp.mean(logits.argmax(axis=-1) == labels),
      'grad_norm': _norm(grads),
    }
    params = optax.apply_updates(state.params, change)
    return _State(params, moments, state.step + 1), metrics

  return update


def _norm(tree: Any) -> jax.Array:
  return jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(tree)))


def _identity(config: TrainConfig) -> dict[str, Any]:
  """What decides the result; the rest may change when a run goes on."""
  identity = dataclasses.asdict(config)
  del identity['checkpoint_every'], identity['log_every']
  # JSON has no infinity.
  return {key: repr(value) for key, value in identity.items()}


class _Log:
  """Gathers metrics on the device; fetches, checks and writes them rarely."""

  def __init__(
    self,
    directory: str | os.PathLike[str] | None,
    start: int,
    config: TrainConfig,
    desc: str,
  ):
    self._config = config
    self._desc = desc
    self._schedule = _schedule(config)
    self._window: list[dict[str, jax.Array]] = []
    self._since = time.monotonic()
    self._text = ''
    self._path = None
    if directory is not None:
      self._path = os.path.join(directory, 'metrics.jsonl')
      kept = _lines_until(self._path, start)
      with open(self._path, 'w', encoding='utf-8') as file:
        file.writelines(kept)

  def status(self) -> str:
    return self._text

  def add(
    self, step: int, metrics: dict[str, jax.Array], *, flush: bool
  ) -> None:
    self._window.append(metrics)
    if not flush and step % self._config.log_every:
      return
    first = step - len(self._window) + 1
    window = jax.device_get(self._window)
    seconds = time.monotonic() - self._since
    for i, values in enumerate(window):
      for name in ('loss', 'grad_norm'):
        if not math.isfinite(values[name]):
          raise DivergedError(
            f'{self._desc}: {name} is {values[name]} at step {first + i}, '
            f'seen in steps {first} to {step}. Lower the learning rate '
            f'({self._config.learning_rate}), or check the data and the '
            'parameters for values that are not finite.'
          )
    record: dict[str, float] = {'step': step}
    for name in window[0]:
      record[name] = float(np.mean([values[name] for values in window]))
    record['learning_rate'] = float(self._schedule(step - 1))
    images = len(window) * self._config.batch_size
    record['images_per_second'] = round(images / seconds, 1)
    self._text = f'loss {record["loss"]:.4f}'
    self._text += f', accuracy {record["accuracy"]:.4f}'
    if self._path is not None:
      with open(self._path, 'a', encoding='utf-8') as file:
        file.write(json.dumps(record) + '\n')
    self._window = []
    self._since = time.monotonic()


def _lines_until(path: str, step: int) -> list[str]:
  """The lines that a run which goes on after `step` keeps."""
  kept = []
  if os.path.exists(path):
    with open(path, encoding='utf-8') as file:
      for line in file:
        # The last line may be cut off, where the run was killed.
        if line.endswith('\n') and json.loads(line)['step'] <= step:
          kept.append(line)
  return kept


def _require(config: TrainConfig, name: str, holds: bool, what: str) -> None:
  if not holds:
    raise ValueError(f'{name}={getattr(config, name)!r}; it must be {what}.')

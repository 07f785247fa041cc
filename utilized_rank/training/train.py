"""Training of any classifier on any parameter tree."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
import functools
import os
from typing import Any

import jax

from utilized_rank.host import options
from utilized_rank.training import loop
from utilized_rank.training import objectives
from utilized_rank.training.config import TrainConfig
from utilized_rank.training.evaluate import Forward
from utilized_rank.training.evaluate import evaluate
from utilized_rank.training.metrics import DivergedError
from utilized_rank.training.parts import Arrays
from utilized_rank.training.parts import take_apart

__all__ = [
  'DivergedError',
  'Forward',
  'TrainConfig',
  'evaluate',
  'fit',
  'linen_forward',
  'minimize',
]

# The batches from a step on; see `fit`.
Batches = Callable[[int], Iterator[Mapping[str, Any]]]


def fit(
  forward: Forward,
  params: Any,
  batches: Batches,
  config: Any,
  *,
  directory: str | os.PathLike[str] | None = None,
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
    desc: name of the run on the progress bar, in errors and in profiles.

  Returns:
    The trained tree, of the type and shapes of `params`.

  Raises:
    DivergedError: loss or gradient is not finite; names the steps.
    ValueError: a wrong option, a decay rule that no leaf matches, or a
      checkpoint that is damaged or belongs to other options.
  """
  config = options.from_config(TrainConfig, config, f'config.{desc}')
  objective = objectives.supervised(forward, config.label_smoothing)
  return minimize(
    objective,
    params,
    batches,
    config,
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
  parts = take_apart(params)
  trained, rest = parts.split()

  def of_arrays(
    params: Arrays, moving: Arrays, fixed: Any, batch: Any, rng: jax.Array
  ) -> Any:
    others, frozen = fixed
    tree = parts.join(params | others)
    loss, values = objective(tree, frozen, batch, rng)
    return loss, (values, moving)

  optimizer = config.optimizer
  arrays = loop.run(
    of_arrays,
    optimizer.build(parts, config.steps),
    trained,
    batches,
    config.loop,
    fixed=(rest, frozen),
    directory=directory,
    identity=config.identity,
    schedule=optimizer.schedule(config.steps),
    desc=desc,
  )
  return parts.join(rest | arrays)


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

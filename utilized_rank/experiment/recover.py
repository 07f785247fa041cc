"""A run's smaller parameters fine-tuned, as its options say."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
import dataclasses
from typing import Any

import jax

from utilized_rank.training import batch_statistics
from utilized_rank.training import objectives
from utilized_rank.training import train
from utilized_rank.training.config import FinetuneConfig
from utilized_rank.training.finetune import FROZEN
from utilized_rank.training.finetune import finetune


def recover(
  model: Any,
  small: Any,
  dense: Any,
  batches: Callable[[int], Iterable[Any]],
  validation: Callable[[], Iterable[Any]],
  config: FinetuneConfig,
  directory: str,
) -> Any:
  """The smaller tree, trained on labels and on the dense network's logits.

  Args:
    model: a Linen classifier with `__call__(images, *, train)`.
    small: its variables with factors.
    dense: those without.
    batches: of training, from a step on.
    validation: makes an epoch of others.
    config: the options.
    directory: of checkpoints and metrics.
  """
  forward = train.linen_forward(model)

  def fn(params: Any, batch: Mapping[str, Any]) -> jax.Array:
    return forward(params, batch['image'], train=False, rng=None)

  def train_fn(
    params: Any, batch: Mapping[str, Any], rng: jax.Array
  ) -> jax.Array:
    return forward(params, batch['image'], train=True, rng=rng)

  has_norms = batch_statistics.COLLECTION in dense
  norms = config.norms if has_norms else FROZEN
  judged: dict[str, Any] = {}
  if config.validate_every:
    judged = {'validation': Again(validation), 'metric': objectives.mistakes}
  return finetune(
    fn,
    small,
    dense,
    batches,
    loss=objectives.labels(config.label_smoothing),
    divergence=objectives.imitation(config.distill_temperature),
    distill_weight=config.distill_weight,
    optimizer=config.optimizer,
    # Norms that are frozen use their running statistics in training as well.
    train_fn=None if has_norms and norms == FROZEN else train_fn,
    trainable=config.trainable,
    statistics=None if norms == FROZEN else batch_statistics.linen(model),
    norms=norms,
    balance=config.balance,
    compute_dtype=config.compute_dtype or None,
    mesh=_mesh(config.devices),
    directory=directory,
    **judged,
    **dataclasses.asdict(config.loop),
  )


def _mesh(devices: int) -> jax.sharding.Mesh | None:
  if devices == 1:
    return None
  if devices > jax.device_count():
    raise ValueError(
      f'config.finetune.devices={devices}; there are {jax.device_count()}'
    )
  kind = (jax.sharding.AxisType.Auto,)
  return jax.make_mesh(
    (devices,), ('data',), kind, devices=jax.devices()[:devices]
  )


class Again:
  """Batches that are made anew at every turn."""

  def __init__(self, make: Callable[[], Iterable[Any]]):
    self._make = make

  def __iter__(self) -> Iterator[Any]:
    return iter(self._make())

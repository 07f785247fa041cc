"""What training minimises, as functions of parameters and a batch."""

from __future__ import annotations

from collections.abc import Mapping
import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from utilized_rank.losses.logits import cross_entropy
from utilized_rank.losses.logits import distillation
from utilized_rank.training.evaluate import Forward

Array = jax.Array


class Objective(Protocol):
  """A scalar loss and metrics of one batch."""

  def __call__(
    self, params: Any, frozen: Any, batch: Mapping[str, Array], rng: Array
  ) -> tuple[Array, dict[str, Array]]:
    """Returns the loss and what else to log.

    Args:
      params: what is trained.
      frozen: any pytree that is not, such as a teacher's parameters.
      batch: a batch of the data.
      rng: a key for this step alone.
    """
    ...

  def __hash__(self) -> int:
    """Compilations are kept by the function itself."""
    ...


@functools.cache
def supervised(
  forward: Forward,
  label_smoothing: float = 0.0,
  teacher: Forward | None = None,
  weight: float = 0.0,
  temperature: float = 1.0,
) -> Objective:
  """Cross-entropy of a classifier, with distillation where there is a teacher.

  Equal arguments give the same function.

  Args:
    forward: the classifier.
    label_smoothing: see `cross_entropy`.
    teacher: a classifier whose parameters are the objective's `frozen`.
    weight: part a of (1 - a) cross-entropy + a distillation.
    temperature: see `distillation`.
  """

  def objective(
    params: Any, frozen: Any, batch: Mapping[str, Array], rng: Array
  ) -> tuple[Array, dict[str, Array]]:
    images, labels = batch['image'], batch['label']
    logits = forward(params, images, train=True, rng=rng)
    loss = cross_entropy(logits, labels, label_smoothing)
    if teacher is not None:
      target = teacher(frozen, images, train=False, rng=None)
      imitation = distillation(logits, target, temperature)
      loss = (1 - weight) * loss + weight * imitation
    accuracy = jnp.mean(logits.argmax(axis=-1) == labels)
    return loss.mean(), {'accuracy': accuracy}

  return objective

"""What training minimises, as functions of parameters and a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
      frozen: any pytree that is not.
      batch: a batch of the data.
      rng: a key for this step alone.
    """
    ...


def supervised(forward: Forward, label_smoothing: float = 0.0) -> Objective:
  """Cross-entropy of a classifier.

  Args:
    forward: the classifier.
    label_smoothing: see `cross_entropy`.
  """

  def objective(
    params: Any, frozen: Any, batch: Mapping[str, Array], rng: Array
  ) -> tuple[Array, dict[str, Array]]:
    del frozen
    images, labels = batch['image'], batch['label']
    logits = forward(params, images, train=True, rng=rng)
    loss = cross_entropy(logits, labels, label_smoothing)
    accuracy = jnp.mean(logits.argmax(axis=-1) == labels)
    return loss.mean(), {'accuracy': accuracy}

  return objective


def labels(label_smoothing: float = 0.0) -> Callable[[Any, Any], Array]:
  """`loss(logits, batch) -> (B,)`: cross-entropy of `batch['label']`."""

  def loss(logits: Array, batch: Mapping[str, Array]) -> Array:
    return cross_entropy(logits, batch['label'], label_smoothing)

  return loss


def mistakes(logits: Array, batch: Mapping[str, Array]) -> Array:
  """(B,): 1 where the largest logit is not that of `batch['label']`."""
  return (logits.argmax(axis=-1) != batch['label']).astype(jnp.float32)


def imitation(temperature: float = 1.0) -> Callable[[Any, Any, Any], Array]:
  """`divergence(dense, logits, batch) -> (B,)`, see `distillation`."""

  def divergence(dense: Array, logits: Array, batch: Any) -> Array:
    del batch
    return distillation(logits, dense, temperature)

  return divergence

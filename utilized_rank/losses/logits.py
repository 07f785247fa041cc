"""Losses on logits, per example, so that callers weigh and average them."""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def cross_entropy(
  logits: Array, labels: Array, label_smoothing: float = 0.0
) -> Array:
  """Cross-entropy against softened labels.

  Args:
    logits: `(B, K)`.
    labels: `(B,)` integers in [0, K).
    label_smoothing: probability s that is spread over all K classes, so that
      the label keeps 1 - s + s/K.

  Returns:
    `(B,)` in nats, float32.
  """
  log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
  picked = jnp.take_along_axis(log_p, labels[:, None], axis=-1)[:, 0]
  return -(
    (1 - label_smoothing) * picked + label_smoothing * log_p.mean(axis=-1)
  )


def distillation(
  logits: Array, teacher_logits: Array, temperature: float
) -> Array:
  """T^2 KL(teacher || student) at temperature T.

  Hinton et al., https://arxiv.org/abs/1503.02531. The factor T^2 keeps the
  gradient's size when T changes: it is T (softmax(z/T) - softmax(t/T)) for
  the logits z and t. Nothing flows into the teacher.

  Args:
    logits: `(B, K)` of the student.
    teacher_logits: `(B, K)`.
    temperature: T > 0.

  Returns:
    `(B,)` in nats, float32; 0 where the two agree.
  """
  student = logits.astype(jnp.float32) / temperature
  teacher = jax.lax.stop_gradient(teacher_logits).astype(jnp.float32)
  return temperature**2 * relative_entropy(teacher / temperature, student)


def relative_entropy(true: Array, other: Array) -> Array:
  """KL(true || other) of the distributions that logits stand for.

  As probabilities add up to 1, sum p log(p / q) is also the sum of
  p (e^D - 1 - D), D = log q - log p. No part of that is negative, so that what
  is nearly equal is told apart by far less than the logits' own rounding, which
  is what p log(p / q) comes down to there. A class that both exclude (-inf)
  counts for nothing.

  Args:
    true: (..., K) logits.
    other: (..., K) logits.

  Returns:
    (...), nats in float32.

  >>> near = 1e-4 * jnp.array([1.0, 0.0])
  >>> float(relative_entropy(jnp.zeros(2), near)) > 0
  True
  """
  log_p, log_q = (
    jax.nn.log_softmax(v.astype(jnp.float32)) for v in (true, other)
  )
  p, q = jnp.exp(log_p), jnp.exp(log_q)
  delta = jnp.where(p > 0, log_q - log_p, 0.0)
  is_near = jnp.abs(delta) < 0.1
  some = jnp.where(is_near, delta, 0.0)
  # e^D - 1 - D without cancellation: the next term is under 1e-6 of the first.
  series = some**2 / 2 * (1 + some / 3 * (1 + some / 4 * (1 + some / 5)))
  far = q - p - p * jnp.where(is_near, 0.0, delta)
  return jnp.where(is_near & (p > 0), p * series, far).sum(-1)

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
  student = jax.nn.log_softmax(logits.astype(jnp.float32) / temperature)
  teacher_logits = jax.lax.stop_gradient(teacher_logits).astype(jnp.float32)
  teacher = jax.nn.log_softmax(teacher_logits / temperature)
  kl = (jnp.exp(teacher) * (teacher - student)).sum(axis=-1)
  return temperature**2 * kl

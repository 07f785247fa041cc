"""Exact accuracy and cross-entropy of a classifier over batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
import functools
import math
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from utilized_rank.losses.logits import cross_entropy


class Forward(Protocol):
  """A classifier as a function of its parameters."""

  def __call__(
    self,
    params: Any,
    images: jax.Array,
    *,
    train: bool,
    rng: jax.Array | None,
  ) -> jax.Array:
    """Returns logits `(B, K)` of images `(B, H, W, C)`.

    `rng` is a key for dropout; None where `train` is false.
    """
    ...

  def __hash__(self) -> int:
    """Compilations are kept by the function itself."""
    ...


def evaluate(
  forward: Forward, params: Any, batches: Iterable[Mapping[str, Any]]
) -> dict[str, float]:
  """Averages over all examples; batches may differ in size.

  Smaller batches are padded to the size of the largest one so far, and the
  padding is masked, so one compilation serves all and no example counts
  twice.

  Example:
    `evaluate(forward, params, sources['test'].epoch(128))`

  Args:
    forward: the classifier.
    params: its parameters.
    batches: `{'image': (B, H, W, C), 'label': (B,)}` each.

  Returns:
    `accuracy` (top 1) and `top5_accuracy` in [0, 1], the counts `correct`
    and `top5_correct` behind them, `cross_entropy` in nats per example, and
    `count`.

  Raises:
    ValueError: there is no example.
  """
  size, parts = 0, []
  for batch in batches:
    images, labels = np.asarray(batch['image']), np.asarray(batch['label'])
    size = max(size, len(labels))
    pad = size - len(labels)
    images = np.pad(images, [(0, pad)] + [(0, 0)] * (images.ndim - 1))
    mask = np.arange(size) < len(labels)
    parts.append(_sums(forward, params, images, np.pad(labels, (0, pad)), mask))
  # Fetched at the end: nothing above waits for the device.
  parts = jax.device_get(parts)
  count, correct, top5 = (
    sum(int(part[name]) for part in parts)
    for name in ('count', 'correct', 'top5_correct')
  )
  if not count:
    raise ValueError('evaluate got no example; batches is empty.')
  return {
    'accuracy': correct / count,
    'top5_accuracy': top5 / count,
    'cross_entropy': math.fsum(part['cross_entropy'] for part in parts) / count,
    'correct': correct,
    'top5_correct': top5,
    'count': count,
  }


@functools.partial(jax.jit, static_argnums=0)
def _sums(
  forward: Forward,
  params: Any,
  images: jax.Array,
  labels: jax.Array,
  mask: jax.Array,
) -> dict[str, jax.Array]:
  logits = forward(params, images, train=False, rng=None)
  entropy = cross_entropy(logits, labels)
  # The first of equal logits counts, as for argmax.
  _, best = jax.lax.top_k(logits, min(5, logits.shape[-1]))
  right = best == labels[:, None]
  return {
    # where, not a product: padding may give anything, NaN included.
    'cross_entropy': jnp.where(mask, entropy, 0.0).sum(),
    'correct': (right[:, 0] & mask).sum(),
    'top5_correct': (right.any(axis=-1) & mask).sum(),
    'count': mask.sum(),
  }

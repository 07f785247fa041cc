"""Mixtures of a batch's examples, on which a dense function can be asked."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from utilized_rank.walk import compat

# Axes of an image, the batch's among them; with fewer, bytes may be tokens.
_IMAGE_AXES = 3


def can_mix(batch: Any) -> bool:
  """Whether examples can be mixed: numbers and images can, tokens cannot.

  Args:
    batch: pytree of arrays that all lead with the batch axis. Integers, one for
      each example, may stand beside what is mixed: labels stay as they are.

  >>> can_mix({'image': np.zeros((2, 8, 8), np.uint8), 'label': np.arange(2)})
  True
  >>> can_mix({'tokens': np.zeros((2, 16), np.int32)})
  False
  """
  arrays = jax.tree.leaves(batch)
  return any(map(_is_mixed, arrays)) and all(
    _is_mixed(v) or np.ndim(v) == 1 for v in arrays
  )


def mixed(batch: Any, random: np.random.Generator) -> Any:
  """Every example moved towards another one, by a share between 0 and 1.

  x + share (y - x), the share uniform.

  Args:
    batch: as for `can_mix`.
    random: where shares and partners are drawn from.

  Returns:
    The batch with the same shapes and dtypes, as numpy arrays.

  >>> x = np.array([[0.0], [8.0]])
  >>> both = mixed(x, np.random.default_rng(0))
  >>> bool((both >= 0).all() and (both <= 8).all())
  True
  """
  count = len(jax.tree.leaves(batch)[0])
  other = random.permutation(count)
  share = random.uniform(size=count)

  def mix(value: Any) -> Any:
    if not _is_mixed(value):
      return value
    wide = np.asarray(value, np.float32)
    by = share.astype(np.float32).reshape(-1, *[1] * (wide.ndim - 1))
    found = wide + by * (wide[other] - wide)
    if np.asarray(value).dtype == np.uint8:
      found = np.rint(found)
    return found.astype(value.dtype)

  return jax.tree.map(mix, batch)


def _is_mixed(value: Any) -> bool:
  dtype = value.dtype
  return compat.is_floating(dtype) or (
    dtype == np.uint8 and np.ndim(value) >= _IMAGE_AXES
  )

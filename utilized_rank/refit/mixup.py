"""Mixtures of a batch's examples, on which a dense function can be asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from utilized_rank.walk import compat

# Axes of an image, the batch's among them; with fewer, bytes may be tokens.
_IMAGE_AXES = 3


# A batch, and where chance comes from, to a batch of mixtures.
Mix = Callable[[Any, np.random.Generator], Any]


def mixing(batches: Sequence[Any]) -> Mix | None:
  """How examples of all these batches can be mixed; None where they cannot.

  Args:
    batches: pytrees of arrays that lead with the batch axis.
  """
  for is_fit, mix in ((can_mix, mixed), (can_splice, spliced)):
    if all(map(is_fit, batches)):
      return mix
  return None


def can_mix(batch: Any) -> bool:
  """Whether examples can be averaged: numbers and images can, tokens cannot.

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


def can_splice(batch: Any) -> bool:
  """Whether examples are sequences of tokens, of which one can go on another.

  Args:
    batch: as for `can_mix`. Whatever has more than one axis has the same number
      of positions, masks among them; labels of examples stay as they are.

  >>> can_splice({'tokens': np.zeros((2, 16), int), 'mask': np.ones((2, 16))})
  True
  >>> can_splice({'tokens': np.zeros((2, 16), int), 'memory': np.ones((2, 9))})
  False
  """
  long = [v for v in jax.tree.leaves(batch) if np.ndim(v) > 1]
  lengths = {np.shape(v)[1] for v in long}
  is_plain = lambda v: not jax.dtypes.issubdtype(v.dtype, jax.dtypes.extended)
  return (
    any(np.issubdtype(v.dtype, np.integer) for v in long if is_plain(v))
    and all(map(is_plain, jax.tree.leaves(batch)))
    and len(lengths) == 1
    and min(lengths) > 1
  )


def spliced(batch: Any, random: np.random.Generator) -> Any:
  """The first positions of every example, then those of another one.

  Where it changes is drawn for every example, from all places.

  Args:
    batch: as for `can_splice`.
    random: where places and partners are drawn from.

  Returns:
    The batch with the same shapes and dtypes, as numpy arrays.

  >>> spliced(np.repeat([[1], [2]], 6, 1), np.random.default_rng(6))
  array([[1, 1, 1, 2, 2, 2],
         [2, 2, 2, 1, 1, 1]])
  """
  count, length = next(
    np.shape(v)[:2] for v in jax.tree.leaves(batch) if np.ndim(v) > 1
  )
  other = random.permutation(count)
  is_first = np.arange(length) < random.integers(0, length + 1, (count, 1))

  def splice(value: Any) -> Any:
    value = np.asarray(value)
    if value.ndim < 2:
      return value
    first = is_first.reshape(count, length, *[1] * (value.ndim - 2))
    return np.where(first, value, value[other])

  return jax.tree.map(splice, batch)


def _is_mixed(value: Any) -> bool:
  dtype = value.dtype
  return compat.is_floating(dtype) or (
    dtype == np.uint8 and np.ndim(value) >= _IMAGE_AXES
  )

"""Batches of which some examples or tokens are padding.

`Masked` says what is padding, `hidden` hides it from a function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from utilized_rank.moments.counting import Counting
from utilized_rank.moments.rows import Rows
from utilized_rank.tree import paths
from utilized_rank.walk import tracing

# `mask(batch) -> (B,) or (B, T)`, nonzero where an example or token is real.
Mask = Callable[[Any], Any]


class Masked:
  """Gives every batch its mask, and all of them one size.

  An uneven batch is filled up with copies of its first example, which do not
  count: one compiled step serves them all.
  """

  def __init__(self, mask: Mask | str | None, shares: int, axis: int = 0):
    """`shares` is what sizes must divide by; `axis` that of the examples."""
    self._mask = mask
    self._shares = shares
    self._axis = axis
    self._size = 0

  def __call__(self, batch: Any, number: int) -> tuple[Any, Any]:
    """(batch, mask); without a mask the batch as it is, and None.

    Raises:
      ValueError: the mask does not fit the batch.
    """
    if self._mask is None:
      return batch, None
    if isinstance(self._mask, str):
      mask = batch[self._mask]
    else:
      mask = self._mask(batch)
    mask = np.asarray(mask) != 0
    end = self._axis + 1
    lead = np.shape(jax.tree.leaves(batch)[0])[:end]
    if mask.shape[:end] != lead or mask.ndim > end + 1:
      raise ValueError(
        f'the mask of batch {number} has shape {mask.shape}; it must be '
        f'{lead}, one per example, or {(*lead, "tokens")}'
      )
    size = lead[-1]
    # Two examples on each device at least: of one alone it cannot be said
    # which axis is the examples'.
    want = max(size, self._size, 2 * self._shares)
    want = -(-want // self._shares) * self._shares
    self._size = self._size or want
    if want == size:
      return batch, mask
    filled = [*range(size), *[0] * (want - size)]
    take = lambda a: (a if isinstance(a, jax.Array) else np.asarray(a)).take(
      np.array(filled), axis=self._axis
    )
    real = np.zeros((*lead[:-1], want, *mask.shape[end:]), bool)
    real[(slice(None),) * self._axis + (slice(size),)] = mask
    return jax.tree.map(take, batch), real


def unused(batch: Any) -> dict[str, float]:
  """What in a batch looks like a mask of padding, and the share that it hides.

  That is an array (B, T) of zeros and ones with `mask` in its name, whose
  zeros are at the start or at the end of each example.

  Args:
    batch: pytree of arrays that lead with the batch axis.

  Returns:
    Path to share of zeros, above 0.

  >>> mask = np.array([[1, 1, 1, 1], [1, 1, 0, 0]])
  >>> unused({'tokens': np.ones((2, 4)), 'mask': mask})
  {'mask': 0.25}
  """
  found = {}
  for path, leaf in paths.flatten(batch)[0].items():
    is_named = 'mask' in path.rpartition('/')[2].lower()
    is_here = getattr(leaf, 'is_fully_addressable', True)
    if is_named and is_here and np.ndim(leaf) == 2:
      mask = np.asarray(leaf)
      if _hides_ends(mask):
        found[path] = float(np.mean(mask == 0))
  return found


def _hides_ends(mask: np.ndarray) -> bool:
  real = mask != 0
  if real.all() or not np.all((mask == 0) | (mask == 1)):
    return False
  changes = np.diff(real.astype(np.int8), axis=1)
  return bool(np.all(np.abs(changes).sum(axis=1) <= 1))


# A batch and its mask, (B,) or (B, T), as `masks.Masked` gives them.
WithMask = tuple[Any, Any]


def hidden(fn: Callable[[Any, Any], Any]) -> Callable[[Any, WithMask], Any]:
  """`fn` with zeros in place of what its outputs say of padding.

  Whatever compares such outputs, or is a loss of them, leaves padding out.

  Args:
    fn: `fn(params, batch) -> outputs`.

  Returns:
    `masked(params, (batch, mask)) -> outputs`.

  >>> fn = lambda params, x: x @ params['w']
  >>> batch, mask = jnp.ones((2, 3, 1)), jnp.array([[1, 1, 0], [1, 0, 0]]) > 0
  >>> hidden(fn)({'w': jnp.eye(1)}, (batch, mask))[..., 0].tolist()
  [[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]]
  """

  def masked(params: Any, pair: WithMask) -> Any:
    batch, mask = pair
    traced = tracing.trace(fn, params, (batch,), {})
    outs = jax.core.eval_jaxpr(
      traced.jaxpr, traced.consts, *traced.params.values(), *traced.args
    )
    outs = Rows(Counting(mask), traced).real(traced.jaxpr.outvars, outs)
    return jax.tree.unflatten(traced.out_tree, outs)

  return masked


def of_batch(of: Callable[..., Any]) -> Callable[..., Any]:
  """A loss or divergence, whose last argument is the batch, of pairs."""
  return lambda *args: of(*args[:-1], args[-1][0])


def mask_of(pair: WithMask) -> Any:
  """The mask of a pair."""
  return pair[1]

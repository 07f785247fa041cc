"""Whether what fits few data is better than what looks at none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from utilized_rank.collection.collect import collect
from utilized_rank.collection.one_pass import check_batch
from utilized_rank.losses.divergence import Divergence
from utilized_rank.losses.divergence import comes_closer
from utilized_rank.moments.gradients import LossFn
from utilized_rank.moments.masks import Mask
from utilized_rank.moments.moments import Moments
from utilized_rank.ranks.trials import divergences
from utilized_rank.tree import paths


def generalises(
  fn: Callable[[Any, Any], Any],
  params: Any,
  moments: Moments,
  batches: Sequence[Any],
  blind: Any,
  fit: Callable[[Moments, list[Any]], Any],
  *,
  loss: LossFn | None,
  divergence: Divergence,
  mask: Mask | None = None,
) -> bool:
  """Whether a tree fitted to data beats one made without, on other data.

  Each half of the examples is compressed for, and judged on the other one.

  Args:
    fn: `fn(params, batch) -> outputs`.
    params: dense parameters.
    moments: of the kernels; only which they are, and whether with gradients.
    batches: the examples.
    blind: the tree to beat, such as truncated SVDs.
    fit: `fit(moments, batches)`, the tree that is made of some of the data.
    loss: as for `collect`.
    divergence: as for `tune_ranks`.
    mask: as for `collect`.

  Returns:
    Whether outputs are closer to the dense ones by more than the standard
    error of the difference; False where there is but one example.
  """
  halves = _halves(batches)
  if halves is None:
    return False
  select = paths.only(moments)
  with_loss = loss if moments.grads is not None else None
  before: list[np.ndarray] = []
  after: list[np.ndarray] = []
  for part, judge in (halves, halves[::-1]):
    few = collect(
      fn,
      params,
      part,
      loss=with_loss,
      mask=mask,
      select=select,
      progress=False,
    )
    for tree, found in ((blind, before), (fit(few, part), after)):
      found.append(divergences(fn, params, tree, judge, divergence))
  return comes_closer(np.concatenate(before), np.concatenate(after))


def _halves(batches: Sequence[Any]) -> tuple[list[Any], list[Any]] | None:
  """Every other batch, or the two halves of the only one."""
  if len(batches) > 1:
    return list(batches[::2]), list(batches[1::2])
  middle = check_batch(batches[0], 0) // 2
  if not middle:
    return None
  part = lambda cut: jax.tree.map(lambda v: v[cut], batches[0])
  return [part(slice(middle))], [part(slice(middle, None))]

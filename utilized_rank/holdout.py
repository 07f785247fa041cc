"""Whether what fits few data is better than what looks at none."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import re
from typing import Any

import jax
import numpy as np

from utilized_rank.collect import check_batch
from utilized_rank.collect import collect
from utilized_rank.divergence import Divergence
from utilized_rank.divergence import comes_closer
from utilized_rank.factorize import factorize
from utilized_rank.gradients import LossFn
from utilized_rank.moments import Moments
from utilized_rank.substitution import low_rank
from utilized_rank.tune import TunedRanks
from utilized_rank.tune import tune_ranks


def factorized(
  params: Any,
  moments: Moments,
  ranks: TunedRanks,
  gauge: str | None,
  progress: bool,
) -> Any:
  """The tree with the factors that the ranks were tried with."""
  return factorize(
    params,
    moments,
    ranks,
    method=ranks.families.method,
    damping=ranks.families.damping,
    families=ranks.families,
    gauge=gauge,
    progress=progress,
  )


def divergences(
  fn: Callable[[Any, Any], Any],
  params: Any,
  tree: Any,
  batches: Sequence[Any],
  divergence: Divergence,
) -> np.ndarray:
  """Of every example, (B,): how far `tree` is from the dense function."""
  small = low_rank(fn)
  each = jax.jit(
    lambda params, tree, batch: divergence(
      fn(params, batch), small(tree, batch), batch
    )
  )
  return np.concatenate([np.asarray(each(params, tree, b)) for b in batches])


def generalises(
  fn: Callable[[Any, Any], Any],
  params: Any,
  moments: Moments,
  batches: Sequence[Any],
  blind: Any,
  *,
  loss: LossFn | None,
  divergence: Divergence,
  budget: Mapping[str, Any],
) -> bool:
  """Whether tuned factors beat a tree made without data, on other data.

  Each half of the examples is compressed for, and judged on the other one.

  Args:
    fn: `fn(params, batch) -> outputs`.
    params: dense parameters.
    moments: of the kernels; only which they are, and whether with gradients.
    batches: the examples.
    blind: the tree to beat, such as truncated SVDs.
    loss: as for `collect`.
    divergence: as for `tune_ranks`.
    budget: what `tune_ranks` is to keep to.

  Returns:
    Whether outputs are closer to the dense ones by more than the standard
    error of the difference; False where there is but one example.
  """
  halves = _halves(batches)
  if halves is None:
    return False
  select = [(re.escape(path), True) for path in moments]
  with_loss = loss if moments.grads is not None else None
  before: list[np.ndarray] = []
  after: list[np.ndarray] = []
  for fit, judge in (halves, halves[::-1]):
    few = collect(
      fn, params, fit, loss=with_loss, select=select, progress=False
    )
    ranks = tune_ranks(
      fn, params, few, fit, divergence=divergence, progress=False, **budget
    )
    small = factorized(params, few, ranks, budget['gauge'], False)
    for tree, found in ((blind, before), (small, after)):
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

"""The best recipe in one call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sized
import functools
import itertools
from typing import Any, NamedTuple

import jax
import numpy as np

from utilized_rank.attention import one_budget
from utilized_rank.attention.find_attention import find_attention
from utilized_rank.attention.heads import Attention
from utilized_rank.collection.collect import collect
from utilized_rank.collection.one_pass import check_batch
from utilized_rank.compression import holdout
from utilized_rank.factorization.factorize import factorize
from utilized_rank.factorization.kernels import ENOUGH_ROWS
from utilized_rank.factorization.kernels import scarce
from utilized_rank.factorization.methods import DAMPING
from utilized_rank.losses.divergence import Divergence
from utilized_rank.losses.divergence import comes_closer
from utilized_rank.losses.divergence import squared_error
from utilized_rank.lowrank.leaf import merge
from utilized_rank.moments import masks
from utilized_rank.moments.capture import find_sites
from utilized_rank.moments.gradients import LossFn
from utilized_rank.moments.masks import Mask
from utilized_rank.moments.masks import Masked
from utilized_rank.moments.moments import Moments
from utilized_rank.products.gauge import IDENTITY
from utilized_rank.ranks.budget import one_fraction
from utilized_rank.ranks.trials import divergences
from utilized_rank.ranks.tune import tune_ranks
from utilized_rank.ranks.uniform import uniform_ranks
from utilized_rank.refit.anchor import anchor
from utilized_rank.refit.streams import Streams
from utilized_rank.report.measure import measure
from utilized_rank.report.report import Report
from utilized_rank.storage.recipe import Recipe
from utilized_rank.tree import paths
from utilized_rank.walk import compat
from utilized_rank.walk.interpret import UnsupportedError


@compat.moves_data
def compress(
  fn: Callable[[Any, Any], Any],
  params: Any,
  batches: Iterable[Any],
  *,
  moments: Moments | None = None,
  params_fraction: float | None = None,
  flops_fraction: float | None = None,
  loss: LossFn | None = None,
  divergence: Divergence | None = None,
  mask: Mask | str | None = None,
  select: paths.Rules | None = None,
  multiple_of: int = 1,
  gauge: str | None = IDENTITY,
  anchored: bool = True,
  heads: bool = True,
  trial_examples: int = 1024,
  energy: float = 0.99,
  progress: bool = True,
) -> tuple[Any, Report]:
  """Collects, measures, chooses ranks and factorizes.

  Factors of least error at the kernels' outputs and, with a loss, of least
  predicted loss are tried with the ranks that several predictions ask for;
  the best are corrected by what is seen at the outputs (`tune_ranks`), and
  their factors fitted one behind the other (`anchor`) where that helps. Where
  a kernel has fewer than four rows for every feature, that is done for each
  half of the examples first; if it does not beat the truncated SVD of the
  weights on the other half, the latter is what is returned.

  Args:
    fn: `fn(params, batch) -> outputs`.
    params: dense parameters.
    batches: calibration batches, each a pytree whose arrays lead with the
      batch axis.
    moments: what `collect` returned, to compress anew to another share;
      default they are collected here. With them the batches are read only
      until there are `trial_examples`.
    params_fraction: share of the kernels' parameters to keep, in (0, 1]; or
    flops_fraction: share of their multiplications.
    loss: `loss(outputs, batch) -> (B,)`, nats per example, such as
      `sampled_cross_entropy()`; the one that given moments are of.
    divergence: how far outputs are from the dense ones, see `tune_ranks`;
      default the KL divergence of the loss's logits for
      `sampled_cross_entropy`, else `squared_error`.
    mask: which examples or tokens are real and not padding, as for `collect`.
      Loss and divergence then see zeros in place of padded outputs, and
      factors are not fitted anew (`anchored`).
    select: ordered `(regex, bool)` rules over leaf paths; default all kernels.
      Given moments are of selected kernels already.
    multiple_of: ranks are multiples of this.
    gauge: as for `factorize`; None for plain pairs (`write_out` makes them
      later, for serving and for meshes of explicit axes).
    anchored: fit the factors anew behind compressed kernels, if the examples
      kept give four rows for every input feature; kept where outputs then
      are closer by more than the standard error of the difference.
    heads: try narrower attention heads as well (`factorize_heads`), within the
      same share of parameters, where there is a loss, rows are not few, and
      data flow shows query and key, value and output kernels; kept where
      outputs then are closer. It is a second search.
    trial_examples: as many of the first examples are kept in memory, to try
      ranks on and to anchor with.
    energy: share of the spectra that the report's ranks are at.
    progress: show progress bars.

  Returns:
    The tree for `low_rank(fn)`, and the `Report` of the dense one, whose
    `recipe` can be written down: it rebuilds the tree's shapes.

  Raises:
    ValueError: both moments and rules; several processes, which would each
      decide on the examples that they see; else as `collect`, `tune_ranks` and
      `factorize`.

  >>> fn = lambda params, x: x @ params['w']
  >>> params = {'w': jnp.eye(8)}
  >>> x = jnp.tile(jnp.eye(8)[:2], (16, 1))
  >>> small, report = compress(
  ...     fn, params, [x], params_fraction=0.75, progress=False)
  >>> small['w'].rank, report['w'].rank  # about their mean, rows differ in one
  (1, 2)
  """
  if jax.process_count() > 1:
    raise ValueError(
      f'compress tries ranks on what one process sees, and there are '
      f'{jax.process_count()}: collect(...) with all of them, ur.save the '
      'moments, and give them to compress(moments=...) in a single process'
    )
  if moments is not None and select is not None:
    raise ValueError(
      'select= chooses the kernels to collect, and moments= has kernels '
      'already: give one of them'
    )
  fraction = one_fraction(params_fraction, flops_fraction)
  rest = iter(batches)
  kept: list[Any] = []
  examples = 0
  while examples < trial_examples and (batch := next(rest, None)) is not None:
    examples += check_batch(batch, len(kept))
    kept.append(batch)
  if moments is None:
    moments = collect(
      fn,
      params,
      batches if isinstance(batches, Sized) else itertools.chain(kept, rest),
      loss=loss,
      mask=mask,
      select=select,
      progress=progress,
    )
  if divergence is None:
    divergence = getattr(loss, 'divergence', squared_error)
  real = None
  if mask is not None:
    masked = Masked(mask, 1)
    kept = [masked(batch, i) for i, batch in enumerate(kept)]
    fn, real, anchored = masks.hidden(fn), masks.mask_of, False
    divergence = masks.of_batch(divergence)
    loss = None if loss is None else masks.of_batch(loss)
  report = measure(params, moments, energy=energy, progress=progress)
  budget: dict[str, Any] = dict(
    params_fraction=params_fraction,
    flops_fraction=flops_fraction,
    multiple_of=multiple_of,
    gauge=gauge,
  )
  try_on = functools.partial(
    _tuned,
    fn,
    params,
    batches=kept,
    budget=budget,
    divergence=divergence,
    anchored=anchored,
    progress=progress,
  )
  is_scarce = bool(scarce(moments, moments))
  if is_scarce:
    blind, blind_ranks = _blind(params, moments, fraction, multiple_of, gauge)
    if not holdout.generalises(
      fn,
      params,
      moments,
      kept,
      blind,
      lambda few, part: try_on(params, few, batches=part, progress=False).tree,
      loss=loss,
      divergence=divergence,
      mask=real,
    ):
      report.recipe = Recipe.of(
        blind, moments, blind_ranks, method='weight', compensate_mean=False
      )
      return blind, report
  best = try_on(params, moments)
  if heads and not is_scarce and params_fraction and moments.grads is not None:
    # Damages of heads and of pairs have nats alone in common.
    less = one_budget.narrow(
      params,
      moments,
      _attention(fn, params, kept[0]),
      params_fraction=params_fraction,
      multiple_of=multiple_of,
      gauge=gauge,
    )
    if less is not None:
      if less.rest:
        left = budget | {'params_fraction': less.params_fraction}
        other = try_on(merge(less.tree), less.rest, budget=left)
        other = other._replace(tree=one_budget.put_back(other.tree, less))
      else:  # attention's kernels are all there are
        found = divergences(fn, params, less.tree, kept, divergence)
        other = _Compressed(less.tree, {}, 'loss', DAMPING, found)
      if comes_closer(best.divergences, other.divergences):
        best = other._replace(ranks=other.ranks | less.ranks)
  report.recipe = Recipe.of(
    best.tree, moments, best.ranks, method=best.method, damping=best.damping
  )
  return best.tree, report


class _Compressed(NamedTuple):
  """A tree, the ranks and factors in it, and how far its outputs are."""

  tree: Any
  ranks: dict[str, int]
  method: str
  damping: float
  divergences: np.ndarray


def _tuned(
  fn: Callable[[Any, Any], Any],
  params: Any,
  start: Any,
  moments: Moments,
  *,
  batches: list[Any],
  budget: dict[str, Any],
  divergence: Divergence,
  anchored: bool,
  progress: bool,
) -> _Compressed:
  """`start` with the kernels that have moments compressed.

  Args:
    fn: the function.
    params: parameters to stay near to.
    start: the same, but for kernels that have no moments here.
    moments: of the kernels to compress.
    batches: to try ranks on and to anchor with.
    budget: for `tune_ranks`.
    divergence: for `tune_ranks`.
    anchored: as for `compress`.
    progress: show progress bars.
  """
  ranks = tune_ranks(
    fn,
    start,
    moments,
    batches,
    divergence=divergence,
    reference=params,
    progress=progress,
    **budget,
  )
  gauge, families = budget['gauge'], ranks.families
  tree = factorize(
    start,
    moments,
    ranks,
    method=families.method,
    damping=families.damping,
    families=families,
    gauge=gauge,
    progress=progress,
  )
  found = _Compressed(
    tree, dict(ranks), families.method, families.damping, ranks.divergences
  )
  size, examples = check_batch(batches[0], 0), len(ranks.divergences)
  enough = ENOUGH_ROWS * size / examples  # in one batch
  if not anchored or not _can_anchor(fn, params, batches[0], ranks, enough):
    return found
  other = anchor(
    fn,
    params,
    batches,
    ranks,
    moments=moments,
    start=start,
    method=families.method,
    damping=families.damping,
    gauge=gauge,
    progress=progress,
  )
  after = divergences(fn, params, other, batches, divergence)
  if comes_closer(found.divergences, after):
    return found._replace(tree=other, divergences=after)
  return found


def _attention(
  fn: Callable[[Any, Any], Any], params: Any, batch: Any
) -> Attention:
  """Pairs of attention's kernels; none where the function hides them."""
  try:
    return find_attention(fn, params, batch)
  except UnsupportedError:
    return Attention({}, {})


def _can_anchor(
  fn: Callable[[Any, Any], Any],
  params: Any,
  batch: Any,
  kernels: Iterable[str],
  enough: float,
) -> bool:
  """Whether kernels can be fitted one behind the other on such batches.

  Args:
    fn: the function.
    params: its parameters.
    batch: one of the batches.
    kernels: their paths.
    enough: rows that one batch must give for every input feature.
  """
  only = paths.only(kernels)
  if not only:
    return False
  sites = find_sites(fn, params, batch, select=only)
  if any(
    site.also or site.rows < enough * site.matrix_shape[0]
    for site in sites.values()
  ):
    return False
  layouts = {path: site.layout for path, site in sites.items()}
  try:
    Streams(fn, params, [batch], layouts, None)
  except UnsupportedError:  # inside a while loop, a branch, a shard_map
    return False
  return True


def _blind(
  params: Any,
  moments: Moments,
  fraction: float,
  multiple_of: int,
  gauge: str | None,
) -> tuple[Any, dict[str, int]]:
  """Truncated SVDs of one share of every kernel, and their ranks.

  The same share of every kernel's parameters is that share of its FLOPs.
  """
  ranks = uniform_ranks(
    params,
    moments,
    params_fraction=fraction,
    multiple_of=multiple_of,
    gauge=gauge,
  )
  tree = factorize(
    params,
    moments,
    ranks,
    method='weight',
    compensate_mean=False,
    gauge=gauge,
    progress=False,
  )
  return tree, ranks

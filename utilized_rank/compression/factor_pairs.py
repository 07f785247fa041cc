"""Pairs of factors in place of kernels: what `compress` can always do."""

from __future__ import annotations

from collections.abc import Callable, Iterable
import dataclasses
from typing import Any

from utilized_rank.collection.one_pass import check_batch
from utilized_rank.compression.candidates import Tried
from utilized_rank.compression.candidates import nearest
from utilized_rank.compression.problem import Problem
from utilized_rank.factorization import methods
from utilized_rank.factorization.factorize import factorize
from utilized_rank.factorization.kernels import ENOUGH_ROWS
from utilized_rank.moments.capture import find_sites
from utilized_rank.ranks.tune import TunedRanks
from utilized_rank.ranks.tune import tune_ranks
from utilized_rank.refit.anchor import anchor
from utilized_rank.refit.streams import Streams
from utilized_rank.tree import paths
from utilized_rank.walk.interpret import UnsupportedError


def factor_pairs(problem: Problem) -> Tried:
  """Factors at tuned ranks, fitted anew where that brings outputs closer.

  Args:
    problem: its `start` is what the tree has at all other leaves.
  """
  tuned = _tuned(problem)
  return nearest(tuned, [_anchored(problem, tuned)])


def _tuned(problem: Problem) -> Tried:
  """The ranks, and the factors of closed form, of least divergence."""
  ranks = tune_ranks(
    problem.fn,
    problem.start,
    problem.moments,
    problem.batches,
    divergence=problem.divergence,
    compensate_mean=problem.compensate_mean,
    reference=problem.params,
    progress=problem.progress,
    **problem.budget.options(),
  )
  families = ranks.families
  tree = factorize(
    problem.start,
    problem.moments,
    ranks,
    method=families.method,
    damping=families.damping,
    compensate_mean=problem.compensate_mean,
    families=families,
    gauge=problem.budget.gauge,
    progress=problem.progress,
  )
  return Tried(
    tree=tree,
    ranks=dict(ranks),
    method=families.method,
    damping=families.damping,
    compensate_mean=problem.compensate_mean,
    divergences=ranks.divergences,
    predicted=_predicted(ranks),
  )


def _predicted(ranks: TunedRanks) -> float | None:
  """Mean divergence where 'loss' chose both the factors and their ranks."""
  asked = 'loss', methods.DAMPING, 'loss'
  for trial in ranks.trials:
    if (trial.method, trial.damping, trial.allocation) == asked:
      return trial.divergence
  return None


def _anchored(problem: Problem, tuned: Tried) -> Tried | None:
  """Factors of the same ranks, each fitted behind the others.

  Args:
    problem: the problem.
    tuned: whose ranks and method they have.

  Returns:
    None where that is not wanted, or cannot be done on so few examples.
  """
  first = problem.batches[0]
  size, examples = check_batch(first, 0), len(tuned.divergences)
  enough = ENOUGH_ROWS * size / examples  # in one batch
  if not problem.anchored or not _can_anchor(
    problem.fn, problem.params, first, tuned.ranks, enough
  ):
    return None
  tree = anchor(
    problem.fn,
    problem.params,
    problem.batches,
    tuned.ranks,
    moments=problem.moments,
    start=problem.start,
    method=tuned.method,
    compensate_mean=problem.compensate_mean,
    damping=tuned.damping,
    gauge=problem.budget.gauge,
    progress=problem.progress,
  )
  after = problem.divergences(tree, problem.batches)
  return dataclasses.replace(tuned, tree=tree, divergences=after)


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

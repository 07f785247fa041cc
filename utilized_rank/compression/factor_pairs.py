"""Pairs of factors in place of kernels: what `compress` can always do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
import dataclasses
import functools
from typing import Any

from utilized_rank.collection.one_pass import check_batch
from utilized_rank.compression.candidates import Beginning
from utilized_rank.compression.candidates import Compressed
from utilized_rank.compression.candidates import Tried
from utilized_rank.compression.candidates import nearest
from utilized_rank.compression.problem import Problem
from utilized_rank.factorization.decompose import Families
from utilized_rank.factorization.decompose import decompose
from utilized_rank.factorization.factorize import factorize
from utilized_rank.factorization.kernels import ENOUGH_ROWS
from utilized_rank.moments.capture import find_sites
from utilized_rank.ranks.budget import budget_ranks
from utilized_rank.ranks.tune import tune_ranks
from utilized_rank.refit.anchor import anchor
from utilized_rank.refit.streams import Streams
from utilized_rank.tree import paths
from utilized_rank.walk.interpret import UnsupportedError

# Names of what there is.
CLOSED_FORM = 'pairs of one prediction'
TUNED = 'pairs'
ANCHORED = 'pairs, anchored'


def factor_pairs(problem: Problem) -> Tried:
  """Factors at tuned ranks, fitted anew where that brings outputs closer.

  Args:
    problem: its `start` is what the tree has at all other leaves.
  """
  journal = problem.journal
  with journal.stage('ranks') as at:
    found = _tuned(problem)
    at.after = float(found.divergences.mean())
  journal.compared(found.name, None, found.divergences, True)
  with journal.stage('anchor') as at:
    anchored = _anchored(problem, found)
    if anchored is not None:
      at.before = float(found.divergences.mean())
      at.after = float(anchored.divergences.mean())
  return nearest(found, [anchored], journal)


def pairs(problem: Problem, unsearched: bool = False) -> list[Beginning]:
  """Pairs at all kernels: a kind of candidate.

  Args:
    problem: the problem.
    unsearched: those of one prediction as well, of which nothing is tried.
  """
  # Of the tree alone the number is kept: it is as large as what is searched.
  glance = functools.cache(lambda: problem.glance(closed_form(problem).tree))

  def as_predicted() -> Tried:
    found = closed_form(problem)
    return found.judged(problem.divergences(found.tree, problem.batches))

  found = [Beginning(TUNED, glance, lambda: factor_pairs(problem))]
  if unsearched:
    found.append(Beginning(CLOSED_FORM, glance, as_predicted))
  return found


def closed_form(problem: Problem) -> Compressed:
  """Factors at the ranks of least predicted damage: nothing is tried."""
  compensate_mean = problem.compensate_mean
  method = 'output' if problem.moments.grads is None else 'loss'
  families = decompose(
    problem.start,
    problem.moments,
    method=method,
    compensate_mean=compensate_mean,
    progress=False,
  )
  ranks = budget_ranks(
    problem.start,
    problem.moments,
    method=method,
    compensate_mean=compensate_mean,
    families=families,
    progress=False,
    **problem.budget.options(),
  )
  return Compressed(
    tree=_factors(problem, ranks, families),
    ranks=ranks,
    method=method,
    damping=families.damping,
    compensate_mean=compensate_mean,
    name=CLOSED_FORM,
    predicted=_predicted(families, ranks),
  )


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
  return Tried(
    tree=_factors(problem, ranks, families),
    ranks=dict(ranks),
    method=families.method,
    damping=families.damping,
    compensate_mean=problem.compensate_mean,
    divergences=ranks.divergences,
    name=TUNED,
    predicted=_predicted(families, ranks),
    measured=ranks.effects,
  )


def _factors(
  problem: Problem, ranks: Mapping[str, int], families: Families
) -> Any:
  return factorize(
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


def _predicted(
  families: Families, ranks: Mapping[str, int]
) -> dict[str, float]:
  """In nats per example, or as shares of the outputs' energy without a loss."""
  metric = 'loss' if 'loss' in families.metrics else 'relative'
  return {
    path: float(families.damages(path, metric)[rank])
    for path, rank in ranks.items()
  }


def _anchored(problem: Problem, found: Tried) -> Tried | None:
  """Factors of the same ranks, each fitted behind the others.

  Args:
    problem: the problem.
    found: whose ranks and method they have.

  Returns:
    None where that is not wanted, or cannot be done on so few examples.
  """
  first = problem.batches[0]
  sizes = [check_batch(batch, i) for i, batch in enumerate(problem.batches)]
  enough = ENOUGH_ROWS * sizes[0] / sum(sizes)  # in one batch
  if not problem.anchored or not _can_anchor(
    problem.fn, problem.params, first, found.ranks, enough
  ):
    return None
  tree = anchor(
    problem.fn,
    problem.params,
    problem.batches,
    found.ranks,
    moments=problem.moments,
    start=problem.start,
    method='loss' if found.method == 'coupled' else found.method,
    compensate_mean=problem.compensate_mean,
    damping=found.damping,
    gauge=problem.budget.gauge,
    progress=problem.progress,
  )
  after = problem.divergences(tree, problem.batches)
  return dataclasses.replace(found, tree=tree, divergences=after, name=ANCHORED)


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

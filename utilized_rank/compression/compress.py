"""The best recipe in one call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence, Sized
import functools
import itertools
from typing import Any

import jax

from utilized_rank.collection.collect import collect
from utilized_rank.collection.one_pass import check_batch
from utilized_rank.collection.one_pass import several
from utilized_rank.compression import describe
from utilized_rank.compression import holdout
from utilized_rank.compression.candidates import Beginning
from utilized_rank.compression.candidates import Candidate
from utilized_rank.compression.candidates import Compressed
from utilized_rank.compression.candidates import Tried
from utilized_rank.compression.candidates import nearest
from utilized_rank.compression.candidates import promising
from utilized_rank.compression.factor_pairs import pairs
from utilized_rank.compression.journal import Journal
from utilized_rank.compression.narrower_heads import narrower_heads
from utilized_rank.compression.narrower_layers import narrower_layers
from utilized_rank.compression.problem import TRIAL_EXAMPLES
from utilized_rank.compression.problem import Budget
from utilized_rank.compression.problem import Problem
from utilized_rank.compression.refined import refined
from utilized_rank.compression.refined import rehearsed
from utilized_rank.compression.unlabelled import unlabelled
from utilized_rank.host.progress import say
from utilized_rank.losses.divergence import Divergence
from utilized_rank.losses.divergence import squared_error
from utilized_rank.moments.gradients import LossFn
from utilized_rank.moments.masks import Mask
from utilized_rank.moments.moments import Moments
from utilized_rank.products.gauge import IDENTITY
from utilized_rank.report.measure import measure
from utilized_rank.report.report import Report
from utilized_rank.tree import paths
from utilized_rank.walk import compat
from utilized_rank.walk import tracing

FINETUNE = 'finetune'
_REHEARSED = 'examples held out, after training'


@compat.moves_data
@tracing.remembered()
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
  compensate_mean: bool = True,
  anchored: bool = True,
  heads: bool = True,
  layers: bool = True,
  refine: int = 300,
  then: str | None = None,
  few: bool | None = None,
  trial_examples: int = TRIAL_EXAMPLES,
  energy: float = 0.99,
  progress: bool = True,
) -> tuple[Any, Report]:
  """Collects, measures, chooses ranks and factorizes.

  Factors of least error at the kernels' outputs and of least predicted loss
  are tried with the ranks that several predictions ask for;
  the best are corrected by what is seen at the outputs (`tune_ranks`), and
  their factors fitted one behind the other (`anchor`) where that helps. Last,
  factors, biases and norms are trained to give the dense outputs. Where
  a kernel has fewer than four independent rows for every feature (positions of
  one example count for less than rows of several, as far as they look alike),
  that is done for three quarters of the examples first, twice; what is nearest
  on the others is returned of these pairs, those of a single prediction, and
  the truncated SVD of the weights.

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
      `sampled_cross_entropy()`, if outputs are logits; the one that given
      moments are of. Default, where there are no moments either, the squared
      error (`sampled_squared_error`): embeddings, features and regression
      need no more. Where the function has no reverse derivative it is done
      without.
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
    compensate_mean: as for `factorize`; False for a tree that `merge` takes
      where kernels have no bias (most language models, no batch norm), at the
      cost of outputs that are a little further off.
    anchored: fit the factors anew behind compressed kernels, if the examples
      kept give four rows for every input feature; kept where outputs then
      are closer by more than the standard error of the difference.
    heads: try narrower attention heads as well (`factorize_heads`), within the
      same share of parameters, where moments have gradients, rows are not few,
      and data flow shows query and key, value and output kernels; kept where
      outputs then are closer. It is a second search, left out where its first
      tree is more than twice as far off as the nearest of the others'.
    layers: try narrower hidden layers as well (`narrow_hidden`), alone and with
      narrower heads, under the same conditions: a search each.
    refine: updates of the chosen tree towards the dense outputs (`distill`; 0
      for none), on all batches where they are a list, else on those kept; a
      fifth of the examples judges whether outputs are closer then.
    then: 'finetune' where the tree will be trained further: the nearest tree
      is not always the one that training brings furthest. Every kind is then
      trained as `refine` says, pairs of one prediction among them, and that
      which is nearest afterwards is taken; it costs that training once for
      every kind. Default: what is nearest before is trained.
    few: whether examples are few, which decides how ranks are tried (above),
      where you know what rows do not show: crops of a dozen photographs,
      sentences of one text. Default: as rows say.
    trial_examples: as many of the first examples are kept in memory, to try
      ranks on and to anchor with.
    energy: share of the spectra that the report's ranks are at.
    progress: show how far it is, and at the end what is kept, in a line.

  Returns:
    The tree for `low_rank(fn)`, and the `Report` of the dense one, whose
    `recipe` can be written down: it rebuilds the tree's shapes. Its `choice`
    says what was chosen, why, and what that took.

  Raises:
    ValueError: no batches; both moments and rules; another `then`, or one
      without updates; several processes, which would each decide on the
      examples that they see; else as `collect`, `tune_ranks` and `factorize`.

  >>> fn = lambda params, x: x @ params['w']
  >>> params = {'w': jnp.eye(8)}
  >>> x = jnp.tile(jnp.eye(8)[:2], (16, 1))
  >>> small, report = compress(
  ...     fn, params, [x], params_fraction=0.75, progress=False)
  >>> small['w'].rank, report['w'].rank  # about their mean, rows differ in one
  (1, 2)
  """
  _check(params, moments, select)
  _check_then(then, refine)
  budget = Budget(params_fraction, flops_fraction, multiple_of, gauge)
  journal = Journal(progress)
  with journal.stage('compress'):
    kept, every = _first(batches, trial_examples)
    if moments is None:
      with journal.stage('collect'):
        loss = loss or unlabelled(fn, params, kept, mask)
        moments = collect(
          fn,
          params,
          every,
          loss=loss,
          mask=mask,
          select=select,
          progress=progress,
        )
    divergence, unit = _judge(divergence, loss)
    problem = Problem(
      fn=fn,
      params=params,
      start=params,
      moments=moments,
      batches=kept,
      training=list(batches) if isinstance(batches, (list, tuple)) else kept,
      budget=budget,
      divergence=divergence,
      loss=loss,
      anchored=anchored,
      progress=progress,
      unit=unit,
      few=few,
      journal=journal,
      compensate_mean=compensate_mean,
    )
    if mask is not None:
      problem = problem.without_padding(mask)
    with journal.stage('measure'):
      report = measure(params, moments, energy=energy, progress=progress)
    # Tried in this order; what comes later must come closer.
    is_tuned = then == FINETUNE
    kinds: dict[Candidate, bool] = {
      functools.partial(pairs, unsearched=is_tuned): True,
      narrower_heads: heads,
      functools.partial(narrower_layers, heads=heads): layers,
    }
    wanted = [kind for kind, is_wanted in kinds.items() if is_wanted]
    best = _choose(problem, wanted, refine, is_tuned)
  report.recipe = best.recipe(moments, params)
  report.choice = describe.choice(problem, best)
  if progress:
    say(report.choice.line)
  return best.tree, report


def _check(
  params: Any, moments: Moments | None, select: paths.Rules | None
) -> None:
  """Refuses several processes, shapes alone, and both moments and rules."""
  tracing.check_values(params)
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


def _check_then(then: str | None, refine: int) -> None:
  if then not in (None, FINETUNE):
    raise ValueError(
      f'then={then!r}; {FINETUNE!r} chooses what is nearest after training, '
      'None what is nearest before'
    )
  if then and not refine:
    raise ValueError(
      f'then={then!r} compares trees after `refine` updates, and refine=0: '
      'give a number of them (300 by default)'
    )


def _judge(
  divergence: Divergence | None, loss: LossFn | None
) -> tuple[Divergence, str]:
  """How far outputs are from the dense ones, and its unit if it is known."""
  given = divergence
  if divergence is None:
    divergence = getattr(loss, 'divergence', squared_error)
  if divergence is squared_error:
    return divergence, "of the outputs' energy"
  return divergence, 'nats' if given is None else ''


def _first(
  batches: Iterable[Any], enough: int
) -> tuple[list[Any], Iterable[Any]]:
  """The first batches, of `enough` examples, and all, the first among them.

  Raises:
    ValueError: there is no batch.
  """
  rest = iter(several(batches))
  kept: list[Any] = []
  examples = 0
  while examples < enough and (batch := next(rest, None)) is not None:
    examples += check_batch(batch, len(kept))
    kept.append(batch)
  if not kept:
    raise ValueError(
      'compress needs at least one batch to try ranks on, got none; moments= '
      'replaces collecting, not trying'
    )
  if isinstance(batches, Sized):
    return kept, batches
  return kept, itertools.chain(kept, rest)


def _choose(
  problem: Problem, kinds: Sequence[Candidate], refine: int, is_tuned: bool
) -> Compressed:
  """Pairs of factors, unless another kind is nearer; with care of few data.

  Args:
    problem: the problem.
    kinds: the first one's first is what there always is.
    refine: updates of what is chosen.
    is_tuned: whether all are compared after these.
  """
  if problem.is_scarce:
    with problem.journal.stage('hold-out'):
      unsearched = holdout.nearest_unsearched(problem)
    if unsearched is not None:
      return refined(problem, unsearched, refine)
  begins = [one for kind in kinds for one in kind(problem)]
  if len(begins) > 1:
    with problem.journal.stage('glance'):
      begins = promising(begins, problem.journal)
  if is_tuned:
    return _nearest_trained(problem, begins, refine)
  first, *others = begins
  searched = (one.search() for one in others)
  best = nearest(first.search(), searched, problem.journal)
  return refined(problem, best, refine)


def _nearest_trained(
  problem: Problem, begins: Sequence[Beginning], steps: int
) -> Tried:
  """What training brings nearest to the dense outputs, trained."""
  train = lambda one: rehearsed(problem, one.search(), steps)
  first, *others = begins
  best = train(first)
  problem.journal.compared(best.name, None, best.divergences, True, _REHEARSED)
  best = nearest(best, map(train, others), problem.journal, _REHEARSED)
  return best.judged(problem.divergences(best.tree, problem.batches))

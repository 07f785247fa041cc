"""Low-rank factors for a checkpoint that is larger than memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
import math
import os
import shutil
from typing import Any

from utilized_rank.factorization import methods
from utilized_rank.factorization.decompose import Families
from utilized_rank.factorization.shared_left import check_ranks
from utilized_rank.host.progress import say
from utilized_rank.moments.moments import Moments
from utilized_rank.ranks.budget import budget_ranks
from utilized_rank.ranks.uniform import check_params_fraction
from utilized_rank.ranks.uniform import uniform_ranks
from utilized_rank.storage.recipe import FactoredLeaf
from utilized_rank.storage.recipe import Recipe
from utilized_rank.storage.recipe import versions_here
from utilized_rank.streaming import phases
from utilized_rank.streaming.damages import METHOD
from utilized_rank.streaming.damages import Damages
from utilized_rank.streaming.damages import without_sums
from utilized_rank.streaming.fitting import Fitting
from utilized_rank.streaming.ledger import Ledger
from utilized_rank.streaming.sweep import Sweep
from utilized_rank.tree import paths


def compress_checkpoint(
  path: str | os.PathLike[str],
  out: str | os.PathLike[str],
  batches: Iterable[Any],
  *,
  params_fraction: float | None = None,
  ranks: Mapping[str, int] | None = None,
  uniform: bool = False,
  anchored: bool = True,
  ridge: float = 0.2,
  compensate_mean: bool = False,
  multiple_of: int = 1,
  limits: Sequence[tuple[str, tuple[int, int]]] = (),
  select: paths.Rules | None = None,
  work_dir: str | os.PathLike[str] | None = None,
  progress: bool = True,
  **options: Any,
) -> Recipe:
  """Compresses a checkpoint block by block, from disk to disk.

  Of the weights one block is in memory at a time; what the batches are between
  two blocks is kept in files. For a budget the model is run twice: once to
  learn what every rank costs, once to fit the factors, which behind the first
  block read what the compressed blocks feed them and are fitted to what the
  dense ones make (`anchor`). A process that was killed goes on with the block
  that it was at, to the same bytes: call it again with the same arguments.

  Args:
    path: a directory of Hugging Face or a file, as for `load_checkpoint`. Its
      tensors have PyTorch's names, and each is the kernel of one layer, or of
      several side by side.
    out: the directory to make. It has the checkpoint's own names, with
      `NAME.0.weight` and `NAME.1.weight` for `NAME.weight`, in the
      checkpoint's own dtypes, and `config.json` as it was; `load_checkpoint`
      reads it, and `utilized_rank.torch.pretrained.load_pretrained` makes a
      model of transformers of it.
    batches: what to calibrate on, each what the model takes (tokens (B, T)),
      without padding; read once at each start.
    params_fraction: share of the kernels' parameters to keep, in (0, 1]; or
    ranks: path to rank, as for `factorize`.
    uniform: every kernel keeps the same share, `uniform_ranks`, in place of
      the least damage, `budget_ranks`: one run less.
    anchored: fit to the dense network behind compressed layers; else as
      `factorize`, from moments of the dense network.
    ridge: see `anchor`.
    compensate_mean: as for `factorize`; a constant is a bias that the model of
      Hugging Face may not have.
    multiple_of: as for `budget_ranks`.
    limits: as for `budget_ranks`.
    select: ordered `(regex, bool)` rules over paths; default all kernels in
      numbered blocks, so neither embedding nor head.
    work_dir: for what is not finished; default `OUT.partial`. Removed when
      done.
    progress: show progress bars.
    **options: as for `load_checkpoint`, such as `config` or `heads`.

  Returns:
    How it was done, which is in the directory's index as well.

  Raises:
    FileExistsError: there is something at `out`.
    ValueError: not one of a share and ranks; limits of ranks that no budget
      chooses; a path that is no such kernel, or a rank that it cannot have;
      work that was begun with other arguments; and what `load_checkpoint`,
      `budget_ranks` and `anchor` raise.

  >>> import utilized_rank as ur
  >>> recipe = ur.compress_checkpoint(
  ...     'llama-7b', 'llama-7b-80', batches, params_fraction=0.8
  ... )  # doctest: +SKIP
  """
  out = os.fspath(out)
  if os.path.exists(out):
    raise FileExistsError(f'{out!r} exists; give another directory')
  if (params_fraction is None) == (ranks is None):
    raise ValueError(
      f'params_fraction={params_fraction}, ranks={ranks}: give one of them'
    )
  if params_fraction is not None:
    check_params_fraction(params_fraction)
  if limits and (uniform or ranks is not None):
    raise ValueError(
      f'limits={limits!r} are for a budget; uniform ranks and ranks that are '
      'given have none'
    )
  if not 0 <= ridge < math.inf:
    raise ValueError(f'ridge must be a number from 0, got {ridge!r}')
  sweep = Sweep.of(path, batches, select, options)
  if ranks is not None:
    check_ranks(ranks, without_sums(sweep.sites))
  work = os.fspath(work_dir) if work_dir is not None else f'{out}.partial'
  ledger = Ledger(
    work,
    phases.identity(sweep)
    | {
      'params_fraction': params_fraction,
      'ranks': None if ranks is None else dict(ranks),
      'uniform': uniform,
      'anchored': anchored,
      'ridge': ridge,
      'compensate_mean': compensate_mean,
      'multiple_of': multiple_of,
      'limits': limits,
      'select': select,
    },
  )
  sweep.warn_if_scarce()
  if progress:
    say(f'{sweep.coverage}; unfinished work is in {work}')
  if ranks is None and uniform:
    assert params_fraction is not None
    ranks = uniform_ranks(
      None,
      without_sums(sweep.sites),
      params_fraction=params_fraction,
      multiple_of=multiple_of,
    )
  elif ranks is None:
    known, families = _measured(sweep, ledger, work, compensate_mean, progress)
    ranks = budget_ranks(
      None,
      known,
      params_fraction=params_fraction,
      method=METHOD,
      compensate_mean=compensate_mean,
      multiple_of=multiple_of,
      limits=limits,
      families=families,
      progress=False,
    )
  recipe = _recipe(sweep, ranks, compensate_mean)
  fitting = Fitting(sweep, recipe, work, progress)
  if anchored:
    fitting.anchored(ledger, ridge)
  else:
    fitting.alone(ledger)
  fitting.output.finish(out)
  shutil.rmtree(work)
  return recipe


def _measured(
  sweep: Sweep,
  ledger: Ledger,
  work: str,
  compensate_mean: bool,
  progress: bool,
) -> tuple[Moments, Families]:
  """What all ranks cost, by a run of the dense model."""
  damages = Damages(os.path.join(work, 'damages'))
  dense = sweep.streams.dense = phases.run_of(sweep, work, 'measured')
  for number in phases.rest(sweep, ledger, 'measure', [dense], progress):
    if sweep.is_needed(number):
      _measured_block(sweep, damages, number, compensate_mean)
  numbers = [i for i, block in enumerate(sweep.blocks) if block.reads]
  return damages.all(sweep.sites, numbers, compensate_mean)


def _measured_block(
  sweep: Sweep, damages: Damages, number: int, compensate_mean: bool
) -> None:
  leaves = sweep.leaves(number)
  if sweep.blocks[number].reads:
    moments = sweep.moments(number, leaves)
    groups = sweep.inputs_of(moments)
    damages.take(number, leaves, moments, groups, compensate_mean)
    del moments
  if sweep.is_followed(number):
    sweep.streams.through(number, leaves, sweep.streams.dense)


def _recipe(
  sweep: Sweep, ranks: Mapping[str, int], compensate_mean: bool
) -> Recipe:
  leaves = {}
  for path, rank in ranks.items():
    site = sweep.sites[path]
    constant = compensate_mean and site.bias is None
    leaves[path] = FactoredLeaf(site.layout, int(rank), constant, None, None)
  return Recipe(
    dict(ranks),
    METHOD,
    compensate_mean,
    methods.DAMPING,
    sweep.digest,
    versions_here(),
    leaves,
  )

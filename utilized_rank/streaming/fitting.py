"""Pairs in place of a block's kernels, written, and run from then on."""

from __future__ import annotations

from collections.abc import Mapping
import os
from typing import Any

import numpy as np

from utilized_rank.factorization.factorize import factorize
from utilized_rank.lowrank.store import multiplied_out
from utilized_rank.models.importing.files.factored import low_rank_of
from utilized_rank.refit.kernel_fit import Fit
from utilized_rank.refit.kernel_fit import fit_block
from utilized_rank.storage.recipe import Recipe
from utilized_rank.streaming import phases
from utilized_rank.streaming.damages import without_scarce
from utilized_rank.streaming.ledger import Ledger
from utilized_rank.streaming.output import Output
from utilized_rank.streaming.sweep import Leaves
from utilized_rank.streaming.sweep import Sweep

_PHASE = 'fit'


class Fitting:
  """The second run: every block is cut and written.

  Attributes:
    output: the files.
  """

  def __init__(self, sweep: Sweep, recipe: Recipe, work: str, progress: bool):
    self._sweep, self._recipe = sweep, recipe
    self._work, self._progress = work, progress
    sites = {path: sweep.sites[path] for path in recipe.leaves}
    files = os.path.join(work, 'files')
    os.makedirs(files, exist_ok=True)
    self.output = Output(sweep.opened, sweep.blocks, sites, recipe, files)

  def anchored(self, ledger: Ledger, ridge: float) -> None:
    """Fits behind the compressed blocks to the dense ones; as `anchor`."""
    sweep = self._sweep
    dense = phases.run_of(sweep, self._work, 'dense')
    small = phases.run_of(sweep, self._work, 'small')
    sweep.streams.dense, sweep.streams.small = dense, small
    runs = [dense, small]
    for number in phases.rest(sweep, ledger, _PHASE, runs, self._progress):
      self._block_anchored(number, ridge)

  def alone(self, ledger: Ledger) -> None:
    """Factorizes by what the dense model reads; as `factorize`."""
    sweep = self._sweep
    dense = sweep.streams.dense = phases.run_of(sweep, self._work, 'dense')
    for number in phases.rest(sweep, ledger, _PHASE, [dense], self._progress):
      self._block_alone(number)

  # Methods of their own: of a block nothing is held when the next is read.

  def _block_anchored(self, number: int, ridge: float) -> None:
    streams, leaves = self._sweep.streams, self._sweep.leaves(number)
    made = self.output.write(number, self._fitted(number, leaves, ridge))
    if self._sweep.is_followed(number):
      streams.through(number, leaves, streams.dense)
      running = leaves | self._running(made, leaves)
      streams.through(number, running, streams.small)

  def _block_alone(self, number: int) -> None:
    streams, leaves = self._sweep.streams, self._sweep.leaves(number)
    self.output.write(number, self._factorized(number, leaves))
    if self._sweep.is_followed(number):
      streams.through(number, leaves, streams.dense)

  def _own(self, number: int) -> list[str]:
    paths = self._sweep.blocks[number].paths
    return [path for path in paths if path in self._recipe.leaves]

  def _fitted(
    self, number: int, leaves: Leaves, ridge: float
  ) -> dict[str, Any]:
    given: dict[str, dict[str, np.ndarray]] = {}
    recipe, sites = self._recipe, self._sweep.sites
    fits = {
      path: Fit(
        sites[path],
        leaves,
        given,
        recipe.leaves[path].rank,
        None,
        recipe.compensate_mean,
        recipe.damping,
        None,
      )
      for path in self._own(number)
    }
    if not fits:
      return {}
    fit_block(self._sweep.streams, number, leaves, leaves, fits, ridge)
    new: dict[str, Any] = {}
    for fit in fits.values():
      new |= fit.finish()
    return new

  def _factorized(self, number: int, leaves: Leaves) -> dict[str, Any]:
    own = self._own(number)
    if not own:
      return {}
    recipe = self._recipe
    moments = self._sweep.moments(number, leaves)
    now: dict[str, Any] = dict(leaves)
    for group in self._sweep.inputs_of(moments.only(own)):
      with without_scarce():
        now = factorize(
          now,
          moments,
          {path: recipe.leaves[path].rank for path in group},
          method=recipe.method,
          compensate_mean=recipe.compensate_mean,
          progress=False,
        )
    return {
      path: leaf for path, leaf in now.items() if leaf is not leaves.get(path)
    }

  def _running(
    self, made: Mapping[str, Mapping[str, np.ndarray]], leaves: Leaves
  ) -> Leaves:
    """What was written as leaves of the dense ones' shapes: one program runs
    blocks of all ranks."""
    found: Leaves = {}
    for path, parts in made.items():
      if path not in self._recipe.leaves:
        if 'bias' in parts:
          found[path] = parts['bias'].reshape(leaves[path].shape)
        continue
      layout = self._recipe.leaves[path].layout
      pair = low_rank_of(parts, layout, np.float64)
      d, m = layout.matrix_shape
      w = (pair.a.reshape(d, -1) @ pair.b.reshape(-1, m))[None]
      constant = None if pair.c is None else pair.c.reshape(1, m)
      found[path] = multiplied_out(w, constant, layout, leaves[path])
    return found

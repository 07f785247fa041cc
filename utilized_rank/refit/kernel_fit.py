"""The factors of one kernel, fitted behind compressed ones."""

from __future__ import annotations

from typing import Any

import numpy as np

from utilized_rank.factorization import certify
from utilized_rank.factorization.kernels import member_name
from utilized_rank.factorization.shared_left import per_member
from utilized_rank.linalg import best_pairs
from utilized_rank.linalg.best_pairs import Pair
from utilized_rank.lowrank.place import place
from utilized_rank.lowrank.place import place_like
from utilized_rank.lowrank.store import Stored
from utilized_rank.lowrank.store import assemble
from utilized_rank.lowrank.store import give_back
from utilized_rank.lowrank.store import multiplied_out
from utilized_rank.lowrank.store import store
from utilized_rank.moments.sites import Site
from utilized_rank.refit import anchored_fit
from utilized_rank.refit.anchored_fit import Inputs
from utilized_rank.refit.blocks import Block
from utilized_rank.refit.streams import Streams
from utilized_rank.refit.streams import distinct


def fit_block(
  streams: Streams,
  number: int,
  dense: dict[str, Any],
  small: dict[str, Any],
  fits: dict[str, Fit],
  ridge: float,
) -> None:
  """Fits the kernels of a block to what the two runs before it read.

  Args:
    streams: both runs, taken through the blocks before.
    number: of the block.
    dense: leaves by path, at least those of the block.
    small: the same of the compressed run, up to this block.
    fits: of the block's kernels, by path; those without stay dense.
    ridge: see `anchor`.
  """
  block = streams.blocks[number]
  sums = streams.measure(
    number, dense, small | {path: dense[path] for path in block.paths}
  )
  sites = {path: fit.site for path, fit in fits.items()}
  # Of one input after the other: they are in float64, and large.
  readers: dict[Any, list[tuple[str, int]]] = {}
  for reader, places in _places(block, sites).items():
    readers.setdefault(places, []).append(reader)
  for places, members in readers.items():
    parts = [(sums[i], at) for i, at in places]
    some = fits[members[0][0]]
    inputs = anchored_fit.inputs(parts, some.centered, some.site.path)
    for path, matrix in members:
      fits[path].fit(matrix, inputs, ridge)


def _places(
  block: Block, sites: dict[str, Site]
) -> dict[tuple[str, int], tuple[tuple[int, int], ...]]:
  """For each matrix that a block reads, where the sums of its inputs are.

  Returns:
    (path, matrix) -> pairs (place in the sums, group in them).
  """
  keys = [block.reads[i].key for i in distinct(block)]
  found: dict[tuple[str, int], tuple[tuple[int, int], ...]] = {}
  for read in block.reads:
    if read.path not in sites:
      continue
    members = read.members(sites[read.path].layout)
    for group, matrix in enumerate(members):
      key = read.path, matrix
      found[key] = (*found.get(key, ()), (keys.index(read.key), group))
  return found


class Fit:
  """The factors of one leaf's matrices, as far as they are found.

  `given` is the constants of all leaves, by the bias that takes them and the
  kernel's path.

  Attributes:
    site: the kernel.
    centered: whether it is fitted about the means.
  """

  def __init__(
    self, site, named, given, ranks, gradients, compensate_mean, damping, gauge
  ):
    layout = site.layout
    self.site, self._named, self._given = site, named, given
    leaf = np.asarray(named[site.path], np.float64)
    if not np.all(np.isfinite(leaf)):
      raise ValueError(f'kernel {site.path!r} holds NaN or infinite values')
    d, m = layout.matrix_shape
    self._w = layout.to_matrices(leaf).reshape(-1, d, m)
    self._ranks = per_member(site.path, ranks, layout)
    self._gradients = gradients
    self.centered = compensate_mean
    self._damping = damping
    self._gauge = gauge
    self._dtype = named[site.path].dtype
    # Of all matrices, as their leaf holds them; None until one is fitted.
    self._stored: list[Stored | None] = [None] * layout.num_groups
    self._product = np.zeros((layout.num_groups, d, m), self._dtype)
    self._constants = np.zeros((layout.num_groups, m))

  def fit(self, matrix: int, inputs: Inputs, ridge: float) -> None:
    w = self._w[matrix]
    target = anchored_fit.target(w, inputs, ridge)
    gradient = None if self._gradients is None else self._gradients[matrix]
    factors = anchored_fit.factors(target, gradient, self._damping)
    rank = int(self._ranks[matrix])
    pair = Pair(factors.a[:, :rank], factors.b[:rank])
    stored = self._store(best_pairs.balanced(pair))
    self._stored[matrix] = stored
    pair = stored.pair()
    self._product[matrix] = pair.a @ pair.b
    cross = factors.a.T @ target.metric @ factors.a
    (tails,) = best_pairs.tails(cross, factors.b, gradient)
    if self.centered:
      kept = (inputs.mean_hat @ pair.a) @ pair.b
      self._constants[matrix] = inputs.mean @ w - kept
    certify.check_in(
      self._name(matrix),
      certify.Metric(target.w, target.metric, gradient),
      pair,
      float(tails[rank]),
      self._dtype,
      float(tails[0]),
    )

  def _name(self, matrix: int) -> str:
    groups = self.site.layout.group_shape
    index = map(int, np.unravel_index(matrix, groups)) if groups else ()
    return member_name(self.site.path, tuple(index))

  def _store(self, pair: Pair) -> Stored:
    rank = int(max(self._ranks))
    return store(pair, self.site.layout, rank, self._dtype, self._gauge)

  def leaves(self) -> dict[str, Any]:
    """The kernel's leaf, and its bias with the constants; zeros where no
    factors are yet."""
    path, layout, bias = self.site.path, self.site.layout, self.site.bias
    d, m = layout.matrix_shape
    none = self._store(Pair(np.zeros((d, 1)), np.zeros((1, m))))
    stored = [none if s is None else s for s in self._stored]
    leaf = assemble(stored, layout)
    if not self.centered:
      return {path: place(leaf, self._named[path])}
    constants = self._constants
    constants = constants if bias is None else self._of_bias(bias)
    return give_back(self._named, path, bias, leaf, constants)

  def running(self) -> dict[str, Any]:
    """As `leaves`, but of the kernel's own shape, whatever the ranks."""
    path, named, bias = self.site.path, self._named, self.site.bias
    alone = self.centered and bias is None
    constants = self._constants if alone else None
    layout = self.site.layout
    leaf = multiplied_out(self._product, constants, layout, named[path])
    if bias is None:
      return {path: leaf}
    more = self._of_bias(bias).reshape(named[bias].shape)
    new = np.asarray(named[bias], np.float64) + more
    return {path: leaf, bias: place_like(new, named[bias])}

  def _of_bias(self, bias: str) -> np.ndarray:
    """What all its kernels add to a bias."""
    given = self._given.setdefault(bias, {})
    given[self.site.path] = self.site.bias_scale * self._constants
    return sum(each.reshape(-1) for each in given.values())

  def finish(self) -> dict[str, Any]:
    """The leaves, a matrix that no product read being cut by its SVD."""
    d, m = self.site.layout.matrix_shape
    zeros = np.zeros((d, d))
    unseen = Inputs(zeros, zeros, np.zeros(d), np.zeros(d))
    for matrix, stored in enumerate(self._stored):
      if stored is None:
        self.fit(matrix, unseen, 0.0)
    return self.leaves()

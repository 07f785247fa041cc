"""Pair fitted block after block, each to what the dense network does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
import dataclasses
import itertools
import math
from typing import Any

import numpy as np

from utilized_rank.collection.one_pass import check_batch
from utilized_rank.collection.one_pass import several
from utilized_rank.factorization import certify
from utilized_rank.factorization import methods
from utilized_rank.factorization.kernels import member_name
from utilized_rank.factorization.shared_left import Ranks
from utilized_rank.factorization.shared_left import check_ranks
from utilized_rank.factorization.shared_left import per_member
from utilized_rank.host.progress import track
from utilized_rank.linalg import best_pairs
from utilized_rank.linalg.best_pairs import Pair
from utilized_rank.lowrank.leaf import is_low_rank
from utilized_rank.lowrank.place import place
from utilized_rank.lowrank.place import place_like
from utilized_rank.lowrank.store import Stored
from utilized_rank.lowrank.store import assemble
from utilized_rank.lowrank.store import give_back
from utilized_rank.lowrank.store import multiplied_out
from utilized_rank.lowrank.store import store
from utilized_rank.moments.capture import find_sites
from utilized_rank.moments.moments import Moments
from utilized_rank.moments.sites import Site
from utilized_rank.products.gauge import check_gauge
from utilized_rank.refit import anchored_fit
from utilized_rank.refit.anchored_fit import Inputs
from utilized_rank.refit.blocks import Block
from utilized_rank.refit.blocks import Group
from utilized_rank.refit.streams import Streams
from utilized_rank.refit.streams import distinct
from utilized_rank.tree import paths
from utilized_rank.walk import compat
from utilized_rank.walk import tracing


@compat.moves_data
@tracing.remembered()
def anchor(
  fn: Callable[[Any, Any], Any],
  params: Any,
  batches: Iterable[Any],
  ranks: Ranks,
  *,
  moments: Moments | None = None,
  start: Any = None,
  method: str = 'output',
  ridge: float = 0.2,
  compensate_mean: bool = True,
  damping: float = methods.DAMPING,
  gauge: str | None = None,
  group: Group | None = None,
  progress: bool = True,
) -> Any:
  """Puts `LowRank` pairs in place of kernels, each fitted behind the others.

  As `factorize`, but a kernel's factors know that earlier ones are compressed:
  they read what the compressed network feeds them and are fitted to what the
  dense one makes, so that errors are mended downstream in place of adding up.
  One sweep carries both networks over all batches from block to block; it
  costs about two runs of `fn`, and two compilations for each block.

  Args:
    fn: `fn(params, batch) -> outputs`.
    params: dense parameters.
    batches: calibration batches, each a pytree whose arrays lead with the
      batch axis; each is read once. What lies between two blocks is held on
      the host for all batches, once for each network.
    ranks: path to rank, as for `factorize`. Other kernels stay dense. A scan
      over a stack of such kernels is written out, step by step.
    moments: of the dense network, for 'loss' with gradients; constants go to
      the biases that they name.
    start: what the compressed network starts from: dense parameters of which
      other kernels are changed already. Default `params`.
    method: 'output', the least error at the kernel's outputs, or 'loss', that
      error in the metric of the loss's gradient.
    ridge: weight of staying near the dense kernel, as a share of the mean of
      the diagonal of the inputs' second moment. 0 trusts the data alone, for
      which they must be many; a large one gives the truncated SVD.
    compensate_mean: as in `factorize`.
    damping: as in `factorize`.
    gauge: as in `factorize`.
    group: consecutive kernels for which `group(path)` is equal are fitted at
      once, behind the blocks before them. Default: kernels that read one
      value. A kernel that is read again later makes one block of all that
      lies between.
    progress: show a progress bar.

  Returns:
    The tree with `LowRank` leaves, for `low_rank(fn)`.

  Raises:
    ValueError: a path that is no kernel or is also used otherwise, a rank that
      it cannot have, another method, a negative ridge, no batch, or 'loss'
      without gradients.
    UnsupportedError: a kernel is read inside a `while` loop, a branch or a
      `shard_map`, or at an index that is computed.
    FloatingPointError: what a kernel reads is NaN or infinite.

  >>> import utilized_rank as ur
  >>> fn = lambda p, x: jnp.tanh(x @ p['v']) @ p['w']
  >>> params = {'v': jnp.eye(4), 'w': jnp.eye(4)}
  >>> x = jnp.tile(jnp.eye(4)[:2], (8, 1))
  >>> small = anchor(fn, params, [x], {'v': 2, 'w': 2}, progress=False)
  >>> bool(jnp.allclose(ur.low_rank(fn)(small, x), fn(params, x), atol=1e-5))
  True
  """
  methods.check_method(method, ('output', 'loss'))
  if not 0 <= ridge < math.inf:
    raise ValueError(f'ridge must be a number from 0, got {ridge!r}')
  check_gauge(gauge)
  if any(not isinstance(key, str) for key in ranks):
    raise ValueError(
      'anchor fits kernels with factors of their own; ranks has kernels that '
      'share one: give a rank for each path'
    )
  first, stream = checked(batches)
  sites = _with_biases(find_kernels(fn, params, first, ranks), moments)
  check_ranks(ranks, sites)
  gradients = _gradients(sites, moments, method)
  named, treedef = paths.flatten(params if start is None else start)
  streams = Streams(
    fn,
    params,
    stream,
    {path: site.layout for path, site in sites.items()},
    group,
  )
  given: dict[str, dict[str, np.ndarray]] = {}
  fits = {
    path: _Fit(
      site,
      named,
      given,
      ranks[path],
      gradients[path],
      compensate_mean,
      damping,
      gauge,
    )
    for path, site in sites.items()
  }
  arrays = lambda tree: tracing.on_device(paths.flatten(tree)[0])
  dense = arrays(params)
  small = arrays(start) if start is not None else dict(dense)
  count = len(streams.blocks)
  numbers: Iterable[int] = range(count)
  if progress:
    numbers = track(numbers, total=count, desc='anchor', unit='block')
  for number in numbers:
    block = streams.blocks[number]
    sums = streams.measure(
      number, dense, small | {path: dense[path] for path in block.paths}
    )
    known: dict[Any, Inputs] = {}
    for (path, matrix), places in _places(block, sites).items():
      if places not in known:
        parts = [(sums[i], at) for i, at in places]
        known[places] = anchored_fit.inputs(parts, compensate_mean, path)
      fits[path].fit(matrix, known[places], ridge)
    for path in block.paths:
      small |= fits[path].running()
    if number < count - 1:
      streams.through(number, dense, streams.dense)
      streams.through(number, small, streams.small)
  done = dict(named)
  for fit in fits.values():
    done |= fit.finish()
  return paths.unflatten(treedef, done)


def checked(batches: Iterable[Any]) -> tuple[Any, Iterator[Any]]:
  """The first batch, and all of them, each looked at as it comes.

  Raises:
    ValueError: there is none.
  """
  stream = iter(several(batches))
  first = next(stream, None)
  if first is None:
    raise ValueError('at least one batch is needed, got none')

  def every():
    for i, batch in enumerate(itertools.chain([first], stream)):
      check_batch(batch, i)
      yield batch

  return first, every()


def find_kernels(
  fn: Callable[[Any, Any], Any], params: Any, batch: Any, only: Iterable[str]
) -> dict[str, Site]:
  """The sites of the named kernels, which are nothing else.

  Raises:
    ValueError: a path is no kernel, is low-rank already, or is used otherwise.
  """
  named, _ = paths.flatten(params, is_low_rank)
  for path in only:
    if path not in named:
      raise ValueError('no parameter ' + paths.unknown(path, named))
    if is_low_rank(named[path]):
      raise ValueError(
        f'{path!r} is low-rank already; give the dense parameters'
      )
  rules = paths.only(only)
  if not rules:
    raise ValueError('no kernel is named: there is no rank to have')
  sites = find_sites(fn, params, batch, select=rules)
  for path, site in sites.items():
    if site.also:
      raise ValueError(
        f'{path!r} is a kernel and is used by {", ".join(site.also)} too, '
        'where a compressed run would differ; leave it dense'
      )
  return dict(sites)


def _with_biases(
  sites: dict[str, Site], moments: Moments | None
) -> dict[str, Site]:
  """The sites with the biases of moments, where there are.

  More may be found where more kernels are looked at: one that two products of
  a sum share.
  """
  if moments is None:
    return sites
  return {
    path: dataclasses.replace(
      site,
      bias=moments[path].entry.bias,
      bias_scale=moments[path].entry.bias_scale,
    )
    if path in moments
    else site
    for path, site in sites.items()
  }


def _gradients(
  sites: dict[str, Site], moments: Moments | None, method: str
) -> dict[str, np.ndarray | None]:
  """G (matrices, m, m) of every kernel; None for I."""
  if method != 'loss':
    return dict.fromkeys(sites)
  found: dict[str, np.ndarray | None] = {}
  for path, site in sites.items():
    moment = None if moments is None or path not in moments else moments[path]
    if moment is None or moment.grad_second is None:
      raise methods.needs_gradients(path)
    if moment.layout != site.layout:
      raise ValueError(
        f'the moments of {path!r} are over {moment.layout.shape}, the '
        f'parameter is {site.layout.shape}'
      )
    m = site.layout.matrix_shape[1]
    found[path] = np.asarray(moment.grad_second, np.float64).reshape(-1, m, m)
  return found


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
    members = read.members(sites[read.path].layout)
    for group, matrix in enumerate(members):
      key = read.path, matrix
      found[key] = (*found.get(key, ()), (keys.index(read.key), group))
  return found


class _Fit:
  """The factors of one leaf's matrices, as far as they are found.

  `given` is the constants of all leaves, by the bias that takes them and the
  kernel's path.
  """

  def __init__(
    self, site, named, given, ranks, gradients, compensate_mean, damping, gauge
  ):
    layout = site.layout
    self._site, self._named, self._given = site, named, given
    leaf = np.asarray(named[site.path], np.float64)
    if not np.all(np.isfinite(leaf)):
      raise ValueError(f'kernel {site.path!r} holds NaN or infinite values')
    d, m = layout.matrix_shape
    self._w = layout.to_matrices(leaf).reshape(-1, d, m)
    self._ranks = per_member(site.path, ranks, layout)
    self._gradients = gradients
    self._compensate_mean = compensate_mean
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
    if self._compensate_mean:
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
    groups = self._site.layout.group_shape
    index = map(int, np.unravel_index(matrix, groups)) if groups else ()
    return member_name(self._site.path, tuple(index))

  def _store(self, pair: Pair) -> Stored:
    rank = int(max(self._ranks))
    return store(pair, self._site.layout, rank, self._dtype, self._gauge)

  def leaves(self) -> dict[str, Any]:
    """The kernel's leaf, and its bias with the constants; zeros where no
    factors are yet."""
    path, layout, bias = self._site.path, self._site.layout, self._site.bias
    d, m = layout.matrix_shape
    none = self._store(Pair(np.zeros((d, 1)), np.zeros((1, m))))
    stored = [none if s is None else s for s in self._stored]
    leaf = assemble(stored, layout)
    if not self._compensate_mean:
      return {path: place(leaf, self._named[path])}
    constants = self._constants
    constants = constants if bias is None else self._of_bias(bias)
    return give_back(self._named, path, bias, leaf, constants)

  def running(self) -> dict[str, Any]:
    """As `leaves`, but of the kernel's own shape, whatever the ranks."""
    path, named, bias = self._site.path, self._named, self._site.bias
    alone = self._compensate_mean and bias is None
    constants = self._constants if alone else None
    layout = self._site.layout
    leaf = multiplied_out(self._product, constants, layout, named[path])
    if bias is None:
      return {path: leaf}
    more = self._of_bias(bias).reshape(named[bias].shape)
    new = np.asarray(named[bias], np.float64) + more
    return {path: leaf, bias: place_like(new, named[bias])}

  def _of_bias(self, bias: str) -> np.ndarray:
    """What all its kernels add to a bias."""
    given = self._given.setdefault(bias, {})
    given[self._site.path] = self._site.bias_scale * self._constants
    return sum(each.reshape(-1) for each in given.values())

  def finish(self) -> dict[str, Any]:
    """The leaves, a matrix that no product read being cut by its SVD."""
    d, m = self._site.layout.matrix_shape
    zeros = np.zeros((d, d))
    unseen = Inputs(zeros, zeros, np.zeros(d), np.zeros(d))
    for matrix, stored in enumerate(self._stored):
      if stored is None:
        self.fit(matrix, unseen, 0.0)
    return self.leaves()

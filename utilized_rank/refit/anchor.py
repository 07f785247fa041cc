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
from utilized_rank.factorization import methods
from utilized_rank.factorization.shared_left import Ranks
from utilized_rank.factorization.shared_left import check_ranks
from utilized_rank.host.progress import track
from utilized_rank.lowrank.leaf import is_low_rank
from utilized_rank.moments.capture import find_sites
from utilized_rank.moments.moments import Moments
from utilized_rank.moments.sites import Site
from utilized_rank.products.gauge import check_gauge
from utilized_rank.refit.blocks import Group
from utilized_rank.refit.kernel_fit import Fit
from utilized_rank.refit.kernel_fit import fit_block
from utilized_rank.refit.streams import Streams
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
  tracing.check_values(params)
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
    path: Fit(
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
    fit_block(streams, number, dense, small, fits, ridge)
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

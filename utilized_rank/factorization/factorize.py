"""From measured kernels to low-rank factors, or to projected kernels."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, NamedTuple

import numpy as np

from utilized_rank.factorization import certify
from utilized_rank.factorization import methods
from utilized_rank.factorization import shared_left
from utilized_rank.factorization.by_process import Unit
from utilized_rank.factorization.by_process import agree
from utilized_rank.factorization.by_process import each_unit
from utilized_rank.factorization.decompose import Families
from utilized_rank.factorization.kernels import Kernel
from utilized_rank.factorization.shared_left import Key
from utilized_rank.factorization.shared_left import Ranks
from utilized_rank.factorization.shared_left import check_ranks
from utilized_rank.factorization.shared_left import per_member
from utilized_rank.linalg import best_pairs
from utilized_rank.linalg.best_pairs import Pair
from utilized_rank.lowrank.leaf import is_low_rank
from utilized_rank.lowrank.place import place
from utilized_rank.lowrank.store import Stored
from utilized_rank.lowrank.store import assemble
from utilized_rank.lowrank.store import give_back
from utilized_rank.lowrank.store import store
from utilized_rank.moments.moments import Moments
from utilized_rank.products.gauge import check_gauge
from utilized_rank.tree import paths
from utilized_rank.walk import compat


@compat.moves_data
def factorize(
  params: Any,
  moments: Moments,
  ranks: Ranks,
  *,
  method: str = 'output',
  compensate_mean: bool = True,
  damping: float = methods.DAMPING,
  gauge: str | None = None,
  families: Families | None = None,
  processes: bool = False,
  progress: bool = True,
) -> Any:
  """Puts `LowRank` pairs in place of kernels.

  Args:
    params: dense parameters.
    moments: moments of their kernels.
    ranks: path to rank; other kernels stay dense. A stack of kernels has one
      rank, or a tuple of one for each: smaller pairs are padded with zeros.
      Kernels that read the same value can be given one rank under a tuple of
      their paths, such as `('q', 'k', 'v')`: then they have one left factor,
      which the leaf of the first holds.
    method: which W' of that rank.
      'weight': truncated SVD of W, blind to data.
      'scaled': the same with inputs scaled by their root mean square (ASVD).
      'fisher_rows': the same with rows of W weighed by the root of their
        squared gradients (FWSVD); needs moments collected with
        `fisher_rows=True`.
      'utilized': the paper's P_S W P_T, at the highest shared energy whose
        utilized rank min(k_S, k_T) is the rank asked for.
      'output': the least error at the kernel's outputs, W U U^T.
      'loss': the least loss, by the second moments of its gradient; needs
        moments that were collected with a loss.
      'coupled': the same, with inputs weighed by their row's squared gradient
        and gradients by their row's squared input; needs moments collected
        with `coupled=True`.
    compensate_mean: give the mean of what is discarded, mu (W - W'), back as
      a constant: in the kernel's bias where the function adds one and uses it
      for nothing else (behind a residual sum or a number as well, or taken
      off, as a norm's running mean is), else in `LowRank.c`. 'output' and
      'loss' then minimise the error about the mean, which never raises it.
    damping: for 'loss', share of the mean of the gradient moment's diagonal
      that is added to it; without any, few examples make things worse.
    gauge: 'identity' stores each pair without the r^2 numbers that it does
      not need: the same W' in r (d + m) - r^2 of them. r of the outputs are
      then x A itself, the others x A B'; where it takes less time, `low_rank`
      writes B out. At r = m nothing of B is left to store: such a pair stays
      as without a gauge.
    families: what `decompose` made of these parameters and moments, with the
      same three options; default to decompose here.
    processes: share the kernels out over the processes of the job
      (`jax.distributed.initialize`), which must all call this with the same
      arguments, parameters and moments on the host of each. All get the whole
      tree, the one that a single process makes. No process may call it alone.
    progress: show a progress bar; with `processes`, of this one's share.

  Returns:
    The tree with `LowRank` leaves, for `low_rank(fn)`; factors have the
    kernels' dtype and equal scale (a^T a = b b^T), so that they fine-tune at
    one learning rate. An identity block fixes the scale instead: the columns
    of A are columns of W', which train and decay as the dense kernel did,
    and no entry of B' is above 2.

  Raises:
    ValueError: an unknown method, gauge or path, a rank outside
      [1, min(d, m)], moments of other shapes, families made with other
      options, or processes that do not give the same arguments.
    FloatingPointError: factors do not leave the error that was predicted for
      them; see `certify`. With `processes` what one raises is raised by all.

  >>> import utilized_rank as ur
  >>> fn = lambda p, x: x @ p['w']
  >>> params, x = {'w': jnp.eye(4)}, jnp.eye(4)[:2]
  >>> moments = ur.capture(fn)(params, jnp.tile(x, (8, 1)))[1]
  >>> small = factorize(params, moments, {'w': 2})
  >>> bool(jnp.allclose(ur.low_rank(fn)(small, x), fn(params, x), atol=1e-6))
  True
  """
  if processes:
    agree(
      'factorize',
      params,
      moments,
      ranks=ranks,
      method=method,
      compensate_mean=compensate_mean,
      damping=damping,
      gauge=gauge,
      families=families,
    )
  methods.check_method(method)
  check_gauge(gauge)
  check_ranks(ranks, moments)
  if gauge is not None and any(not isinstance(key, str) for key in ranks):
    raise ValueError(
      f'gauge={gauge!r} is for kernels with factors of their own; ranks has '
      'kernels that share one: use gauge=None, or a rank for each path'
    )
  named, treedef = paths.flatten(params, is_low_rank)
  centered = compensate_mean and method in methods.CENTERED
  if families is not None:
    families.check(method, compensate_mean, damping, ranks)

  def solve(unit: Unit) -> _Member:
    key, place, group = unit
    names = shared_left.names_of(key)
    each = per_member(key, ranks[key], moments[names[0]].layout)
    family = None if families is None else families[key][place]
    solution = _solve(group, method, int(each[place]), damping, family)
    parts = [
      store(
        Pair(solution.pair.a, b),
        moments[path].layout,
        int(max(each)),
        named[path].dtype,
        gauge,
      )
      for path, b in zip(
        names, shared_left.split(solution.pair.b, group), strict=True
      )
    ]
    pairs = [part.pair() for part in parts]
    kernel = shared_left.joint(group)
    certify.check(
      kernel,
      Pair(pairs[0].a, np.concatenate([f.b for f in pairs], axis=1)),
      solution.error,
      named[names[0]].dtype,
      solution.weighted,
      solution.energy,
    )
    discarded = [
      member.mean @ member.w - (member.mean @ f.a) @ f.b
      for member, f in zip(group, pairs, strict=True)
    ]
    return _Member(key, parts, discarded)

  made = each_unit(
    solve,
    params,
    moments,
    list(ranks),
    centered=centered,
    processes=processes,
    progress=progress,
    desc='factorize',
  )
  for key, members in itertools.groupby(made, lambda member: member.key):
    found = list(members)
    names = shared_left.names_of(key)
    for i, path in enumerate(names):
      leaf = assemble([m.parts[i] for m in found], moments[path].layout)
      if i:  # the first of a set holds the left factor
        leaf = dataclasses.replace(leaf, a=None, left=names[0])
      if compensate_mean:
        entry = moments[path].entry
        discarded = np.stack([m.discarded[i] for m in found])
        named |= give_back(
          named, path, entry.bias, leaf, discarded, entry.bias_scale
        )
      else:
        named[path] = place(leaf, named[path])
  return paths.unflatten(treedef, named)


class _Member(NamedTuple):
  """What one member of the leaves of a key came to, for each leaf."""

  key: Key
  parts: list[Stored]
  discarded: list[np.ndarray]  # mu (W - W')


class _Solution(NamedTuple):
  """A pair, the error it should leave, and in which of the two metrics."""

  pair: Pair
  error: float
  energy: float
  weighted: bool


def _solve(
  group: tuple[Kernel, ...],
  method: str,
  rank: int,
  damping: float,
  family: methods.Family | None,
) -> _Solution:
  kernel = group[0]
  alone = None
  if method == methods.UTILIZED and len(group) == 1:
    alone = methods.utilized(kernel, rank)
  elif method == 'output' and family is None:
    alone = methods.output(shared_left.joint(group), rank)
  if alone is not None:
    pair, error, energy = alone
    return _Solution(best_pairs.balanced(pair), error, energy, False)
  if family is None:
    family = shared_left.family(group, method, damping)
  pair = best_pairs.balanced(methods.truncate(family, rank))
  weighted = method == 'loss' and kernel.rows_per_example > 0
  tails = family.damages['loss' if weighted else 'output']
  if weighted:
    tails = tails / (kernel.rows_per_example / 2)  # nats per row of outputs
  return _Solution(pair, float(tails[rank]), float(tails[0]), weighted)

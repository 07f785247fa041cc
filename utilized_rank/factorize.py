"""From measured kernels to low-rank factors, or to projected kernels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from utilized_rank import lowrank
from utilized_rank import methods
from utilized_rank import paths
from utilized_rank import subspace
from utilized_rank.kernels import Kernel
from utilized_rank.kernels import kernels
from utilized_rank.kernels import to_leaf
from utilized_rank.layers import pad_factors
from utilized_rank.layout import Layout
from utilized_rank.lowrank import LowRank
from utilized_rank.moments import Moments
from utilized_rank.ranks import Ranks
from utilized_rank.ranks import check_energy
from utilized_rank.ranks import check_ranks
from utilized_rank.ranks import per_member
from utilized_rank.subspace import Factors

Energies = float | Mapping[str, float | tuple[float, float]]


def project(
  params: Any,
  moments: Moments,
  *,
  energy: Energies = 0.99,
  centered: bool = False,
) -> Any:
  """The paper's transformation W' = P_S W P_T: same tree, same shapes.

  Args:
    params: dense parameters.
    moments: moments of their kernels.
    energy: share of both spectra to keep, in (0, 1]; or a mapping from path
      to a share, or to a pair (e_S, e_T). Paths that it lacks stay as they
      are.
    centered: take the spectra about the mean.

  Returns:
    The parameters with projected kernels; the function they compute on the
    data changes by the discarded energy.

  Raises:
    ValueError: an energy is outside (0, 1], or a path has no moments.

  Source: arXiv 2407.04797, W' = P_S W P_T (rows of X act from the left).
  """
  per_path = (
    energy if isinstance(energy, Mapping) else dict.fromkeys(moments, energy)
  )
  named, treedef = paths.flatten(params, lowrank.is_low_rank)
  for path, members in kernels(
    params, moments, centered=centered, only=per_path
  ):
    share = per_path[path]
    e_s, e_t = share if isinstance(share, tuple) else (share, share)
    projected = [
      k.projected(check_energy(e_s), check_energy(e_t)) for k in members
    ]
    named[path] = to_leaf(projected, moments[path].layout, named[path])
  return paths.unflatten(treedef, named)


def factorize(
  params: Any,
  moments: Moments,
  ranks: Ranks,
  *,
  method: str = 'output',
  compensate_mean: bool = True,
  damping: float = methods.DAMPING,
) -> Any:
  """Puts `LowRank` pairs in place of kernels.

  Args:
    params: dense parameters.
    moments: moments of their kernels.
    ranks: path to rank; other kernels stay dense. A stack of kernels has one
      rank, or a tuple of one for each: smaller pairs are padded with zeros.
    method: which W' of that rank.
      'weight': truncated SVD of W, blind to data.
      'scaled': the same with inputs scaled by their root mean square (ASVD).
      'utilized': the paper's P_S W P_T, at the highest shared energy whose
        utilized rank min(k_S, k_T) is the rank asked for.
      'output': the least error at the kernel's outputs, W U U^T.
      'loss': the least loss, by the second moments of its gradient; needs
        moments that were collected with a loss.
    compensate_mean: give the mean of what is discarded, mu (W - W'), back as
      a constant: in the kernel's bias where the function adds one and uses it
      for nothing else, else in `LowRank.c`. 'output' and 'loss' then minimise
      the error about the mean, which never raises it.
    damping: for 'loss', share of the mean of the gradient moment's diagonal
      that is added to it; without any, few examples make things worse.

  Returns:
    The tree with `LowRank` leaves, for `low_rank(fn)`; factors have the
    kernels' dtype and equal scale (a^T a = b b^T), so that they fine-tune at
    one learning rate.

  Raises:
    ValueError: an unknown method or path, a rank outside [1, min(d, m)], or
      moments of other shapes.

  >>> import utilized_rank as ur
  >>> fn = lambda p, x: x @ p['w']
  >>> params, x = {'w': jnp.eye(4)}, jnp.eye(4)[:2]
  >>> moments = ur.capture(fn)(params, jnp.tile(x, (8, 1)))[1]
  >>> small = factorize(params, moments, {'w': 2})
  >>> bool(jnp.allclose(ur.low_rank(fn)(small, x), fn(params, x), atol=1e-6))
  True
  """
  methods.check_method(method)
  check_ranks(ranks, moments)
  named, treedef = paths.flatten(params, lowrank.is_low_rank)
  centered = compensate_mean and method in methods.CENTERED
  for path, members in kernels(params, moments, centered=centered, only=ranks):
    moment, leaf = moments[path], named[path]
    each = per_member(path, ranks[path], moment.layout)
    pairs = [
      _pair(k, method, int(rank), damping)
      for k, rank in zip(members, each, strict=True)
    ]
    constant = None
    if compensate_mean:
      constant = np.stack(
        [
          k.mean @ (k.w - f.a @ f.b)
          for k, f in zip(members, pairs, strict=True)
        ]
      )
    bias = moment.entry.bias
    if constant is not None and bias is not None:
      named[bias] = add_constant(named, path, bias, constant)
      constant = None
    named[path] = to_low_rank(pairs, constant, moment.layout, leaf)
  return paths.unflatten(treedef, named)


def _pair(kernel: Kernel, method: str, rank: int, damping: float) -> Factors:
  if method == methods.UTILIZED:
    return subspace.balanced(methods.utilized(kernel, rank))
  family = methods.family(kernel, method, damping)
  return subspace.balanced(methods.truncate(family, rank))


def to_low_rank(
  pairs: list[Factors],
  constant: np.ndarray | None,
  layout: Layout,
  leaf: Any,
) -> LowRank:
  """The pairs of a leaf's matrices as one leaf of its dtype."""
  groups, dtype = layout.group_shape, leaf.dtype
  a, b = pad_factors(pairs)
  rank = a.shape[-1]
  c = None
  if constant is not None:
    c = jnp.asarray(constant.reshape(groups + layout.output_shape), dtype)
  return LowRank(
    jnp.asarray(a.reshape(groups + layout.input_shape + (rank,)), dtype),
    jnp.asarray(b.reshape(groups + (rank,) + layout.output_shape), dtype),
    c,
    layout,
  )


def add_constant(
  named: dict[str, Any], path: str, bias: str, constant: np.ndarray
) -> Any:
  """The bias of a kernel with a constant of its outputs added."""
  if bias not in named or named[bias].size != constant.size:
    raise ValueError(
      f'{path!r} had the bias {bias!r} of {constant.size} numbers when its '
      'moments were collected; these parameters do not'
    )
  old = named[bias]
  return jnp.asarray(
    np.asarray(old, np.float64) + constant.reshape(old.shape), old.dtype
  )

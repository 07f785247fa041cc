"""Pairs of float64 factors as leaves of a tree, constants where they fit."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from utilized_rank.gauge import Order
from utilized_rank.gauge import has_identity
from utilized_rank.gauge import to_identity
from utilized_rank.gauge import widen
from utilized_rank.layers import pad_factors
from utilized_rank.layout import Layout
from utilized_rank.lowrank import LowRank
from utilized_rank.subspace import Factors


def to_low_rank(
  pairs: list[Factors], layout: Layout, leaf: Any, gauge: str | None = None
) -> LowRank:
  """The pairs of a leaf's matrices as one leaf of its dtype, on the host.

  Threads may call it: where float64 is enabled by a context, they do not see
  that, and arrays of JAX would be cut to float32.
  """
  groups, dtype = layout.group_shape, leaf.dtype
  rank = max(f.a.shape[1] for f in pairs)
  order, b_shape = None, layout.output_shape
  if has_identity(layout, rank, gauge):
    parts = [to_identity(*f) for f in pairs]
    wide = [widen(a, b, rank) for a, b, _ in parts]
    a, b = (np.stack(factor) for factor in zip(*wide, strict=True))
    orders = np.stack([order for _, _, order in parts])
    order, b_shape = Order(orders.reshape(*groups, -1)), b.shape[-1:]
  else:
    a, b = pad_factors(pairs)
  return LowRank(
    np.asarray(a.reshape(groups + layout.input_shape + (rank,)), dtype),
    np.asarray(b.reshape(groups + (rank,) + b_shape), dtype),
    None,
    layout,
    order,
  )


def stored_pairs(leaf: LowRank) -> list[Factors]:
  """The factors of every member of a leaf, as they are stored."""
  (d, m), rank = leaf.layout.matrix_shape, leaf.rank
  a = np.asarray(leaf.a, np.float64).reshape(-1, d, rank)
  b = np.asarray(leaf.b, np.float64).reshape(len(a), rank, -1)
  if leaf.order is not None:
    orders = leaf.order.array.reshape(len(a), m)
    whole = [np.hstack([np.eye(rank), part]) for part in b]
    b = np.stack([w[:, o] for w, o in zip(whole, orders, strict=True)])
  return [Factors(*pair) for pair in zip(a, b, strict=True)]


def give_back(
  named: dict[str, Any],
  path: str,
  bias: str | None,
  leaf: LowRank,
  constant: np.ndarray,
) -> dict[str, Any]:
  """A leaf whose product adds a constant: in its bias, or in `LowRank.c`.

  Args:
    named: the parameters that hold the bias.
    path: of the kernel.
    bias: path of the kernel's own bias; None where there is none.
    leaf: the kernel's factors.
    constant: one number for each output of each member.

  Returns:
    The leaves to put in place, by path.

  Raises:
    ValueError: the parameters lack the bias, or it has another size.
  """
  if bias is None:
    shape = leaf.layout.group_shape + leaf.layout.output_shape
    c = jnp.asarray(constant.reshape(shape), leaf.dtype)
    return {path: dataclasses.replace(leaf, c=c)}
  if bias not in named or named[bias].size != constant.size:
    raise ValueError(
      f'{path!r} had the bias {bias!r} of {constant.size} numbers when its '
      'moments were collected; these parameters do not'
    )
  old = named[bias]
  new = np.asarray(old, np.float64) + constant.reshape(old.shape)
  return {path: leaf, bias: jnp.asarray(new, old.dtype)}

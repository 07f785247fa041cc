"""Factors of a kernel, turned to how a product wants its kernel."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
from typing import Any

import jax.numpy as jnp

from utilized_rank.products import gauge
from utilized_rank.tree.layout import Atoms
from utilized_rank.tree.layout import Layout
from utilized_rank.tree.layout import View
from utilized_rank.tree.layout import pieces_of
from utilized_rank.walk import compat

# Names of axes that are no atom: the rank, and in a pair with an identity
# block the outputs that are no pivots.
RANK, OTHERS = -1, -2


@dataclasses.dataclass(frozen=True)
class Factors:
  """Arrays of a factored kernel, laid out as in `LowRank`.

  `layout` is over the leaf's atoms; `present` names the group atoms that are
  still axes of the arrays (a loop may have sliced others away). `order` is
  None, or the outputs' order where the pair has an identity block,
  (*present, m). `scaled`: whether A is multiplied with what other kernels
  that share it are not.
  """

  a: Any
  b: Any
  c: Any
  layout: Layout
  present: Atoms
  order: Any = None
  scaled: bool = False

  def plain(self) -> Factors:
    """The same pair without an order: all of B."""
    if self.order is None:
      return self
    b = gauge.written_out(self.b, self.order, self.layout.output_shape)
    return dataclasses.replace(self, b=b, order=None)

  def is_typed(self) -> bool:
    """Whether types say how B is spread: nothing is looked up there."""
    return compat.has_explicit_axes(self.b)


@dataclasses.dataclass(frozen=True)
class Oriented:
  """Factors as a product meets them, one named axis per atom.

  A kernel that was factored for x @ W serves x @ W.T as well: the factors are
  then met the other way round, `first` being the one that x meets first.
  """

  first: Named
  second: Named
  c: Named | None
  order: Named | None
  swapped: bool


def read_backwards(array: Any, axes: Sequence[int]) -> Any:
  """The array, numpy's or JAX's, some of its axes from their end."""
  if not axes:
    return array
  step = lambda i: slice(None, None, -1 if i in axes else 1)
  return array[tuple(map(step, range(array.ndim)))]


def oriented(
  factors: Factors, layout: Layout, view: View, rows: int
) -> Oriented:
  """The factors for a product's roles with so many rows, in its dtype."""
  fine = factors.layout.refine(layout.atoms)
  pieces = pieces_of(factors.layout.atoms, layout.atoms)
  present = tuple(p for a in factors.present for p in pieces[a])
  special = {
    RANK: factors.b.shape[len(factors.present)],
    OTHERS: factors.b.shape[-1],
  }

  def named(array, names):
    sizes = [special[n] if n < 0 else layout.atoms[n] for n in names]
    backwards = [i for i, n in enumerate(names) if n in view.flipped]
    return Named(read_backwards(array.reshape(sizes), backwards), names)

  c = order = None
  if factors.order is None:
    b = named(factors.b, present + (RANK,) + fine.outputs)
  elif gauge.pays_written_out(rows, special[RANK], factors.order.shape[-1]):
    b = named(factors.plain().b, present + (RANK,) + fine.outputs)
  else:
    b = named(factors.b, present + (RANK, OTHERS))
    order = named(factors.order, present + fine.outputs)
  a = named(factors.a, present + fine.inputs + (RANK,))
  a, b = a.astype(view.dtype), b.astype(view.dtype)
  if factors.c is not None:
    c = named(factors.c, present + fine.outputs)
  swapped = (fine.inputs, fine.outputs) != (layout.inputs, layout.outputs)
  return Oriented(b if swapped else a, a if swapped else b, c, order, swapped)


@dataclasses.dataclass(frozen=True)
class Named:
  """An array whose axes are named by atoms, or by RANK or OTHERS."""

  array: Any
  atoms: Atoms

  @property
  def rank(self) -> int:
    return self.array.shape[self.atoms.index(RANK)]

  def astype(self, dtype: Any) -> Named:
    return Named(self.array.astype(dtype), self.atoms)


def place(
  factor: Named,
  batch: Sequence[Atoms],
  kept: Sequence[Atoms],
  batch_sizes: Sequence[int],
  kept_sizes: Sequence[int],
  rank_first: bool = False,
) -> Any:
  """Lays a factor out as (*batch, *kept, rank) or (*batch, rank, *kept).

  What has no rank (an order) is laid out as (*batch, *kept); B' has the
  outputs that are no pivots in place of the kept axes.
  """
  if OTHERS in factor.atoms:
    kept = [(OTHERS,)]
    kept_sizes = [factor.array.shape[factor.atoms.index(OTHERS)]]
  rank = [RANK] if RANK in factor.atoms else []
  ranks = [factor.rank] if rank else []
  flat = [a for axis in batch for a in axis]
  inner = [a for axis in kept for a in axis]
  names = flat + (rank + inner if rank_first else inner + rank)
  array = factor.array.transpose([factor.atoms.index(a) for a in names])
  sizes = [s if a else 1 for a, s in zip(batch, batch_sizes, strict=True)]
  tail = [*ranks, *kept_sizes] if rank_first else [*kept_sizes, *ranks]
  array = array.reshape(*sizes, *tail)
  return jnp.broadcast_to(array, (*batch_sizes, *tail))


def as_output(c: Named, output: View) -> Any:
  """A constant per output feature, shaped to add to the product's output."""
  names = [a for axis in output.axes for a in axis]
  array = c.array.transpose([c.atoms.index(a) for a in names])
  return array.reshape(
    [s if a else 1 for a, s in zip(output.axes, output.sizes, strict=True)]
  )

"""Factors of a kernel, turned to how a product wants its kernel."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
from typing import Any

import jax.numpy as jnp

from utilized_rank.layout import Atoms
from utilized_rank.layout import Layout
from utilized_rank.layout import View
from utilized_rank.layout import pieces_of


@dataclasses.dataclass(frozen=True)
class Factors:
  """Arrays of a factored kernel, laid out as in `LowRank`.

  `layout` is over the leaf's atoms; `present` names the group atoms that are
  still axes of the arrays (a loop may have sliced others away).
  """

  a: Any
  b: Any
  c: Any
  layout: Layout
  present: Atoms


def oriented(
  factors: Factors, layout: Layout, view: View
) -> tuple[Any, Any, Any]:
  """(a, b, c) with one named axis per atom, for a product's roles.

  A kernel that was factored for x @ W serves x @ W.T as well: the pair swaps.
  Each array comes as a dict-like pair (array, atoms of its axes); the rank
  axis carries the name -1.
  """
  fine = factors.layout.refine(layout.atoms)
  pieces = pieces_of(factors.layout.atoms, layout.atoms)
  present = tuple(p for a in factors.present for p in pieces[a])
  shape = lambda atoms: tuple(layout.atoms[a] for a in atoms)
  rank = factors.a.shape[-1]
  a = Named(
    factors.a.reshape(shape(present + fine.inputs) + (rank,)),
    present + fine.inputs + (-1,),
  )
  b = Named(
    factors.b.reshape(shape(present) + (rank,) + shape(fine.outputs)),
    present + (-1,) + fine.outputs,
  )
  c = None
  if factors.c is not None:
    c = Named(
      factors.c.reshape(shape(present + fine.outputs)),
      present + fine.outputs,
    )
  if fine.inputs == layout.inputs and fine.outputs == layout.outputs:
    pair = a, b
  else:
    pair = b, a
  dtype = view.dtype
  return (
    pair[0].astype(dtype),
    pair[1].astype(dtype),
    c,
  )


@dataclasses.dataclass(frozen=True)
class Named:
  """An array whose axes are named by atoms; -1 names the rank."""

  array: Any
  atoms: Atoms

  @property
  def rank(self) -> int:
    return self.array.shape[self.atoms.index(-1)]

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
  """Lays a factor out as (*batch, *kept, rank) or (*batch, rank, *kept)."""
  flat = [a for axis in batch for a in axis]
  inner = [a for axis in kept for a in axis]
  names = flat + ([-1] + inner if rank_first else inner + [-1])
  array = factor.array.transpose([factor.atoms.index(a) for a in names])
  sizes = [s if a else 1 for a, s in zip(batch, batch_sizes, strict=True)]
  tail = (
    [factor.rank, *kept_sizes] if rank_first else [*kept_sizes, factor.rank]
  )
  array = array.reshape(*sizes, *tail)
  return jnp.broadcast_to(array, (*batch_sizes, *tail))


def as_output(c: Named, output: View) -> Any:
  """A constant per output feature, shaped to add to the product's output."""
  names = [a for axis in output.axes for a in axis]
  array = c.array.transpose([c.atoms.index(a) for a in names])
  return array.reshape(
    [s if a else 1 for a, s in zip(output.axes, output.sizes, strict=True)]
  )

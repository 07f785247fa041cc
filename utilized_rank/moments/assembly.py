"""How what a walk emits becomes the sums of one kernel."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from utilized_rank.moments.moments import Sums
from utilized_rank.products.factors import read_backwards
from utilized_rank.products.product import Product
from utilized_rank.tree.layout import Atoms
from utilized_rank.tree.layout import Layout
from utilized_rank.tree.layout import pieces_of
from utilized_rank.walk.values import Bias
from utilized_rank.walk.values import Emission


@dataclasses.dataclass
class Use:
  """One product's use of one emission.

  `groups` names the leading axes of the emitted sums, outermost first, each by
  the kernel's atoms that it runs over; `biases` are leaves that a constant of
  its output can be moved to, each scaled by how many times that is.
  """

  product: Product
  groups: tuple[Atoms, ...]
  rows: int
  biases: list[Bias] = dataclasses.field(default_factory=list)

  @property
  def path(self) -> str:
    return self.product.view.path

  @property
  def fixed(self) -> dict[int, int]:
    """Atoms of which this product sees one index, known when tracing."""
    return {a: by for a, by in self.product.view.taken if isinstance(by, int)}


@dataclasses.dataclass(frozen=True)
class Part:
  """An emission as a part of one kernel's sums."""

  emission: Emission
  lead: tuple[int, ...]  # group atoms of the sums' leading axes, in order
  fixed: dict[int, int]  # group atom -> the one index that this part is of
  flipped: frozenset[int]  # group atoms along which the sums run backwards

  @classmethod
  def of(cls, emission: Emission, use: Use, layout: Layout) -> Part:
    pieces = pieces_of(use.product.layout.atoms, layout.atoms)
    lead = tuple(p for axis in use.groups for a in axis for p in pieces[a])
    fixed: dict[int, int] = {}
    for a, index in use.fixed.items():
      sizes = [layout.atoms[p] for p in pieces[a]]
      fixed.update(zip(pieces[a], map(int, np.unravel_index(index, sizes))))
    view = use.product.view
    flipped = {p for a in view.flipped for p in pieces[a]}
    return cls(emission, lead, fixed, frozenset(flipped.intersection(lead)))

  def signature(self, layout: Layout) -> Hashable:
    """Two leaves of equal signatures have the same sums.

    Atoms are told by their place among the groups: `a[0]` and `b[:, 0]` may
    read one value, and are of different members of their stacks.
    """
    place = {a: i for i, a in enumerate(layout.groups)}
    lead = tuple(place[a] for a in self.lead)
    fixed = tuple(sorted((place[a], i) for a, i in self.fixed.items()))
    flipped = tuple(sorted(place[a] for a in self.flipped))
    return self.emission.key, lead, fixed, flipped

  def arrange(self, array: Any, tail: int, layout: Layout) -> Any:
    """Splits all but `tail` axes into group atoms, in the leaf's order."""
    sizes = [layout.atoms[a] for a in self.lead]
    array = array.reshape(*sizes, *array.shape[array.ndim - tail :])
    backwards = [i for i, a in enumerate(self.lead) if a in self.flipped]
    array = read_backwards(array, backwards)
    order = sorted(range(len(self.lead)), key=lambda i: self.lead[i])
    return array.transpose(*order, *range(len(self.lead), array.ndim))


def assemble(parts: Sequence[Part], layout: Layout, inner: int) -> Sums:
  """Adds the parts of one kernel's sums into (*groups, ...) arrays.

  The groups are those of the coarsened layout: a stack that the function reads
  as rows of stacks is one stack again. `inner` axes are between the groups and
  the features.
  """
  whole = layout.coarsen().group_shape

  def joined(tail, *arrays):
    found = _join(
      [
        (p.fixed, p.arrange(a, tail, layout))
        for p, a in zip(parts, arrays, strict=True)
      ],
      layout,
    )
    return found.reshape(*whole, *found.shape[len(layout.groups) :])

  return Sums(
    *(
      jax.tree.map(
        functools.partial(joined, tail),
        *(getattr(p.emission.value, field) for p in parts),
      )
      for tail, field in enumerate(('count', 'total', 'panels'), inner)
    )
  )


def _join(parts: Sequence[tuple[dict[int, int], Any]], layout: Layout) -> Any:
  """Adds arrays that are each of all groups, or of one index of some."""
  by_index: dict[tuple[tuple[int, int], ...], Any] = {}
  for fixed, array in parts:
    at = tuple(sorted(fixed.items()))
    by_index[at] = array if at not in by_index else by_index[at] + array
  if list(by_index) == [()]:
    return by_index[()]
  groups, sizes = layout.groups, layout.group_shape
  first = {tuple(a for a, _ in at) for at in by_index}
  if first == {groups[:1]} and len(by_index) == sizes[0]:
    # A Python loop over a stack of layers: every index, once.
    return jnp.stack([by_index[at] for at in sorted(by_index)])
  at, example = next(iter(by_index.items()))
  tail = example.shape[len(groups) - len(at) :]
  full = jnp.zeros((*sizes, *tail), example.dtype)
  for at, array in by_index.items():
    where = dict(at)
    full = full.at[tuple(where.get(a, slice(None)) for a in groups)].add(array)
  return full

"""How an array is laid out from one parameter leaf, and as what matrix.

A leaf's shape is cut into *atoms*: factors of its axes, in the leaf's own
(row-major) order. A view of the leaf is then a list of axes, each made of
atoms, so that reshaping, transposing and slicing only move small tuples of
integers; reading it backwards and multiplying it with a number are marks on
it. Where a view meets a matrix product, every atom has one of three roles: it
is summed over (an input), kept (an output), or counted along (a group: a
scan's step, an expert, a member of an ensemble).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
import dataclasses
import math
from typing import Any

import numpy as np

from utilized_rank.tree.recut import recut

Atoms = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class View:
  """An array that is a parameter leaf seen through layout operations.

  Attributes:
    path: the leaf's path.
    shape: the leaf's shape.
    atoms: sizes of the atoms; their products, taken in order, are `shape`.
    axes: for each axis of the array, the atoms that make it up, outermost
      first. An axis without atoms is one the leaf was broadcast along.
    sizes: the array's shape.
    dtype: the array's dtype.
    taken: atoms that are no longer an axis, with what took each: an integer
      (a static index of the leaf), or a token (a loop that slices it, a traced
      index).
    flipped: atoms that are read backwards.
    scale: what the leaf is multiplied with; None if that is a number which is
      computed, or more than one.
    scaled_along: atoms along which what it is multiplied with differs.
    part: None, or of what is a part of a leaf and no layout of it, which. It
      is a view as if it were a leaf of its own.
  """

  path: str
  shape: tuple[int, ...]
  atoms: tuple[int, ...]
  axes: tuple[Atoms, ...]
  sizes: tuple[int, ...]
  dtype: Any
  taken: tuple[tuple[int, Any], ...] = ()
  flipped: frozenset[int] = frozenset()
  scale: float | None = 1.0
  scaled_along: frozenset[int] = frozenset()
  part: str | None = None

  @classmethod
  def of_leaf(
    cls,
    path: str,
    shape: Sequence[int],
    dtype: Any,
    atoms: Sequence[int] | None = None,
  ) -> View:
    """The leaf itself; `atoms` may cut its axes beforehand."""
    shape = tuple(shape)
    whole = cls(
      path,
      shape,
      shape,
      tuple((i,) for i in range(len(shape))),
      shape,
      dtype,
    )
    if atoms is None or tuple(atoms) == shape:
      return whole
    cut = whole.reshape(tuple(atoms))
    assert cut is not None, (shape, atoms)
    merged = cut.reshape(shape)
    assert merged is not None
    return merged

  def cast(self, dtype: Any) -> View:
    return dataclasses.replace(self, dtype=dtype)

  def transpose(self, permutation: Sequence[int]) -> View:
    return dataclasses.replace(
      self,
      axes=tuple(self.axes[i] for i in permutation),
      sizes=tuple(self.sizes[i] for i in permutation),
    )

  def flip(self, dimensions: Iterable[int]) -> View:
    """`lax.rev`: an axis backwards is each of its atoms backwards."""
    atoms = {a for i in dimensions for a in self.axes[i]}
    return dataclasses.replace(self, flipped=self.flipped ^ atoms)

  def multiply(self, shape: Sequence[int], scale: float | None) -> View | None:
    """The view times an array of this shape, its axes of size one repeated.

    None where that differs along an axis that the leaf is broadcast along, or
    from each number of the leaf to the next.
    """
    along: set[int] = set()
    for atoms, n in zip(self.axes, shape, strict=True):
      if n > 1 and not atoms:
        return None
      along |= set(atoms) if n > 1 else set()
    if along and math.prod(shape) == math.prod(self.sizes):
      return None
    if scale is not None and self.scale is not None:
      scale = self.scale * scale
    else:
      scale = None
    return dataclasses.replace(
      self,
      scale=scale,
      scaled_along=self.scaled_along | along,
    )

  def squeeze(self, dimensions: Iterable[int]) -> View:
    """Drops axes of size one; their atoms, if any, are index 0 of size one."""
    gone = set(dimensions)
    taken = [(a, 0) for i in sorted(gone) for a in self.axes[i]]
    return dataclasses.replace(
      self,
      axes=tuple(a for i, a in enumerate(self.axes) if i not in gone),
      sizes=tuple(s for i, s in enumerate(self.sizes) if i not in gone),
      taken=self.taken + tuple(taken),
    )

  def broadcast(self, shape: Sequence[int], dimensions: Sequence[int]) -> View:
    """`lax.broadcast_in_dim`; a stretched axis of size one loses its atoms."""
    axes: list[Atoms] = [()] * len(shape)
    taken = []
    for axis, atoms, size in zip(
      dimensions, self.axes, self.sizes, strict=True
    ):
      if size == shape[axis]:
        axes[axis] = atoms
      else:
        taken += [(a, 0) for a in atoms]
    return dataclasses.replace(
      self,
      axes=tuple(axes),
      sizes=tuple(shape),
      taken=self.taken + tuple(taken),
    )

  def take(self, axis: int, by: Any) -> View:
    """Takes the axis away: one index of it is looked at, named by `by`."""
    keep = [i for i in range(len(self.axes)) if i != axis]
    atoms = self.axes[axis]
    names = [by] * len(atoms)
    if isinstance(by, int):
      sizes = [self.atoms[a] for a in atoms]
      names = [
        n - 1 - int(i) if a in self.flipped else int(i)
        for a, n, i in zip(atoms, sizes, np.unravel_index(by, sizes))
      ]
    return dataclasses.replace(
      self,
      axes=tuple(self.axes[i] for i in keep),
      sizes=tuple(self.sizes[i] for i in keep),
      taken=self.taken + tuple(zip(atoms, names, strict=True)),
    )

  def reshape(self, sizes: Sequence[int]) -> View | None:
    """Re-cuts the axes, splitting atoms where it must; None if it cannot.

    It cannot where a new axis would hold part of an atom whose size it does
    not divide, or would mix atoms with a broadcast axis.
    """
    found = recut(self.atoms, self.axes, self.sizes, sizes)
    if found is None:
      return None
    atoms, axes, numbers = found
    if any(len(numbers[a]) > 1 for a, _ in self.taken):
      return None
    spread = lambda old: frozenset(n for a in old for n in numbers[a])
    return dataclasses.replace(
      self,
      atoms=atoms,
      axes=axes,
      sizes=tuple(sizes),
      taken=tuple((numbers[a][0], by) for a, by in self.taken),
      flipped=spread(self.flipped),
      scaled_along=spread(self.scaled_along),
    )


@dataclasses.dataclass(frozen=True)
class Layout:
  """A leaf read as one matrix, or as one matrix per group.

  Attributes:
    shape: the leaf's shape.
    atoms: sizes of the atoms, in the leaf's order.
    groups: atoms that count matrices (scan steps, experts, conv groups).
    inputs: atoms that a product sums over, in the leaf's order.
    outputs: atoms that a product keeps, in the leaf's order.
  """

  shape: tuple[int, ...]
  atoms: tuple[int, ...]
  groups: Atoms
  inputs: Atoms
  outputs: Atoms

  @classmethod
  def of(
    cls,
    shape: Sequence[int],
    groups: Sequence[int] = (),
    inputs: Sequence[int] = (),
    outputs: Sequence[int] = (),
  ) -> Layout:
    """The layout of a leaf whose whole axes have the given roles.

    >>> Layout.of((64, 4, 16), inputs=(0,), outputs=(1, 2)).matrix_shape
    (64, 64)
    """
    layout = cls(
      tuple(shape),
      tuple(shape),
      tuple(groups),
      tuple(inputs),
      tuple(outputs),
    )
    named = sorted([*groups, *inputs, *outputs])
    if named != list(range(len(shape))):
      raise ValueError(
        f'groups {groups}, inputs {inputs} and outputs {outputs} must name '
        f'each of the {len(shape)} axes of shape {tuple(shape)} once'
      )
    return layout

  def sizes(self, atoms: Atoms) -> tuple[int, ...]:
    return tuple(self.atoms[a] for a in atoms)

  @property
  def group_shape(self) -> tuple[int, ...]:
    return self.sizes(self.groups)

  @property
  def input_shape(self) -> tuple[int, ...]:
    return self.sizes(self.inputs)

  @property
  def output_shape(self) -> tuple[int, ...]:
    return self.sizes(self.outputs)

  @property
  def num_groups(self) -> int:
    return math.prod(self.group_shape)

  @property
  def matrix_shape(self) -> tuple[int, int]:
    """(d, m): input and output features of each matrix."""
    return math.prod(self.input_shape), math.prod(self.output_shape)

  @property
  def full_rank(self) -> int:
    return min(self.matrix_shape)

  @property
  def is_wide(self) -> bool:
    """Whether there are more outputs than inputs."""
    d, m = self.matrix_shape
    return d < m

  def to_matrices(self, leaf: Any) -> Any:
    """Reads a leaf as an array of shape (*group_shape, d, m)."""
    order = self.groups + self.inputs + self.outputs
    array = leaf.reshape(self.atoms).transpose(order)
    return array.reshape(self.group_shape + self.matrix_shape)

  def from_matrices(self, matrices: Any) -> Any:
    """Writes (*group_shape, d, m) as a leaf; undoes `to_matrices`."""
    order = self.groups + self.inputs + self.outputs
    array = matrices.reshape(self.sizes(order))
    return array.transpose(np.argsort(order)).reshape(self.shape)

  def refine(self, atoms: Sequence[int]) -> Layout:
    """The same layout over atoms that are each a piece of one of these."""
    numbers = pieces_of(self.atoms, atoms)
    spread = lambda group: tuple(n for a in group for n in numbers[a])
    return Layout(
      self.shape,
      tuple(atoms),
      spread(self.groups),
      spread(self.inputs),
      spread(self.outputs),
    )

  def coarsen(self) -> Layout:
    """The same layout with as few atoms as possible: whole axes again."""
    role = {
      a: r
      for r, group in enumerate((self.groups, self.inputs, self.outputs))
      for a in group
    }
    per_axis = pieces_of(self.shape, self.atoms)
    atoms: list[int] = []
    roles: list[int] = []
    for axis in range(len(self.shape)):
      last = None
      for a in per_axis[axis]:
        if role[a] == last:
          atoms[-1] *= self.atoms[a]
        else:
          atoms.append(self.atoms[a])
          roles.append(role[a])
        last = role[a]
    pick = lambda r: tuple(i for i, x in enumerate(roles) if x == r)
    return Layout(self.shape, tuple(atoms), pick(0), pick(1), pick(2))


def pieces_of(
  coarse: Sequence[int], fine: Sequence[int]
) -> list[tuple[int, ...]]:
  """Which entries of `fine` make up each entry of `coarse`, in order.

  Entries of size one that no coarse entry needs go to the one before them.

  >>> pieces_of((6, 4), (2, 3, 4))
  [(0, 1), (2,)]
  """
  out: list[tuple[int, ...]] = []
  at = 0
  for k, size in enumerate(coarse):
    start, product = at, 1
    while at == start or (product != size and at < len(fine)):
      product *= fine[at]
      at += 1
    if k == len(coarse) - 1:
      at = len(fine)
    if math.prod(fine[start:at]) != size:
      raise ValueError(f'{tuple(fine)} does not cut {tuple(coarse)}')
    out.append(tuple(range(start, at)))
  return out


def common_atoms(
  shape: Sequence[int], cuts: Sequence[Sequence[int]]
) -> tuple[int, ...] | None:
  """The coarsest cut of `shape` that refines every one of `cuts`, or None.

  >>> common_atoms((12,), [(12,), (3, 4), (6, 2)])
  (3, 2, 2)
  >>> common_atoms((12,), [(3, 4), (2, 6)]) is None
  True
  """
  out: list[int] = []
  per_cut = [pieces_of(shape, cut) for cut in cuts]
  for axis, size in enumerate(shape):
    strides = {1}
    for cut, pieces in zip(cuts, per_cut, strict=True):
      stride = 1
      for a in reversed(pieces[axis]):
        stride *= cut[a]
        strides.add(stride)
    ladder = sorted(strides)
    if any(b % a for a, b in zip(ladder, ladder[1:])):
      return None
    steps = [b // a for a, b in zip(ladder, ladder[1:])]
    out += list(reversed(steps)) or [size]
  return tuple(out)

"""The kernels at both ends of units: along which of their axes units lie."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
from typing import Any

from utilized_rank.hidden.layers import UnitKernel
from utilized_rank.hidden.layers import Units
from utilized_rank.products.product import Product
from utilized_rank.tree.layout import View
from utilized_rank.tree.layout import pieces_of
from utilized_rank.walk.values import Loop


class Refusal(Exception):
  """A kernel's place is none that a hidden layer can have; says why."""


def long_atoms(view: View, axis: int) -> list[int]:
  return [a for a in view.axes[axis] if view.atoms[a] > 1]


def loops_of(view: View) -> tuple[Any, ...]:
  """What took the leaf's long atoms, in the leaf's order."""
  taken = sorted(view.taken, key=lambda pair: pair[0])
  return tuple(by for a, by in taken if view.atoms[a] > 1)


def _leaf_axis(view: View, atom: int) -> int:
  """The axis of the leaf that an atom is, nothing else being in it."""
  for axis, pieces in enumerate(pieces_of(view.shape, view.atoms)):
    if [a for a in pieces if view.atoms[a] > 1] == [atom]:
      return axis
  raise Refusal('its units are a part of an axis')


def units_of(view: View, atoms: Sequence[int]) -> Units:
  """Where units along these atoms are in the leaf."""
  if len(atoms) != 1:
    raise Refusal(f'its units lie along {len(atoms)} axes of it')
  taken = [(a, by) for a, by in view.taken if view.atoms[a] > 1]
  loops = [(a, by) for a, by in taken if isinstance(by, Loop)]
  stacks = [_leaf_axis(view, a) for a, _ in loops]
  if len(stacks) > 1:
    raise Refusal('it is in a loop in a loop')
  return Units(
    view.path, _leaf_axis(view, atoms[0]), stacks[0] if stacks else None
  )


def plain_product(product: Product | str) -> Product:
  """A product of one whole kernel."""
  if isinstance(product, str):
    raise Refusal(product)
  view = product.view
  if any(view.atoms[a] > 1 for a in product.present):
    raise Refusal('several kernels of one leaf in one product')
  if view.flipped or view.scale != 1 or view.part is not None:
    raise Refusal('a product of it read backwards, scaled, or in part')
  return product


def unit_kernel(product: Product, atoms: Sequence[int]) -> UnitKernel:
  view = dataclasses.replace(
    product.view,
    taken=tuple(
      (a, by) for a, by in product.view.taken if a in product.layout.groups
    ),
  )
  at = units_of(view, atoms)
  return UnitKernel(at.path, at.axis, at.stack, layout=product.layout.coarsen())


def made_by(product: Product) -> tuple[int, UnitKernel]:
  """Axis of the output along which the units are, and where they come from."""
  outputs = set(product.layout.outputs)
  axes = [
    (axis, [a for a in atoms if a in outputs and product.view.atoms[a] > 1])
    for axis, atoms in enumerate(product.output.axes)
  ]
  axes = [(axis, atoms) for axis, atoms in axes if atoms]
  if len(axes) != 1:
    raise Refusal(f'its output has {len(axes)} axes of features')
  axis, atoms = axes[0]
  return axis, unit_kernel(product, atoms)


def contracted_with(eqn: Any, axis: int, which: int) -> int | None:
  """The kernel's axis that is summed over with one of the other operand."""
  if eqn.primitive.name == 'dot_general':
    contract, _ = eqn.params['dimension_numbers']
    mine, its = contract[1 - which], contract[which]
    return its[mine.index(axis)] if axis in mine else None
  numbers = eqn.params['dimension_numbers']
  if eqn.params['feature_group_count'] != 1 or axis != numbers.lhs_spec[1]:
    return None
  return numbers.rhs_spec[1]

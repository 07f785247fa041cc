"""Outputs of kernels that are repeated, as grouped queries repeat their keys.

A repeat is an axis that no kernel has. It gets an atom of its own, behind those
of the kernel, so that it can be merged with heads and told from them after.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
from typing import Any

from utilized_rank.tree.layout import View
from utilized_rank.tree.layout import pieces_of
from utilized_rank.walk.interpret import moved as laid_out


def own_atoms(view: View, leaf: Sequence[int]) -> int:
  """How many of the atoms, the first ones, are those of the kernel.

  Args:
    view: the kernel's output, repeated or not.
    leaf: shape of the kernel's leaf.
  """
  return sum(map(len, pieces_of(view.shape, view.atoms)[: len(leaf)]))


def as_rows(view: View, leaf: Sequence[int]) -> View | None:
  """The view with its repeats as rows; None where heads hold them."""
  if len(view.shape) == len(leaf):
    return view
  own = own_atoms(view, leaf)
  axes = []
  for atoms in view.axes:
    if len({a < own for a in atoms}) > 1:
      return None
    axes.append(tuple(a for a in atoms if a < own))
  taken = tuple((a, by) for a, by in view.taken if a < own)
  return dataclasses.replace(
    view,
    shape=tuple(leaf),
    atoms=view.atoms[:own],
    axes=tuple(axes),
    taken=taken,
  )


def moved(eqn: Any, view: View, leaf: Sequence[int]) -> View | None:
  """The view after a layout operation or a repeat; None after anything else.

  >>> import jax, jax.numpy as jnp
  >>> view = View('k', (8, 2), (8, 2), ((), (1,)), (5, 2), 'float32')
  >>> jaxpr = jax.make_jaxpr(lambda k: jnp.repeat(k, 3, 1))(jnp.ones((5, 2)))
  >>> for eqn in jaxpr.eqns:
  ...   view = moved(eqn, view, (8, 2))
  >>> view.atoms, view.axes
  ((8, 2, 3), ((), (1, 2)))
  """
  name, p = eqn.primitive.name, eqn.params
  if name == 'broadcast_in_dim' and len(eqn.invars) == 1:
    return _stretched(view, p['shape'], p['broadcast_dimensions'])
  if name == 'tile':
    pairs = list(zip(p['reps'], view.sizes, strict=True))
    shape = [n for pair in pairs for n in pair]
    wide = _stretched(view, shape, range(1, len(shape), 2))
    return wide.reshape([times * n for times, n in pairs])
  view_after = laid_out(eqn, view)
  if view_after is None:
    # Repeats that are merged with rows are rows.
    rows = as_rows(view, leaf)
    view_after = None if rows is None else laid_out(eqn, rows)
  return view_after


def _stretched(
  view: View, shape: Sequence[int], dimensions: Sequence[int]
) -> View:
  """`lax.broadcast_in_dim`, its new axes having atoms of their own."""
  wide = view.broadcast(shape, dimensions)
  kept = {
    axis
    for axis, size in zip(dimensions, view.sizes, strict=True)
    if size == shape[axis]
  }
  new = [i for i, n in enumerate(shape) if i not in kept and n != 1]
  axes, sizes = list(wide.axes), tuple(shape[i] for i in new)
  for atom, axis in enumerate(new, len(view.atoms)):
    axes[axis] = (atom,)
  return dataclasses.replace(
    wide,
    shape=view.shape + sizes,
    atoms=view.atoms + sizes,
    axes=tuple(axes),
  )

"""Moments of kernels with fewer units: parts of those that there are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

import jax
import numpy as np

from utilized_rank.hidden.layers import UnitKernel
from utilized_rank.hidden.layers import axis_atom
from utilized_rank.hidden.narrow_hidden import Cut
from utilized_rank.linalg import gram
from utilized_rank.moments.moments import Moments
from utilized_rank.moments.moments import Sums
from utilized_rank.tree.layout import Layout


def cut_moments(moments: Moments, cuts: Sequence[Cut]) -> Moments:
  """Moments of the narrower kernels, on the data of the dense ones.

  Units that stay are what they were: their part of the second kernel's input
  moment, and of the gradient's at the first kernels' outputs.

  Args:
    moments: of the dense kernels, from the input side.
    cuts: the layers, and which units stay.
  """
  table, sums = list(moments.table), list(moments.sums)
  grads = None if moments.grads is None else list(moments.grads)
  rows = None if moments.row_grads is None else list(moments.row_grads)
  place = {entry.path: i for i, entry in enumerate(table)}
  for layer, units in cuts:
    for kernel in layer.kernels:
      i = place[kernel.path]
      layout, reads = table[i].layout, kernel is layer.second
      part = _part(kernel, layout, units, reads)
      entry = dataclasses.replace(
        table[i], layout=_narrower(layout, kernel.axis, units.shape[1])
      )
      if reads:
        old = sums[entry.index]
        entry = dataclasses.replace(entry, index=len(sums))
        sums.append(Sums(old.count, part(old.total), _square(part, old.panels)))
        if rows is not None:
          rows[i] = part(rows[i])
      elif grads is not None:
        grads[i] = _square(part, grads[i])
      table[i] = entry
  held = lambda v: None if v is None else tuple(v)
  return Moments(
    tuple(table), tuple(sums), held(grads), moments.examples, held(rows)
  )


def _narrower(layout: Layout, axis: int, width: int) -> Layout:
  atom = axis_atom(layout, axis)
  put = lambda sizes, i: (*sizes[:i], width, *sizes[i + 1 :])
  return dataclasses.replace(
    layout, shape=put(layout.shape, axis), atoms=put(layout.atoms, atom)
  )


def _part(
  kernel: UnitKernel, layout: Layout, units: np.ndarray, reads: bool
) -> Callable[[Any], np.ndarray]:
  """Takes an array's last axis, (*groups, ..., d), to the units that stay."""
  atoms = layout.inputs if reads else layout.outputs
  sizes = layout.sizes(atoms)
  every = np.arange(np.prod(sizes)).reshape(sizes)
  axis = atoms.index(axis_atom(layout, kernel.axis))
  at = np.stack([np.take(every, mine, axis).ravel() for mine in units])

  def part(array: Any) -> np.ndarray:
    array = np.asarray(array)
    members = array.reshape(len(at), *array.shape[len(layout.groups) :])
    found = np.stack([m[..., i] for m, i in zip(members, at, strict=True)])
    return found.reshape(*layout.group_shape, *found.shape[1:])

  return part


def _square(part: Callable[[Any], np.ndarray], panels: Any) -> gram.Panels:
  """The part of a symmetric matrix, rows and columns."""
  whole = gram.whole(jax.tree.map(np.asarray, panels))
  once = part(whole).swapaxes(-1, -2)
  return gram.panels_of(part(once))

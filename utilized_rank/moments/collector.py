"""Visitor that emits what each product reads, and puts the parts together."""

from __future__ import annotations

from collections.abc import Hashable
import copy
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from utilized_rank.moments.assembly import Part
from utilized_rank.moments.assembly import Use
from utilized_rank.moments.assembly import assemble
from utilized_rank.moments.coverage import NOT_SELECTED
from utilized_rank.moments.moments import Sums
from utilized_rank.moments.rows import Rows
from utilized_rank.moments.sides import Chosen
from utilized_rank.moments.sites import Site
from utilized_rank.moments.sites import Sites
from utilized_rank.moments.sites import layout_conflict
from utilized_rank.products import describe
from utilized_rank.products.product import Product
from utilized_rank.tree.layout import Layout
from utilized_rank.tree.layout import View
from utilized_rank.tree.layout import common_atoms
from utilized_rank.tree.layout import pieces_of
from utilized_rank.walk import compat
from utilized_rank.walk.parts import PART
from utilized_rank.walk.values import Bias
from utilized_rank.walk.values import Emission
from utilized_rank.walk.values import Loop
from utilized_rank.walk.values import Output
from utilized_rank.walk.values import Running
from utilized_rank.walk.values import UnsupportedError


class Collector:
  """Visitor that emits the sums over each product's rows."""

  def __init__(
    self,
    params: dict[str, Any],
    selected: dict[str, bool] | None,
    report_holes: bool,
    rows: Rows,
    sides: Chosen,
  ):
    self.rows = rows
    self.params = params
    self.selected = selected
    self.report_holes = report_holes
    self.sides = sides
    self.holes: dict[str, str] = {}
    self.conflicts: dict[str, str] = {}
    # path -> reasons, in order of appearance (dicts keep it).
    self.drops: dict[str, dict[str, None]] = {p: {} for p in params}
    # path of what is added to products -> paths of their kernels.
    self.added: dict[str, dict[str, None]] = {}
    self.integers: dict[str, TypeError] = {}

  def wants(self, view: View) -> bool:
    return self.selected is None or self.selected[view.path]

  def dropped(self, view: View, reason: str) -> None:
    self.drops[view.path][reason] = None

  def opaque(self, view: View, primitive: str) -> None:
    if not self.wants(view):
      return
    if not self.report_holes:
      raise UnsupportedError(
        f'parameter {view.path!r} enters the primitive {primitive!r}, which '
        'hides what it computes with it; leave the parameter out with '
        f"select=[('{view.path}', False), ...], write the product outside "
        "of it, or pass on_opaque='report' to go without its moments"
      )
    self.holes[view.path] = primitive

  def product(self, eqn, operands, which, walk):
    view = operands[which].view
    x = operands[1 - which]
    out, product = describe.dense(eqn, operands, which)
    if isinstance(product, str):
      self.dropped(view, product)
      return out
    dtypes = self.params[view.path].dtype, x.dtype
    if view.scale != 1 and not compat.is_floating(dtypes[0]):
      self.dropped(view, f'a scale of {dtypes[0]} numbers')
      return out
    if not compat.is_floating(dtypes[0]) or compat.is_complex(dtypes[1]):
      error = TypeError(
        f'kernel {view.path!r} is {dtypes[0]} and multiplies {dtypes[1]}; '
        'moments are for real floating kernels of real inputs: leave it out '
        f"with select=[('{view.path}', False), ...]"
      )
      if self.selected is not None or not compat.is_integer(dtypes[0]):
        raise error
      self.integers[view.path] = error
      self.dropped(view, f'{eqn.primitive.name} as {dtypes[0]}')
      return out
    tokens = [by for _, by in product.view.taken]
    loops = frozenset(t for t in tokens if isinstance(t, Loop))
    traced = [(a, by) for a, by in product.view.taken if isinstance(by, tuple)]
    d, _ = product.layout.matrix_shape
    side, columns = self.sides.of(view.path, d)
    key: Hashable = (
      walk.origin(x),
      product.key,
      loops,
      tuple((a, id(token)) for a, (token, _) in traced),
      *map(walk.origin, operands[2:]),
    )
    if side == 'output':  # of this kernel alone, and of one member of it
      fixed = tuple(t for t in product.view.taken if isinstance(t[1], int))
      key = (key, view.path, product.view.atoms, fixed)
    elif side == 'sketch':
      key = (key, columns)
    groups = tuple((a,) for a in product.present)
    for a, _ in traced:
      groups = ((a,), *groups)

    def make():
      of = product.bound(operands[2:])
      count = self.rows.count(of, eqn, which)
      if side == 'output':
        y = out
        if operands[which].payload.bare is not None:
          bare = list(operands)
          bare[which] = operands[which].payload.bare
          (y,) = compat.bind(eqn, bare)
        found = self.rows.outputs(of, eqn, which, x, y)
      else:
        found = self.rows.inputs(of, eqn, which, x, columns)
      sums = Sums(count, *found)
      for a, (_, at) in traced:
        size = product.layout.atoms[a]
        sums = jax.tree.map(functools.partial(_put, at=at, size=size), sums)
      return sums

    use = Use(product, groups, product.num_rows)
    walk.tape.emit(key, make, use, loops)
    return Output(product.output, out, use)

  def among(self, running: Running) -> Collector:
    """The same, for the rows of a loop's examples that are not done."""
    inner = copy.copy(self)
    inner.rows = self.rows.among(running)
    return inner

  def biased(self, output: Output, bias: Bias) -> bool:
    if not is_bias(output.use.product, output.view, bias.view):
      return False
    self.added.setdefault(bias.view.path, {})[output.use.path] = None
    of_output, of_bias = output.view.scale, bias.view.scale
    if of_output is None or not of_bias:
      return False  # by how much a constant of x W is scaled is not known
    scale = of_output * output.scale / (of_bias * bias.scale)
    output.use.biases.append(dataclasses.replace(bias, scale=scale))
    return True

  def stacked(self, use: Use, loop, size: int, is_stacked: bool) -> Use:
    if not is_stacked:
      return dataclasses.replace(use, rows=use.rows * size)
    atoms = tuple(a for a, by in use.product.view.taken if by is loop)
    return dataclasses.replace(use, groups=(atoms, *use.groups))

  # --- from emissions to one set of sums per kernel ---

  def finish(self, emissions: list[Emission]) -> tuple[Sites, tuple[Sums, ...]]:
    uses: dict[str, list[tuple[Emission, Use]]] = {}
    for emission in emissions:
      for use in emission.uses:
        uses.setdefault(use.path, []).append((emission, use))
    if not uses and self.integers:
      raise next(iter(self.integers.values()))
    biases = self._biases(uses)
    sites: dict[str, Site] = {}
    sums: list[Sums] = []
    known: dict[Any, int] = {}
    for path, pairs in uses.items():
      layout = self._unify(path, pairs)
      if layout is None or path in self.holes:
        continue
      parts = [Part.of(e, u, layout) for e, u in pairs]
      whole = layout.coarsen()
      signature = (
        tuple(part.signature(layout) for part in parts),
        layout.group_shape,
        whole.group_shape,
        layout.matrix_shape[0],
      )
      if signature not in known:
        known[signature] = len(sums)
        sums.append(assemble(parts, layout, self.rows.tail))
      distinct = len({tuple(p.fixed.items()) for p in parts})
      side, columns = self.sides.of(path, layout.matrix_shape[0])
      sites[path] = Site(
        path,
        whole,
        known[signature],
        biases[path].view.path if path in biases else None,
        pairs[0][1].product.kind,
        side,
        sum(u.rows for _, u in pairs) // distinct,
        len(pairs),
        tuple(self.drops[path]),
        bias_scale=biases[path].scale if path in biases else 1.0,
        columns=columns,
      )
    return self._report(sites, biases), tuple(sums)

  def _unify(self, path, pairs) -> Layout | None:
    layouts = [u.product.layout for _, u in pairs]
    if any(reason.startswith(PART) for reason in self.drops[path]):
      # Its parts that no product was seen to read may be read all the same.
      return None
    atoms = common_atoms(layouts[0].shape, [y.atoms for y in layouts])
    if atoms is not None:
      fine = {y.refine(atoms) for y in layouts}
      if len(fine) == 1:
        return fine.pop()
    conflict = layout_conflict(layouts)
    if self.selected is not None:
      raise ValueError(
        f'{path!r} is {conflict}; leave it out of select, its moments are '
        'not of one matrix'
      )
    self.conflicts[path] = conflict
    return None

  def _biases(self, uses) -> dict[str, Bias]:
    """Kernel path -> the leaf that takes a constant of its output.

    The leaf is used for nothing else, and wherever it is added one product of
    the kernel is in the sum, once. Kernels of one sum may share it.
    """
    places: dict[str, set[Any]] = {}
    for pairs in uses.values():
      for _, use in pairs:
        for bias in use.biases:
          places.setdefault(bias.view.path, set()).add(bias.place)
    found: dict[str, Bias] = {}
    owned: set[str] = set()
    for path, pairs in uses.items():
      fit = []
      for bias in pairs[0][1].biases:
        name = bias.view.path
        met = [b for _, u in pairs for b in u.biases if b.view.path == name]
        once = len(met) == len(pairs) == len(places[name])
        if (
          once
          and {b.place for b in met} == places[name]
          and {b.scale for b in met} == {bias.scale}
          and not self.drops[name]
          and name not in uses
        ):
          fit.append(bias)
      if fit:
        # One that no other kernel has, if there is one.
        best = min(fit, key=lambda bias: bias.view.path in owned)
        found[path] = best
        owned.add(best.view.path)
    return found

  def _report(self, sites: dict[str, Site], biases) -> Sites:
    owners: dict[str, list[str]] = {}
    for path, bias in biases.items():
      owners.setdefault(bias.view.path, []).append(path)
    unseen = {}
    for path in self.params:
      if path in sites:
        continue
      reasons = ', '.join(self.drops[path])
      if self.selected is not None and not self.selected[path]:
        unseen[path] = NOT_SELECTED
      elif path in self.holes:
        unseen[path] = f'HOLE: enters {self.holes[path]}, which hides its use'
      elif path in owners:
        unseen[path] = f'bias of {" and ".join(owners[path])}'
      elif path in self.conflicts:
        unseen[path] = self.conflicts[path]
      elif PART in reasons:
        unseen[path] = f'HOLE: {reasons}: its parts have no moments'
      elif reasons:
        unseen[path] = f'used by {reasons}'
      elif path in self.added:
        unseen[path] = f'added to products of {" and ".join(self.added[path])}'
      else:
        unseen[path] = 'not used by the outputs'
    if self.selected is not None:
      missing = [
        p
        for p, s in self.selected.items()
        if s and p in unseen and p not in self.holes
      ]
      if missing:
        raise ValueError(
          f'{missing[0]!r} is selected but is no kernel of a product: it is '
          f'{unseen[missing[0]]}. Narrow the select rules to kernels '
          f'(known: {list(sites)[:4]})'
        )
    shapes = {p: tuple(v.shape) for p, v in self.params.items()}
    added = {p for p in self.added if p not in self.conflicts}
    belong = {*owners, *(p for p in added if not self.drops[p])}
    belong -= {*self.holes, *sites}
    return Sites(sites, unseen, shapes, self.holes, biases=belong)


def is_bias(product: Product, view: View, bias: View) -> bool:
  """Whether an added leaf is laid out as the product's own constant.

  Args:
    product: the product.
    view: its output as it is where the leaf is added.
    bias: the leaf.
  """
  layout = product.layout.refine(view.atoms)
  if len(bias.axes) != len(view.axes) or bias.part is not None:
    return False  # a scalar, or a part
  # One axis for each of the kernel's atoms, or for a row or broadcast axis.
  names: list[int | None] = []
  sizes: list[int] = []
  for atoms, size in zip(view.axes, bias.sizes, strict=True):
    named = [a for a in atoms if view.atoms[a] > 1]
    names += named or [None]
    sizes += [view.atoms[a] for a in named] or [size]
  if math.prod(sizes) != math.prod(bias.sizes):
    return False
  cut = bias.reshape(sizes)
  if cut is None:
    return False
  pairs: dict[int, int] = {}
  for name, atoms in zip(names, cut.axes, strict=True):
    its = [a for a in atoms if cut.atoms[a] > 1]
    if len(its) != (name is not None):
      return False
    if name is not None:
      if (name in view.flipped) != (its[0] in cut.flipped):
        return False
      pairs[name] = its[0]
  taken = {by: a for a, by in cut.taken if isinstance(by, Loop)}
  for a, by in product.view.taken:
    if isinstance(by, Loop) and by in taken:
      its_atom = taken.pop(by)
      if (a in product.view.flipped) != (its_atom in cut.flipped):
        return False
      pairs[pieces_of(product.layout.atoms, view.atoms)[a][0]] = its_atom
    elif product.layout.atoms[a] > 1:
      return False
  order = [
    pairs.get(a) for a in layout.groups + layout.outputs if layout.atoms[a] > 1
  ]
  every = [a for a, size in enumerate(cut.atoms) if size > 1]
  return not taken and order == every


def _put(array: jax.Array, at: Any, size: int) -> jax.Array:
  """One slice of a new leading axis, zeros elsewhere."""
  empty = jnp.zeros((size, *array.shape), array.dtype)
  return jax.lax.dynamic_update_index_in_dim(empty, array, at, 0)

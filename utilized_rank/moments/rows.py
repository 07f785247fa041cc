"""Which rows of a product's input count, and to which part of the sums.

A mask says which examples, or which of their tokens, are real. The rows of the
others are set to zero, which adds nothing to a sum, and are not counted. The
rows of one share of the examples can be summed apart from those of another,
so that devices that hold different examples have nothing to tell each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import copy
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

from utilized_rank.axes.flow import Flow
from utilized_rank.axes.flow import in_loop
from utilized_rank.axes.where import EXAMPLE
from utilized_rank.axes.where import TOKEN
from utilized_rank.axes.where import Where
from utilized_rank.axes.where import batch_array
from utilized_rank.axes.where import outermost
from utilized_rank.axes.where import plain
from utilized_rank.host.meshes import is_explicit
from utilized_rank.linalg import gram
from utilized_rank.linalg import sketch
from utilized_rank.moments.counting import Counting
from utilized_rank.products.product import ROW
from utilized_rank.products.product import Product
from utilized_rank.products.product import one_block
from utilized_rank.products.tiles import Tiles
from utilized_rank.walk import compat
from utilized_rank.walk.values import Running


class Rows:
  """The rows of every product of one traced function."""

  def __init__(self, counting: Counting, traced: Any):
    self._counting = counting
    self._mask = counting.mask
    self.parts = counting.parts
    self._found: dict[Any, Where] = {}
    self._tokens: int | None = None
    self._why, self._is_cut = 'a mask', True  # see `among`
    if counting.mask is None and not counting.parts:
      return
    self._examples = traced.args[0].shape[0]
    if self._mask is not None and self._mask.ndim == 2:
      self._tokens = self._mask.shape[1]
    flow = Flow(self._examples)
    values = [plain(v.shape) for v in traced.params.values()]
    values += [batch_array(a.shape, self._tokens) for a in traced.args]
    if self._examples > 1:
      flow.run(traced.jaxpr, values)
    self._found = flow.found

  def among(self, running: Running) -> Rows:
    """The rows in a loop's body of the examples that are not done.

    Raises:
      ValueError: it is not known which of the mask's examples are whose.
    """
    here = running.examples
    if here.size == 1:
      return self
    where = self._of(running.test)
    if self._mask is not None:
      if self._tokens is not None or where.mixed or not where.has(EXAMPLE):
        raise ValueError(
          'the examples of a vmapped loop end apart, and a mask of '
          f'{self._mask.shape} was not followed into it ({where.mixed})'
        )
      here = here & self.keep(where)
    inner = copy.copy(self)
    inner._why = 'a vmapped loop whose examples end apart'
    inner._mask, inner._tokens = here.reshape(-1), None
    inner._examples = here.size
    inner._is_cut = any(p.name == EXAMPLE for p in where.axes[0])
    inner._found = in_loop(running.body, running.consts, here.shape)
    return inner

  @property
  def tail(self) -> int:
    """Axes of the sums between the groups and the features."""
    return 1 if self.parts else 0

  def count(self, product: Product, eqn: Any, which: int) -> jax.Array:
    """n, (*groups, [parts])."""
    lead = product.layout.sizes(product.present)
    where = self._of(eqn.invars[1 - which])
    shape = eqn.invars[1 - which].aval.shape
    if isinstance(tiles := product.blocks(shape), Tiles):
      keep = self.keep(where)
      rows = gram.row_counts(product.features, shape, keep, tiles)
      return first_part(rows, 0, self.parts) if self.parts else rows
    rows = jnp.full(max(self.parts, 1), 0, jnp.int32)
    if self._mask is None or not where.has(EXAMPLE):
      even = self._is_split(where)
      share = product.num_rows // self.parts if even else product.num_rows
      rows = rows + share if even else rows.at[0].set(share)
    else:
      mask, unit = self._units(where, product)
      mask = mask.astype(jnp.int32)
      if self._is_split(where):
        rows = mask.reshape(self.parts, -1).sum(1, dtype=jnp.int32)
      else:
        rows = rows.at[0].set(mask.sum(dtype=jnp.int32))
      rows = rows * unit
    return jnp.broadcast_to(rows if self.parts else rows[0], lead + rows.shape)

  def inputs(
    self, product: Product, eqn: Any, which: int, x: Any, columns: int = 0
  ):
    """(sum x, panels of sum x x^T), (*groups, [parts], ...), over the rows
    that count; with columns a sketch in place of the panels.

    Raises:
      ValueError: with a mask, if it is not known which rows are whose.
    """
    of: Callable[..., tuple[Any, ...]] = gram.sharded_panels
    if columns:
      of = functools.partial(sketch.sharded_sketch, columns=columns)
    return self._over_inputs(product, eqn, which, x, of)

  def outputs(self, product: Product, eqn: Any, which: int, x: Any, y: Any):
    """(sum x, panels of sum y y^T) of the outputs y, as `inputs`."""
    of_x = self._over_inputs(product, eqn, which, x, gram.sharded_total)
    where, keep = self.responses(product, eqn)
    groups = len(product.present)
    blocks = product.output_blocks
    of_y = self.sums(product.responses, y, where, keep, groups, blocks)
    return of_x[0], of_y[1]

  def _over_inputs(self, product, eqn, which, x, of):
    where = self._of(eqn.invars[1 - which])
    if self._mask is not None:
      self._check(product, where, eqn, which)
    groups = len(product.present)
    keep = self.keep(where)
    return self.sums(
      product.features, x, where, keep, groups, product.blocks, of
    )

  def responses(self, product: Product, eqn: Any):
    """For the product's output: where it is, and which of it counts."""
    where = self._of(eqn.outvars[0])
    return where, self.keep(where)

  def coupled(
    self,
    product: Product,
    x: Any,
    g: Any,
    keep: Any,
    blocks: gram.Blocks,
  ) -> tuple[Any, ...]:
    """`gram.coupled_panels` of the rows that count, (*groups, [parts], ...).

    Args:
      product: whose rows they are.
      x: what it reads.
      g: like its output.
      keep: which of g counts, as `responses` has it.
      blocks: of its rows.
    """

    def sums(x, g, keep):
      g = _counted(g, keep)
      found = gram.coupled_panels(product.paired, x, g, blocks)
      if not self.parts:
        return found
      # One sum of all, at the first part: rows are read in blocks of all.
      return jax.tree.map(lambda a: first_part(a, 2, self.parts), found)

    x = jax.lax.stop_gradient(x)
    if not self.parts or not compat.has_explicit_axes(x):
      return sums(x, g, keep)
    assert self._counting.over is not None
    spec = PartitionSpec(*[None] * len(product.present), self._counting.over[1])
    return jax.sharding.auto_axes(sums, out_sharding=spec)(x, g, keep)

  def sums(
    self,
    matrix: Callable[[Any, Any], Any],
    x: Any,
    where: Where,
    keep: Any,
    groups: int,
    blocks: Callable[[Sequence[int]], gram.Blocks] = one_block,
    of: Callable[..., tuple[Any, ...]] = gram.sharded_panels,
  ) -> tuple[Any, ...]:
    """Sums over the rows of `matrix(x, block)` that count, in parts.

    `of` makes them, arrays or panels: all have the groups in front, the first
    one axis of features, the next one two.
    """
    if not self.parts:
      return of(matrix, _counted(x, keep), blocks(x.shape))
    assert self._counting.over is not None
    mesh, names = self._counting.over

    def sums(x, keep):
      x = _counted(x, keep)
      is_chosen = isinstance(blocks(x.shape), Tiles)
      if is_chosen or not self._is_split(where):
        # Whose rows are whose is not known: one sum of all, at the first part.
        found = of(matrix, x, blocks(x.shape))
        return _by_features(lambda a, k: first_part(a, k, self.parts), found)
      x = _parts_first(x, where, self.parts)
      free = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)
      spread = NamedSharding(_auto(mesh), PartitionSpec(names, *free))
      x = jax.lax.with_sharding_constraint(x, spread)
      found = jax.vmap(lambda x: of(matrix, x, blocks(x.shape)))(x)
      return _by_features(lambda a, k: jnp.moveaxis(a, 0, -1 - k), found)

    x = jax.lax.stop_gradient(x)
    if not compat.has_explicit_axes(x):
      return sums(x, keep)
    spec = PartitionSpec(*[None] * groups, names)
    return jax.sharding.auto_axes(sums, out_sharding=spec)(x, keep)

  # --- where the examples and tokens are ---

  def _of(self, atom: Any) -> Where:
    atom = getattr(atom, 'whole', atom)  # of a part: where they are on it all
    if isinstance(atom, compat.Literal) or atom not in self._found:
      # Not analysed: no mask and one sum, or one example.
      return plain(atom.aval.shape)
    return self._found[atom]

  def _is_split(self, where: Where) -> bool:
    """Whether the shares of the examples can be told apart."""
    if (
      not self.parts
      or not self._is_cut
      or where.mixed
      or not where.has(EXAMPLE)
    ):
      return False
    return outermost(where)[1] % self.parts == 0

  def _check(self, product: Product, where: Where, eqn: Any, which: int):
    path = product.view.path
    mixed = where.mixed or self._of(eqn.outvars[0]).mixed
    if product.kind != 'conv':
      apart = zip(where.axes, product.labels, strict=True)
      named = {p.name for a, label in apart if label is not ROW for p in a}
      if EXAMPLE in named:
        mixed = mixed or 'the product itself'
    if mixed:
      raise ValueError(
        f'{self._why} needs examples that do not mix, and the input of '
        f'{path!r} mixes them: {mixed}. Collect without a mask on batches '
        f"without padding, or leave it out with select=[('{path}', False), ...]"
      )
    if self._tokens is None or not where.has(EXAMPLE):
      return
    if product.kind != 'conv' and TOKEN not in named:
      if where.is_along(TOKEN, self._tokens):
        return
      one_each = product.kind == 'dot' and product.num_rows == self._examples
      if one_each and not isinstance(where.token, str):
        return
    raise ValueError(
      f'the mask is of {self._tokens} tokens, and the rows of {path!r} could '
      f'not be followed to them ({where.token or product.kind}, input of '
      f'shape {eqn.invars[1 - which].aval.shape}). Pass a mask of examples, '
      f"or leave it out with select=[('{path}', False), ...]"
    )

  def _units(self, where: Where, product: Product) -> tuple[Any, int]:
    """The mask of the units that rows stand for, and rows per unit."""
    mask = self._of_rows(where)
    return mask, product.num_rows // math.prod(mask.shape)

  def _of_rows(self, where: Where) -> Any:
    """The mask, as far as the value's axes go: (B, T) or (B,)."""
    if self._tokens is None or where.is_along(TOKEN, self._tokens):
      return self._mask
    if isinstance(where.token, int):
      return self._mask[:, where.token]
    return self._mask.any(1)

  def keep(self, where: Where) -> Any:
    """Which elements of a value count, broadcastable to it; None: all."""
    if self._mask is None or where.mixed or not where.has(EXAMPLE):
      return None
    mask = self._of_rows(where)
    names = (EXAMPLE, TOKEN)[: mask.ndim]
    pieces = where.pieces
    named = [i for i, p in enumerate(pieces) if p.name in names]
    order = sorted(
      named, key=lambda i: (names.index(pieces[i].name), -pieces[i].step)
    )
    mask = mask.reshape([pieces[i].size for i in order])
    mask = mask.transpose([order.index(i) for i in named])
    # Within an axis that has a part of the mask, its other pieces repeat it.
    ones, sizes, shape = [], [], []
    for axis in where.axes:
      has = any(p.name in names for p in axis)
      ones += [p.size if p.name in names else 1 for p in axis]
      sizes += [p.size if has else 1 for p in axis]
      shape.append(math.prod(p.size for p in axis) if has else 1)
    return jnp.broadcast_to(mask.reshape(ones), sizes).reshape(shape)

  def real(self, atoms: Sequence[Any], values: Sequence[Any]) -> list[Any]:
    """Values of the function, zeros in place of what is of padding.

    Args:
      atoms: the jaxpr's variables.
      values: theirs; those that are not floating stay as they are.
    """

    def one(atom: Any, value: Any) -> Any:
      keep = self.keep(self._of(atom))
      if keep is None or not jnp.issubdtype(value.dtype, jnp.floating):
        return value
      if not compat.has_explicit_axes(value):
        return _counted(value, keep)
      spec = jax.typeof(value).sharding.spec
      return jax.sharding.auto_axes(_counted, out_sharding=spec)(value, keep)

    return [one(*pair) for pair in zip(atoms, values, strict=True)]

  def losses(self, losses: jax.Array) -> jax.Array:
    """An example's loss where the example counts, zero elsewhere."""
    if self._mask is None:
      return losses
    mask = self._mask.reshape(len(losses), -1).any(1)
    return jnp.where(mask, losses, jnp.zeros((), losses.dtype))

  def zeros(self, groups: Sequence[int], features: Sequence[int]) -> jax.Array:
    """Float32 sums of nothing, (*groups, [parts], *features)."""
    if not self.parts:
      return jnp.zeros((*groups, *features), jnp.float32)
    assert self._counting.over is not None
    mesh, names = self._counting.over
    spec = PartitionSpec(*[None] * len(groups), names, *[None] * len(features))
    zeros = jnp.zeros((*groups, self.parts, *features), jnp.float32)
    place = jax.lax.with_sharding_constraint
    if is_explicit(mesh):
      place = jax.sharding.reshard
    return place(zeros, NamedSharding(mesh, spec))

  def examples(self, size: int) -> jax.Array:
    """How many examples of a batch count, () or (parts,)."""
    mask = self._mask
    if mask is None:
      mask = jnp.ones(size, bool)
    mask = mask.reshape(len(mask), -1).any(1).astype(jnp.int32)
    if not self.parts:
      return mask.sum(dtype=jnp.int32)
    if len(mask) % self.parts:
      return first_part(mask.sum(dtype=jnp.int32), 0, self.parts)
    return mask.reshape(self.parts, -1).sum(1, dtype=jnp.int32)


def _counted(x: jax.Array, keep: Any) -> jax.Array:
  """Zeros in place of what does not count; `keep` as `Rows.keep` has it."""
  return x if keep is None else jnp.where(keep, x, jnp.zeros((), x.dtype))


def _by_features(
  change: Callable[[jax.Array, int], jax.Array], found: Sequence[Any]
) -> tuple[Any, ...]:
  """`change(a, k)` of arrays or panels, the k-th with k axes of features."""
  return tuple(
    jax.tree.map(lambda a, k=k: change(a, k), value)
    for k, value in enumerate(found, 1)
  )


def _parts_first(x: jax.Array, where: Where, parts: int) -> jax.Array:
  """(parts, ...): the examples' axis cut into shares."""
  axis, size, before, behind = outermost(where)
  lead, rest = x.shape[:axis], x.shape[axis + 1 :]
  x = x.reshape(*lead, before, parts, size // parts * behind, *rest)
  x = jnp.moveaxis(x, axis + 1, 0)
  return x.reshape(parts, *lead, -1, *rest)


def first_part(array: jax.Array, features: int, parts: int) -> jax.Array:
  """(*groups, parts, ...) with the array at the first part, zeros behind."""
  at = array.ndim - features
  widths: Sequence[tuple[int, int]] = [(0, 0)] * array.ndim
  array = jnp.expand_dims(array, at)
  return jnp.pad(array, [*widths[:at], (0, parts - 1), *widths[at:]])


def _auto(mesh: Any) -> Any:
  kind = jax.sharding.AxisType.Auto
  return mesh.update(axis_types=(kind,) * len(mesh.axis_names))

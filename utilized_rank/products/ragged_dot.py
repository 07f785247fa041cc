"""`ragged_dot_general` as a product with the kernels of a group.

Rows of the activation, sorted by kernel, each meet the one kernel that is
theirs; how many each has, `group_sizes`, is data. Rows behind them all are of
no kernel. That is how dropless mixtures of experts are written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from utilized_rank.products import tiles
from utilized_rank.products.factors import Factors
from utilized_rank.products.factors import Named
from utilized_rank.products.factors import oriented
from utilized_rank.products.factors import place
from utilized_rank.products.product import ROW
from utilized_rank.products.product import Label
from utilized_rank.products.product import Product
from utilized_rank.products.product import roles
from utilized_rank.tree.layout import Atoms
from utilized_rank.tree.layout import View


@dataclasses.dataclass(frozen=True)
class RaggedDot(Product):
  """A product in which data say which kernel a row meets.

  Attributes:
    ragged: atoms of the kernels that rows choose from.
    segments: into how many segments rows of one kernel fall.
  """

  ragged: Atoms = ()
  segments: int = 0

  @property
  def leading(self) -> Atoms:
    return tuple(a for a in self.present if a not in self.ragged)

  @property
  def num_rows(self) -> int:
    """Rows for each kernel, on average: which has how many is data."""
    choices = math.prod(self.layout.sizes(self.ragged))
    return -(-super().num_rows // choices)

  @property
  def output_blocks(self) -> Callable[..., Any]:
    return self.blocks

  def features(self, x: Any, block: Any = 0) -> Any:
    """The rows of X in one tile, shape (n, d)."""
    return self._tile(super().features(x), block)

  def responses(self, y: Any, block: Any = 0) -> Any:
    return self._tile(super().responses(y), block)

  def _tile(self, rows: Any, tile: Any) -> Any:
    rows = rows.reshape(-1, rows.shape[-1])
    start, stop = tile
    size = tiles.rows_of_tile(len(rows), self.segments)
    return tiles.read(rows, start, stop, size)


def ragged_dot(eqn: Any, view: View, which: int) -> Product | str:
  numbers = eqn.params['ragged_dot_dimension_numbers']
  contract, batch = numbers.dot_dimension_numbers
  if which != 1 or not numbers.rhs_group_dimensions:
    # A walk does not ask for these but where both operands are parameters.
    return 'the rows of ragged_dot_general'
  (x_contract, kernel_contract), (x_batch, kernel_batch) = contract, batch
  (group,) = numbers.rhs_group_dimensions
  (at,) = numbers.lhs_ragged_dimensions
  taken = (*kernel_contract, *kernel_batch, group)
  free = [i for i in range(len(view.axes)) if i not in taken]
  for role, axes in (
    ('contracted', kernel_contract),
    ('kept', free),
    ('batched', kernel_batch),
  ):
    if any(not view.axes[i] and view.sizes[i] > 1 for i in axes):
      return f'broadcast, then {role} by ragged_dot_general'
  atoms = lambda axes: [a for i in axes for a in view.axes[i]]
  layout = roles(view, atoms(kernel_contract), atoms(free))
  x_shape = eqn.invars[0].aval.shape
  labels: list[Label] = [ROW] * len(x_shape)
  for mine, its in zip(kernel_batch, x_batch, strict=True):
    labels[its] = view.axes[mine] or ROW
  for mine, its in zip(kernel_contract, x_contract, strict=True):
    labels[its] = view.axes[mine]
  x_free = [
    i for i in range(len(x_shape)) if i not in x_contract and i not in x_batch
  ]
  outer = x_free.index(at)  # free axes in front of the ragged one
  x_sizes = [x_shape[i] for i in x_free]
  output = dataclasses.replace(
    view,
    axes=tuple(
      [view.axes[i] for i in kernel_batch]
      + [()] * len(x_free)
      + [view.axes[i] for i in free]
    ),
    sizes=tuple(
      [view.sizes[i] for i in kernel_batch]
      + x_sizes
      + [view.sizes[i] for i in free]
    ),
    dtype=eqn.outvars[0].aval.dtype,
    taken=view.taken
    + tuple((a, 'contracted') for a in atoms(kernel_contract))
    + tuple((a, 'chosen by rows') for a in view.axes[group]),
  )
  nb, nc = len(kernel_batch), len(kernel_contract)
  batch_sizes = [view.sizes[i] for i in kernel_batch]
  prefix = [*batch_sizes, *x_sizes[:outer]]
  inner = math.prod(x_sizes[outer + 1 :])
  count = view.sizes[group]
  in_order = tuple(a for a in layout.groups if a in atoms(kernel_batch))

  def limits(group_sizes):
    """Rows of the ragged axis that are each kernel's, (*prefix, g) each."""
    sizes = jnp.broadcast_to(group_sizes, (*prefix, count)).astype(jnp.int32)
    stop = jnp.minimum(jnp.cumsum(sizes, axis=-1), x_shape[at])
    zeros = jnp.zeros((*prefix, 1), jnp.int32)
    return jnp.concatenate([zeros, stop[..., :-1]], axis=-1), stop

  def blocks(shape, group_sizes):
    del shape
    names = atoms(kernel_batch)
    split = [layout.atoms[a] for a in names]
    order = [names.index(a) for a in in_order]
    rest = range(len(names), len(names) + outer + 1)

    def flat(ends):
      ends = ends.reshape(*split, *x_sizes[:outer], count)
      ends = ends.transpose(*order, *rest).reshape(-1, count)
      offset = jnp.arange(len(ends), dtype=jnp.int32) * x_shape[at]
      return ((ends + offset[:, None]) * inner).reshape(-1)

    start, stop = map(flat, limits(group_sizes))
    rows = math.prod(prefix) * math.prod(x_sizes[outer:])
    return tiles.tiles_of(start, stop, member, groups, rows)

  present = tuple(a for a in layout.groups if a not in dict(view.taken))
  groups = layout.sizes(present)
  member = np.arange(math.prod(groups)).reshape(groups)
  member = member.transpose(
    [present.index(a) for a in (*in_order, *view.axes[group])]
  )
  # A kernel that stands for all of a group is one kernel.
  choices = member.reshape(math.prod(batch_sizes), 1, -1)
  shape = math.prod(batch_sizes), math.prod(x_sizes[:outer]), count
  member = np.broadcast_to(choices, shape).reshape(-1)

  def factored(x, factors: Factors, once, group_sizes):
    if factors.order is not None:
      # Each row would look up its outputs in another order.
      factors = factors.plain()
    pair = oriented(factors, layout, view, math.prod(x_sizes))
    lead = [view.axes[i] for i in (group, *kernel_batch)]
    lead_sizes = [view.sizes[i] for i in (group, *kernel_batch)]

    def lay(factor: Named, axes: Sequence[int], rank_first: bool = False):
      kept = [view.axes[i] for i in axes], lead_sizes
      return place(
        factor, lead, *kept, [view.sizes[i] for i in axes], rank_first
      )

    def times(x, kernel, x_contract, contracted, x_batch, ragged, sharding):
      return jax.lax.ragged_dot_general(
        x,
        kernel,
        group_sizes,
        jax.lax.RaggedDotDimensionNumbers(
          (
            (x_contract, range(1 + nb, 1 + nb + contracted)),
            (x_batch, range(1, 1 + nb)),
          ),
          (ragged,),
          (0,),
        ),
        precision=eqn.params['precision'],
        preferred_element_type=eqn.params['preferred_element_type'],
        out_sharding=sharding,
      )

    def left():
      a = lay(pair.first, kernel_contract)
      return times(x, a, x_contract, nc, x_batch, at, None)

    z = left() if pair.swapped else once(left)
    b = lay(pair.second, free, rank_first=True)
    last = (z.ndim - 1,)
    sharding = eqn.params.get('out_sharding')
    y = times(z, b, last, 1, range(nb), nb + outer, sharding)
    if pair.c is not None:
      y = y + constants(pair.c, group_sizes).astype(y.dtype)
    return y

  def constants(c: Named, group_sizes):
    """Each row's own, shaped to add to the output; zeros for rows of none."""
    lead = [view.axes[i] for i in (*kernel_batch, group)]
    lead_sizes = [*batch_sizes, count]
    kept = [view.axes[i] for i in free]
    c = place(c, lead, kept, lead_sizes, [view.sizes[i] for i in free])
    _, stop = limits(group_sizes)
    of = jax.vmap(
      lambda ends, n: jnp.searchsorted(ends, n, side='right'), (0, None)
    )
    whose = of(
      stop.reshape(-1, count), jnp.arange(x_shape[at], dtype=jnp.int32)
    )
    whose = whose.reshape(*prefix, x_shape[at])
    look = lambda c, whose: c.at[whose].get(mode='fill', fill_value=0)
    for _ in range(nb):
      look = jax.vmap(look)
    found = look(c, whose)
    between = len(x_free) - outer - 1
    shape = [*prefix, x_shape[at], *[1] * between]
    return found.reshape(*shape, *found.shape[len(prefix) + 1 :])

  geometry = ('ragged', outer, count, groups, tuple(choices.flat))
  return RaggedDot(
    'ragged_dot',
    view,
    layout,
    lambda x, i: x,
    labels,
    x_shape,
    geometry,
    output,
    factored,
    blocks,
    ragged=view.axes[group],
    segments=len(member),
  )

"""`dot_general` as a product with a kernel."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

from utilized_rank.products import gauge
from utilized_rank.products.factors import Factors
from utilized_rank.products.factors import as_output
from utilized_rank.products.factors import oriented
from utilized_rank.products.factors import place
from utilized_rank.products.product import ROW
from utilized_rank.products.product import Label
from utilized_rank.products.product import Product
from utilized_rank.products.product import roles
from utilized_rank.products.product import same_rows
from utilized_rank.tree.layout import View


def dot(eqn: Any, view: View, which: int) -> Product | str:
  dims = eqn.params['dimension_numbers']
  (contract, batch) = ([*map(tuple, d)] for d in dims)
  kernel_contract, x_contract = contract[which], contract[1 - which]
  kernel_batch, x_batch = batch[which], batch[1 - which]
  free = [
    i
    for i in range(len(view.axes))
    if i not in kernel_contract and i not in kernel_batch
  ]
  for role, axes in (('contracted', kernel_contract), ('kept', free)):
    if any(not view.axes[i] and view.sizes[i] > 1 for i in axes):
      return f'broadcast, then {role} by dot_general'
  atoms = lambda axes: [a for i in axes for a in view.axes[i]]
  layout = roles(view, atoms(kernel_contract), atoms(free))
  x_shape = eqn.invars[1 - which].aval.shape
  labels: list[Label] = [ROW] * len(x_shape)
  for mine, its in zip(kernel_batch, x_batch, strict=True):
    labels[its] = view.axes[mine] or ROW
  for mine, its in zip(kernel_contract, x_contract, strict=True):
    labels[its] = view.axes[mine]
  batch_axes = [view.axes[i] for i in kernel_batch]
  x_free = [
    i for i in range(len(x_shape)) if i not in x_contract and i not in x_batch
  ]
  x_sizes = [x_shape[i] for i in x_free]
  out_axes = [*batch_axes]
  out_sizes = [view.sizes[i] for i in kernel_batch]
  for side in (0, 1):
    if side == which:
      out_axes += [view.axes[i] for i in free]
      out_sizes += [view.sizes[i] for i in free]
    else:
      out_axes += [()] * len(x_free)
      out_sizes += x_sizes
  output = dataclasses.replace(
    view,
    axes=tuple(out_axes),
    sizes=tuple(out_sizes),
    dtype=eqn.outvars[0].aval.dtype,
    taken=view.taken + tuple((a, 'contracted') for a in atoms(kernel_contract)),
  )

  kernel_sizes = lambda axes: [view.sizes[i] for i in axes]
  kernel_axes = lambda axes: [view.axes[i] for i in axes]

  def factored(x, factors: Factors, once):
    pair = oriented(factors, layout, view, math.prod(x_sizes))

    def lay(factor, axes, rank_first=False):
      kept = kernel_axes(axes), kernel_sizes(kernel_batch), kernel_sizes(axes)
      return place(factor, kernel_axes(kernel_batch), *kept, rank_first)

    nb, nc = len(kernel_batch), len(kernel_contract)
    kwargs = dict(
      precision=eqn.params['precision'],
      preferred_element_type=eqn.params['preferred_element_type'],
    )
    lead = tuple(range(nb))
    a_dims = (tuple(range(nb + 1, nb + 1 + nc)), lead)
    x_dims = (x_contract, x_batch)
    sharding = eqn.params.get('out_sharding')
    at = nb + len(x_free) if which else nb  # where z has the rank

    def times(z, b, inner):
      """z b over z's axis `inner`, on the side where the kernel was."""
      operands, dims = (z, b), (((inner,), lead), ((nb,), lead))
      if not which:
        operands, dims = operands[::-1], dims[::-1]
      return jax.lax.dot_general(
        *operands, _paired(*dims), out_sharding=sharding, **kwargs
      )

    def left():
      a = by_rows(lay(pair.first, kernel_contract, rank_first=True))
      operands, dims = (x, a), (x_dims, a_dims)
      if not which:
        operands, dims = operands[::-1], dims[::-1]
      return jax.lax.dot_general(
        *operands,
        _paired(*dims),
        out_sharding=_with_rank(sharding, at, len(free)),
        **kwargs,
      )

    def pivots_and_others():
      """x [I, B']^T: the outputs of the kernel's own direction are inputs."""
      flat = x.transpose(*x_batch, *x_free, *x_contract)
      flat = flat.reshape(*flat.shape[: flat.ndim - nc], -1)
      order = lay(pair.order, kernel_contract)
      order = order.reshape(*order.shape[:nb], -1)
      first, others = gauge.part(flat, order, pair.first.rank)
      b = lay(pair.first, kernel_contract)
      dims = ((others.ndim - 1,), lead), ((nb,), lead)
      return first + jax.lax.dot_general(others, b, _paired(*dims), **kwargs)

    b = lay(pair.second, free, rank_first=True)
    if pair.order is not None and pair.swapped:
      z = pivots_and_others()
      y = times(z, b, z.ndim - 1)
    else:
      z = left() if pair.swapped else once(left)
      y = times(z, b, at)
      if pair.order is not None:
        order = lay(pair.order, free)
        y = gauge.join(z, y, order.reshape(*order.shape[:nb], -1), at)
        y = y.reshape(output.sizes)
    if pair.c is not None:
      y = y + as_output(pair.c, output).astype(y.dtype)
    return y

  # Rows of outputs are in the order of the output's axes.
  in_output = [i for i in x_batch if labels[i] is ROW] + x_free

  def aligned(rows, block):
    del block
    lead = rows.shape[:-2]
    rows = rows.reshape(*lead, *(x_shape[i] for i in in_output), rows.shape[-1])
    order = [len(lead) + i for i in np.argsort(in_output)]
    rows = rows.transpose(*range(len(lead)), *order, rows.ndim - 1)
    return rows.reshape(*lead, -1, rows.shape[-1])

  return Product(
    'dot',
    view,
    layout,
    lambda x, i: x,
    labels,
    x_shape,
    (),
    output,
    factored,
    aligned=same_rows if in_output == sorted(in_output) else aligned,
  )


@jax.custom_jvp
def by_rows(a: Any) -> Any:
  """A factor (..., r, d) as it is, with a gradient that is made like that.

  XLA would fold its transposition to (d, r) into the product z'^T x that makes
  it, and then transpose x, which is r times as large as it needs to be: on CPUs
  that takes as long as the product. As a rule of JVPs it transposes too.
  """
  return a


@by_rows.defjvp
def _by_rows_jvp(primals: Any, tangents: Any) -> Any:
  return primals[0], jax.lax.optimization_barrier(tangents[0])


def _with_rank(sharding: Any, at: int, kernel_axes: int) -> Any:
  """How x A is sharded if x W is: the rank in place of the kernel's axes."""
  if sharding is None:
    return None
  spec = [*sharding.spec]
  spec += [None] * (at + kernel_axes - len(spec))
  spec[at : at + kernel_axes] = [None]
  return NamedSharding(sharding.mesh, PartitionSpec(*spec))


def _paired(left: Any, right: Any) -> Any:
  """((contracted, batch) of each side) as `dot_general` wants them."""
  return tuple(zip(left, right, strict=True))

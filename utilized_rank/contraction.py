"""`dot_general` as a product with a kernel."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

from utilized_rank import gauge
from utilized_rank.factors import OTHERS
from utilized_rank.factors import Factors
from utilized_rank.factors import as_output
from utilized_rank.factors import oriented
from utilized_rank.factors import place
from utilized_rank.layout import View
from utilized_rank.product import ROW
from utilized_rank.product import Label
from utilized_rank.product import Product
from utilized_rank.product import roles


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
    pair = oriented(factors, layout, view)

    def lay(factor, axes, rank_first=False):
      kept = kernel_axes(axes), kernel_sizes(kernel_batch), kernel_sizes(axes)
      return place(factor, kernel_axes(kernel_batch), *kept, rank_first)

    nb, nc = len(kernel_batch), len(kernel_contract)
    kwargs = dict(
      precision=eqn.params['precision'],
      preferred_element_type=eqn.params['preferred_element_type'],
    )
    lead = tuple(range(nb))
    a_dims = (tuple(range(nb, nb + nc)), lead)
    x_dims = (x_contract, x_batch)
    sharding = eqn.params.get('out_sharding')
    at = nb + len(x_free) if which else nb  # where z has the rank

    def times(z, b, inner, out_sharding, over=nb):
      """z b over z's axis `inner`, on the side where the kernel was."""
      z_dims, b_dims = ((inner,), lead), ((over,), lead)
      operands, dims = ((z, b), (z_dims, b_dims))
      if not which:
        operands, dims = (b, z), (b_dims, z_dims)
      return jax.lax.dot_general(
        *operands, _paired(*dims), out_sharding=out_sharding, **kwargs
      )

    def left():
      a = lay(pair.first, kernel_contract)
      operands, dims = ((x, a), (x_dims, a_dims))
      if not which:
        operands, dims = (a, x), (a_dims, x_dims)
      return jax.lax.dot_general(
        *operands,
        _paired(*dims),
        out_sharding=_with_rank(sharding, at, len(free)),
        **kwargs,
      )

    if pair.order is None:
      z = once(left) if not pair.swapped else left()
      y = times(z, lay(pair.second, free, True), at, sharding)
    elif pair.swapped:
      flat = x.transpose(*x_batch, *x_free, *x_contract)
      flat = flat.reshape(*flat.shape[: flat.ndim - nc], -1)
      order = lay(pair.order, kernel_contract)
      first, others = gauge.part(
        flat, order.reshape(*order.shape[:nb], -1), pair.first.rank
      )
      b = place(
        pair.first,
        kernel_axes(kernel_batch),
        [(OTHERS,)],
        kernel_sizes(kernel_batch),
        [others.shape[-1]],
      )
      z = first + jax.lax.dot_general(
        others, b, (((others.ndim - 1,), (nb,)), (lead, lead)), **kwargs
      )
      y = times(z, lay(pair.second, free, True), z.ndim - 1, None)
    else:
      z = once(left)
      b = place(
        pair.second,
        kernel_axes(kernel_batch),
        [(OTHERS,)],
        kernel_sizes(kernel_batch),
        [pair.second.array.shape[-1]],
        rank_first=True,
      )
      order = lay(pair.order, free)
      y = gauge.join(
        z, times(z, b, at, None), order.reshape(*order.shape[:nb], -1), at
      )
      y = y.reshape(output.sizes)
    if pair.c is not None:
      y = y + as_output(pair.c, output).astype(y.dtype)
    return y

  return Product(
    'dot', view, layout, lambda x: x, labels, x_shape, (), output, factored
  )


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

"""Convolutions as products with a kernel: dense layers on patches."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
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
from utilized_rank.tree.layout import Atoms
from utilized_rank.tree.layout import View

# Numbers in the patches that exist at once (16 MiB of float32): enough rows
# to keep the Gram product busy, a small share of any model's activations.
_MOST_PATCHES = 2**22


def convolution(eqn: Any, view: View, which: int) -> Product | str:
  p = eqn.params
  if which == 0:
    return 'the image of a convolution'
  if p['batch_group_count'] != 1:
    return 'a convolution with batch groups'
  numbers = p['dimension_numbers']
  out_dim, in_dim, *window_dims = numbers.rhs_spec
  groups = p['feature_group_count']
  if any(not a and s > 1 for a, s in zip(view.axes, view.sizes)):
    return 'broadcast, then used by a convolution'
  if groups > 1:
    sizes = list(view.sizes)
    sizes[out_dim : out_dim + 1] = [groups, sizes[out_dim] // groups]
    cut = view.reshape(sizes)
    if cut is None:
      return 'a grouped convolution whose output axis is cut elsewhere'
    view = cut
    # Axes behind the output axis moved by one; the group axis is at its place.
    shift = lambda i: i + (i > out_dim)
    in_dim, window_dims = shift(in_dim), [shift(i) for i in window_dims]
    group_axis, out_dim = out_dim, out_dim + 1
  else:
    group_axis = None
  inputs = [a for i in (in_dim, *window_dims) for a in view.axes[i]]
  outputs = list(view.axes[out_dim])
  layout = roles(view, inputs, outputs)
  x_batch, x_feature, *x_space = numbers.lhs_spec
  window = [view.sizes[i] for i in window_dims]

  def rows(x, i):
    x = x.transpose(x_batch, *x_space, x_feature)
    if group_axis is not None:
      x = x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups)
    shape = (x.shape[0], *rows_shape[1:])  # it may be symbolic
    x = _padded(x, p)
    if _num_blocks(shape, bool(x_space)) > 1:
      x = _block(x, i, window, p, shape)
    return _patches(x, window, p)

  labels: list[Label] = [ROW] * (1 + len(x_space))
  if group_axis is not None:
    labels.append(view.axes[group_axis])
  labels.append(view.axes[in_dim])
  labels += [view.axes[i] for i in window_dims]

  o_batch, o_feature, *o_space = numbers.out_spec
  out_shape = eqn.outvars[0].aval.shape
  out_axes: list[Atoms] = [()] * len(out_shape)
  out_axes[o_feature] = (
    view.axes[group_axis] if group_axis is not None else ()
  ) + view.axes[out_dim]
  output = dataclasses.replace(
    view,
    axes=tuple(out_axes),
    sizes=tuple(out_shape),
    dtype=eqn.outvars[0].aval.dtype,
    taken=view.taken + tuple((a, 'contracted') for a in inputs),
  )

  def factored(x, factors: Factors, once):
    positions = math.prod(out_shape) // out_shape[o_feature]
    pair = oriented(factors, layout, view, positions)
    rank = pair.first.rank
    group_axes = [] if group_axis is None else [view.axes[group_axis]]
    group_sizes = [] if group_axis is None else [groups]
    kernel_axes = [in_dim, *window_dims]
    kwargs = dict(
      precision=p['precision'],
      preferred_element_type=p['preferred_element_type'],
    )

    def left():
      a = place(
        pair.first,
        group_axes,
        [view.axes[i] for i in kernel_axes],
        group_sizes,
        [view.sizes[i] for i in kernel_axes],
      )
      # (groups?, in, *window, rank) -> the equation's own kernel layout, with
      # groups * rank outputs.
      if group_axis is not None:
        a = jnp.moveaxis(a, 0, -2).reshape(*a.shape[1:-1], groups * rank)
      own = np.argsort(
        [numbers.rhs_spec[1], *numbers.rhs_spec[2:], numbers.rhs_spec[0]]
      )
      z = jax.lax.conv_general_dilated(
        x,
        a.transpose(own),
        p['window_strides'],
        p['padding'],
        p['lhs_dilation'],
        p['rhs_dilation'],
        numbers,
        groups,
        **kwargs,
      )
      z = jnp.moveaxis(z, o_feature, -1)
      if group_axis is None:
        return z
      # Groups lead, as they do in the factors.
      z = z.reshape(*z.shape[:-1], groups, rank)
      return jnp.moveaxis(z, -2, 0)

    z = once(left) if not pair.swapped else left()
    output_channels = (
      group_axes,
      [view.axes[out_dim]],
      group_sizes,
      [view.sizes[out_dim]],
    )
    b = place(pair.second, *output_channels, rank_first=True)
    nb, inner = len(group_axes), z.ndim - 1
    lead = tuple(range(nb))
    y = jax.lax.dot_general(z, b, (((inner,), (nb,)), (lead, lead)), **kwargs)
    if pair.order is not None:
      y = gauge.join(z, y, place(pair.order, *output_channels), inner)
    if group_axis is not None:
      y = jnp.moveaxis(y, 0, -2)
      y = y.reshape(*y.shape[:-2], -1)
    y = jnp.moveaxis(y, -1, o_feature)
    if pair.c is not None:
      y = y + as_output(pair.c, output).astype(y.dtype)
    return y

  geometry = (
    str(numbers.lhs_spec),
    p['window_strides'],
    p['padding'],
    p['lhs_dilation'],
    p['rhs_dilation'],
    tuple(window),
    groups,
  )
  x_shape = eqn.invars[0].aval.shape
  rows_shape = (
    x_shape[x_batch],
    *(out_shape[i] for i in o_space),
    *(() if group_axis is None else (groups,)),
    x_shape[x_feature] // groups,
    *window,
  )

  def blocks(shape):
    return _num_blocks((shape[x_batch], *rows_shape[1:]), bool(x_space))

  def aligned(rows, i):
    lead, m = rows.shape[:-2], rows.shape[-1]
    at, mine = len(lead), [o_batch, *o_space]
    rows = rows.reshape(*lead, *(out_shape[a] for a in sorted(mine)), m)
    order = [at + sorted(mine).index(a) for a in mine]
    rows = rows.transpose(*range(at), *order, rows.ndim - 1)
    if _num_blocks(rows_shape, bool(x_space)) > 1:
      images, strip = _block_shape(rows_shape, bool(x_space))
      across = rows_shape[1] // strip if x_space else 1
      cut = jax.lax.dynamic_slice_in_dim
      rows = cut(rows, i // across * images, images, at)
      if x_space:
        rows = cut(rows, i % across * strip, strip, at + 1)
    return rows.reshape(*lead, -1, m)

  return Product(
    'conv',
    view,
    layout,
    rows,
    labels,
    rows_shape,
    geometry,
    output,
    factored,
    blocks,
    aligned,
  )


def _block_shape(shape: Sequence[int], spatial: bool) -> tuple[int, int]:
  """Images, and rows of output positions, whose patches are taken at once.

  Strips of rows come first: the images may be spread over devices.
  """
  if not all(isinstance(n, int) for n in shape):
    return shape[0], shape[1] if spatial else 1  # symbolic: one block
  size = math.prod(shape)
  most = lambda n, unit: max(
    (k for k in range(1, n + 1) if n % k == 0 and k * unit <= _MOST_PATCHES),
    default=1,
  )
  images, rows = shape[0], shape[1] if spatial else 1
  strip = most(rows, size // rows)
  if strip * (size // rows) > _MOST_PATCHES:
    images = most(images, size // rows // images)
  return images, strip


def _num_blocks(shape: Sequence[int], spatial: bool) -> int:
  images, strip = _block_shape(shape, spatial)
  return math.prod(shape[: 1 + spatial]) // (images * strip)


def _padded(x: jax.Array, p: Any) -> jax.Array:
  padding = [(0, 0, 0)] * x.ndim
  for i, (lo, hi) in enumerate(p['padding']):
    padding[1 + i] = (lo, hi, p['lhs_dilation'][i] - 1)
  return jax.lax.pad(x, jnp.zeros((), x.dtype), padding)


def _block(x, i, window, p, shape):
  """What the i-th block's patches are cut from, of a padded (n, *space, c)."""
  images, strip = _block_shape(shape, bool(window))
  if not window:
    return jax.lax.dynamic_slice_in_dim(x, i * images, images)
  across = shape[1] // strip
  stride, step = p['window_strides'][0], p['rhs_dilation'][0]
  size = (strip - 1) * stride + (window[0] - 1) * step + 1
  x = jax.lax.dynamic_slice_in_dim(x, i // across * images, images)
  return jax.lax.dynamic_slice_in_dim(
    x, i % across * strip * stride, size, axis=1
  )


def _patches(x: jax.Array, window: Sequence[int], p: Any) -> jax.Array:
  """The inputs of each output position: (n, *space, ..., c, *window), of
  images that are padded already.

  One spatial axis at a time, so that a window of k x k costs 2 k slices. Where
  windows tile the axis (a vision transformer's patches) it is a reshape.
  """
  for i, taps in enumerate(window):
    axis, stride, step = 1 + i, p['window_strides'][i], p['rhs_dilation'][i]
    size = x.shape[axis]
    count = (size - (taps - 1) * step - 1) // stride + 1
    if step == 1 and stride == taps and size == count * taps:
      shape = x.shape[:axis] + (count, taps) + x.shape[axis + 1 :]
      x = jnp.moveaxis(x.reshape(shape), axis + 1, -1)
      continue
    last = (count - 1) * stride + 1
    x = jnp.stack(
      [
        jax.lax.slice_in_dim(x, k * step, k * step + last, stride, axis)
        for k in range(taps)
      ],
      axis=-1,
    )
  return x

"""The two products a kernel takes part in: `dot_general` and convolution.

A product gives every atom of its kernel a role, reads its other operand as the
rows of a matrix X, and knows how to run with a pair of factors in place of the
kernel. Nothing is inferred from names or shapes: the roles are what the
equation's dimension numbers say.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np

from utilized_rank.layout import Atoms, Layout, View, pieces_of

# Label of an activation axis: the kernel atoms it runs along, or a row.
ROW = None
Label = Atoms | None


@dataclasses.dataclass(frozen=True)
class Factors:
  """Arrays of a factored kernel, laid out as in `LowRank`.

  `layout` is over the leaf's atoms; `present` names the group atoms that are
  still axes of the arrays (a loop may have sliced others away).
  """

  a: Any
  b: Any
  c: Any
  layout: Layout
  present: Atoms


@dataclasses.dataclass(frozen=True)
class Product:
  """A product of an activation and a kernel.

  Attributes:
    kind: 'dot' or 'conv'.
    view: the kernel as the product sees it, axes cut by role.
    layout: the role of each of the leaf's atoms.
    rows: reads the other operand as an array whose axes have `labels`.
    labels: for each axis, the kernel atoms it runs along, or ROW.
    rows_shape: shape of what `rows` returns.
    geometry: what else the rows depend on (a convolution's window).
    output: the product's output as a view over the kernel's atoms.
    factored: runs the product with factors instead.
  """

  kind: str
  view: View
  layout: Layout
  rows: Callable[[Any], Any]
  labels: Sequence[Label]
  rows_shape: tuple[int, ...]
  geometry: Hashable
  output: View
  factored: Callable[[Any, Factors], Any]

  @property
  def present(self) -> Atoms:
    """Group atoms that are axes here, not taken by a loop or an index."""
    gone = {a for a, _ in self.view.taken}
    return tuple(a for a in self.layout.groups if a not in gone)

  @property
  def num_rows(self) -> int:
    """n, rows that one evaluation contributes to each matrix."""
    return math.prod(
        s for s, label in zip(self.rows_shape, self.labels) if label is ROW
    )

  @property
  def key(self) -> Hashable:
    """What X depends on besides the activation itself."""
    split, order = self._arrangement(
        self.rows_shape, self.labels, self.layout.inputs
    )
    return (
        self.geometry, _runs(split, order), self.layout.sizes(self.present)
    )

  def features(self, x: Any) -> Any:
    """X, shape (*groups, n, d).

    Features are in the kernel's own order, whatever order the equation lists
    them in: `einsum('bshd,hde->bse')` contracts (d, h).
    """
    return self._matrices(self.rows(x), self.labels, self.layout.inputs)

  def responses(self, y: Any) -> Any:
    """An array like the product's output as (*groups, n, m)."""
    labels = [atoms or ROW for atoms in self.output.axes]
    return self._matrices(y, labels, self.layout.outputs)

  def _matrices(self, array: Any, labels: Sequence[Label], atoms: Atoms):
    split, order = self._arrangement(array.shape, labels, atoms)
    lead = self.layout.sizes(self.present)
    width = math.prod(self.layout.sizes(atoms))
    array = array.reshape(split).transpose(sum(order, []))
    return array.reshape(*lead, -1, width)

  def _arrangement(
      self, shape: Sequence[int], labels: Sequence[Label], atoms: Atoms
  ) -> tuple[list[int], list[list[int]]]:
    """Sizes that split the axes into atoms; groups, rows, features in it."""
    split: list[int] = []
    names: list[int | None] = []
    for size, label in zip(shape, labels, strict=True):
      if label is ROW:
        split.append(size)
        names.append(ROW)
      else:
        split += [self.layout.atoms[a] for a in label]
        names += label
    where = {a: i for i, a in enumerate(names) if a is not ROW}
    return split, [
        [where[a] for a in self.present],
        [i for i, a in enumerate(names) if a is ROW],
        [where[a] for a in atoms],
    ]


def _runs(sizes: Sequence[int], parts: Sequence[Sequence[int]]) -> Hashable:
  """A name for a transposition that does not see needless splits."""
  out = []
  for part in parts:
    runs: list[list[int]] = []
    for i in part:
      if sizes[i] == 1:
        continue
      if runs and runs[-1][1] == i:
        runs[-1][1] = i + 1
      else:
        runs.append([i, i + 1])
    out.append(tuple(
        (math.prod(sizes[:a]), math.prod(sizes[a:b])) for a, b in runs
    ))
  return tuple(out)


def describe(eqn: Any, view: View, which: int) -> Product | str:
  """Reads a product's equation; a string says why it is none.

  Args:
    eqn: a `dot_general` or `conv_general_dilated` equation.
    view: the operand that is a parameter.
    which: its position among the operands.
  """
  if eqn.primitive.name == 'dot_general':
    return _dot(eqn, view, which)
  return _conv(eqn, view, which)


def _layout(view: View, inputs: Sequence[int], outputs: Sequence[int]):
  inputs, outputs = sorted(inputs), sorted(outputs)
  groups = sorted(set(range(len(view.atoms))) - set(inputs) - set(outputs))
  return Layout(
      view.shape, view.atoms, tuple(groups), tuple(inputs), tuple(outputs)
  )


# --- dot_general ---


def _dot(eqn: Any, view: View, which: int) -> Product | str:
  dims = eqn.params['dimension_numbers']
  (contract, batch) = ([*map(tuple, d)] for d in dims)
  kernel_contract, x_contract = contract[which], contract[1 - which]
  kernel_batch, x_batch = batch[which], batch[1 - which]
  free = [
      i for i in range(len(view.axes))
      if i not in kernel_contract and i not in kernel_batch
  ]
  for role, axes in (('contracted', kernel_contract), ('kept', free)):
    if any(not view.axes[i] and view.sizes[i] > 1 for i in axes):
      return f'broadcast, then {role} by dot_general'
  atoms = lambda axes: [a for i in axes for a in view.axes[i]]
  layout = _layout(view, atoms(kernel_contract), atoms(free))
  x_shape = eqn.invars[1 - which].aval.shape
  labels: list[Label] = [ROW] * len(x_shape)
  for mine, its in zip(kernel_batch, x_batch, strict=True):
    labels[its] = view.axes[mine] or ROW
  for mine, its in zip(kernel_contract, x_contract, strict=True):
    labels[its] = view.axes[mine]
  batch_axes = [view.axes[i] for i in kernel_batch]
  x_free = [
      i for i in range(len(x_shape))
      if i not in x_contract and i not in x_batch
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
      view, axes=tuple(out_axes), sizes=tuple(out_sizes),
      dtype=eqn.outvars[0].aval.dtype,
      taken=view.taken + tuple(
          (a, 'contracted') for a in atoms(kernel_contract)
      ),
  )

  def factored(x, factors: Factors):
    a, b, c = _oriented(factors, layout, view)
    batch_sizes = [view.sizes[i] for i in kernel_batch]
    a = _place(
        a, [view.axes[i] for i in kernel_batch],
        [view.axes[i] for i in kernel_contract],
        batch_sizes, [view.sizes[i] for i in kernel_contract],
    )
    b = _place(
        b, [view.axes[i] for i in kernel_batch],
        [view.axes[i] for i in free],
        batch_sizes, [view.sizes[i] for i in free],
        rank_first=True,
    )
    nb, nc = len(kernel_batch), len(kernel_contract)
    kwargs = dict(
        precision=eqn.params['precision'],
        preferred_element_type=eqn.params['preferred_element_type'],
    )
    lead = tuple(range(nb))
    a_dims = (tuple(range(nb, nb + nc)), lead)
    x_dims = (x_contract, x_batch)
    sharding = eqn.params.get('out_sharding')
    if which:
      z = jax.lax.dot_general(
          x, a, _paired(x_dims, a_dims),
          out_sharding=_with_rank(sharding, nb + len(x_free), len(free)),
          **kwargs,
      )
      y = jax.lax.dot_general(
          z, b, (((z.ndim - 1,), (nb,)), (lead, lead)),
          out_sharding=sharding, **kwargs,
      )
    else:
      z = jax.lax.dot_general(
          a, x, _paired(a_dims, x_dims),
          out_sharding=_with_rank(sharding, nb, len(free)), **kwargs,
      )
      y = jax.lax.dot_general(
          b, z, (((nb,), (nb,)), (lead, lead)), out_sharding=sharding,
          **kwargs,
      )
    if c is not None:
      y = y + _as_output(c, output).astype(y.dtype)
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
  spec[at:at + kernel_axes] = [None]
  return NamedSharding(sharding.mesh, PartitionSpec(*spec))


def _paired(left: Any, right: Any) -> Any:
  """((contracted, batch) of each side) as `dot_general` wants them."""
  return tuple(zip(left, right, strict=True))


# --- convolution ---


def _conv(eqn: Any, view: View, which: int) -> Product | str:
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
    sizes[out_dim:out_dim + 1] = [groups, sizes[out_dim] // groups]
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
  layout = _layout(view, inputs, outputs)
  if groups > 1 and layout.full_rank == 1:
    return 'a depthwise convolution: matrices of rank one, nothing to factor'
  x_batch, x_feature, *x_space = numbers.lhs_spec
  window = [view.sizes[i] for i in window_dims]

  def rows(x):
    x = x.transpose(x_batch, *x_space, x_feature)
    if group_axis is not None:
      x = x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups)
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
      view, axes=tuple(out_axes), sizes=tuple(out_shape),
      dtype=eqn.outvars[0].aval.dtype,
      taken=view.taken + tuple((a, 'contracted') for a in inputs),
  )

  def factored(x, factors: Factors):
    a, b, c = _oriented(factors, layout, view)
    rank = a.rank
    group_axes = [] if group_axis is None else [view.axes[group_axis]]
    group_sizes = [] if group_axis is None else [groups]
    kernel_axes = [in_dim, *window_dims]
    a = _place(
        a, group_axes, [view.axes[i] for i in kernel_axes], group_sizes,
        [view.sizes[i] for i in kernel_axes],
    )
    # (groups?, in, *window, rank) -> the equation's own kernel layout, with
    # groups * rank outputs.
    if group_axis is not None:
      a = jnp.moveaxis(a, 0, -2).reshape(*a.shape[1:-1], groups * rank)
    order = np.argsort([numbers.rhs_spec[1], *numbers.rhs_spec[2:],
                        numbers.rhs_spec[0]])
    z = jax.lax.conv_general_dilated(
        x, a.transpose(order), p['window_strides'], p['padding'],
        p['lhs_dilation'], p['rhs_dilation'], numbers, groups,
        precision=p['precision'],
        preferred_element_type=p['preferred_element_type'],
    )
    z = jnp.moveaxis(z, o_feature, -1)
    b = _place(
        b, group_axes, [view.axes[out_dim]], group_sizes,
        [view.sizes[out_dim]], rank_first=True,
    )
    kwargs = dict(
        precision=p['precision'],
        preferred_element_type=p['preferred_element_type'],
    )
    if group_axis is None:
      y = jnp.matmul(z, b, **kwargs)
    else:
      z = z.reshape(*z.shape[:-1], groups, rank)
      y = jnp.einsum('...gr,grm->...gm', z, b, **kwargs)
      y = y.reshape(*y.shape[:-2], -1)
    y = jnp.moveaxis(y, -1, o_feature)
    if c is not None:
      y = y + _as_output(c, output).astype(y.dtype)
    return y

  geometry = (
      str(numbers.lhs_spec), p['window_strides'], p['padding'],
      p['lhs_dilation'], p['rhs_dilation'], tuple(window), groups,
  )
  x_shape = eqn.invars[0].aval.shape
  rows_shape = (
      x_shape[x_batch], *(out_shape[i] for i in o_space),
      *(() if group_axis is None else (groups,)),
      x_shape[x_feature] // groups, *window,
  )
  return Product(
      'conv', view, layout, rows, labels, rows_shape, geometry, output,
      factored,
  )


def _patches(x: jax.Array, window: Sequence[int], p: Any) -> jax.Array:
  """The inputs of each output position: (n, *space, ..., c, *window).

  One spatial axis at a time, so that a window of k x k costs 2 k slices. Where
  windows tile the axis (a vision transformer's patches) it is a reshape.
  """
  padding = [(0, 0, 0)] * x.ndim
  for i, (lo, hi) in enumerate(p['padding']):
    padding[1 + i] = (lo, hi, p['lhs_dilation'][i] - 1)
  x = jax.lax.pad(x, jnp.zeros((), x.dtype), padding)
  for i, taps in enumerate(window):
    axis, stride, step = 1 + i, p['window_strides'][i], p['rhs_dilation'][i]
    size = x.shape[axis]
    count = (size - (taps - 1) * step - 1) // stride + 1
    if step == 1 and stride == taps and size == count * taps:
      shape = x.shape[:axis] + (count, taps) + x.shape[axis + 1:]
      x = jnp.moveaxis(x.reshape(shape), axis + 1, -1)
      continue
    last = (count - 1) * stride + 1
    x = jnp.stack([
        jax.lax.slice_in_dim(x, k * step, k * step + last, stride, axis)
        for k in range(taps)
    ], axis=-1)
  return x


# --- factors ---


def _oriented(
    factors: Factors, layout: Layout, view: View
) -> tuple[Any, Any, Any]:
  """(a, b, c) with one named axis per atom, for a product's roles.

  A kernel that was factored for x @ W serves x @ W.T as well: the pair swaps.
  Each array comes as a dict-like pair (array, atoms of its axes); the rank
  axis carries the name -1.
  """
  fine = factors.layout.refine(layout.atoms)
  pieces = pieces_of(factors.layout.atoms, layout.atoms)
  present = tuple(p for a in factors.present for p in pieces[a])
  shape = lambda atoms: tuple(layout.atoms[a] for a in atoms)
  rank = factors.a.shape[-1]
  a = _Named(
      factors.a.reshape(shape(present + fine.inputs) + (rank,)),
      present + fine.inputs + (-1,),
  )
  b = _Named(
      factors.b.reshape(shape(present) + (rank,) + shape(fine.outputs)),
      present + (-1,) + fine.outputs,
  )
  c = None
  if factors.c is not None:
    c = _Named(
        factors.c.reshape(shape(present + fine.outputs)),
        present + fine.outputs,
    )
  if fine.inputs == layout.inputs and fine.outputs == layout.outputs:
    pair = a, b
  else:
    pair = b, a
  dtype = view.dtype
  return (
      pair[0].astype(dtype), pair[1].astype(dtype), c,
  )


def fits(factors: Factors, product: Product) -> bool:
  """Whether the factors can stand for the kernel in this product."""
  if len(product.layout.atoms) < len(factors.layout.atoms):
    return False
  fine = factors.layout.refine(product.layout.atoms)
  pieces = pieces_of(factors.layout.atoms, product.layout.atoms)
  present = tuple(p for a in factors.present for p in pieces[a])
  if present != product.present:
    return False
  mine = (product.layout.inputs, product.layout.outputs)
  if (fine.inputs, fine.outputs) == mine:
    return True
  return (fine.outputs, fine.inputs) == mine and factors.c is None


@dataclasses.dataclass(frozen=True)
class _Named:
  """An array whose axes are named by atoms; -1 names the rank."""

  array: Any
  atoms: Atoms

  @property
  def rank(self) -> int:
    return self.array.shape[self.atoms.index(-1)]

  def astype(self, dtype: Any) -> _Named:
    return _Named(self.array.astype(dtype), self.atoms)


def _place(
    factor: _Named,
    batch: Sequence[Atoms],
    kept: Sequence[Atoms],
    batch_sizes: Sequence[int],
    kept_sizes: Sequence[int],
    rank_first: bool = False,
) -> Any:
  """Lays a factor out as (*batch, *kept, rank) or (*batch, rank, *kept)."""
  flat = [a for axis in batch for a in axis]
  inner = [a for axis in kept for a in axis]
  names = flat + ([-1] + inner if rank_first else inner + [-1])
  array = factor.array.transpose([factor.atoms.index(a) for a in names])
  sizes = [s if a else 1 for a, s in zip(batch, batch_sizes, strict=True)]
  tail = (
      [factor.rank, *kept_sizes] if rank_first
      else [*kept_sizes, factor.rank]
  )
  array = array.reshape(*sizes, *tail)
  return jnp.broadcast_to(array, (*batch_sizes, *tail))


def _as_output(c: _Named, output: View) -> Any:
  """A constant per output feature, shaped to add to the product's output."""
  names = [a for axis in output.axes for a in axis]
  array = c.array.transpose([c.atoms.index(a) for a in names])
  return array.reshape([
      s if a else 1 for a, s in zip(output.axes, output.sizes, strict=True)
  ])

"""The rows that products read, and their sums over two runs of a function."""

from __future__ import annotations

from collections.abc import Container, Hashable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from utilized_rank.linalg import gram
from utilized_rank.products import describe
from utilized_rank.products.product import Product
from utilized_rank.tree.layout import Layout
from utilized_rank.tree.layout import View
from utilized_rank.tree.layout import common_atoms
from utilized_rank.tree.layout import pieces_of
from utilized_rank.walk.interpret import Walk
from utilized_rank.walk.rescaling import Rescaling
from utilized_rank.walk.values import Dense
from utilized_rank.walk.values import Loop
from utilized_rank.walk.values import Output
from utilized_rank.walk.values import Param
from utilized_rank.walk.values import UnsupportedError


@dataclasses.dataclass(frozen=True)
class Read:
  """A product's reading of an activation.

  Attributes:
    product: the product of the activation and the kernel.
    eqn: its equation.
    source: what two readings of one value share; three casts of one
      activation are one value.
    x: the activation.
  """

  product: Product
  eqn: Any
  source: Hashable
  x: Any

  @property
  def path(self) -> str:
    return self.product.view.path

  @property
  def key(self) -> Hashable:
    """What two readings of the same rows share."""
    return self.source, self.product.key

  def rows(self) -> jax.Array:
    """X, shape (*present groups, n, d)."""
    blocks = self.product.blocks(self.x.shape)  # a number
    parts = [self.product.features(self.x, i) for i in range(blocks)]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-2)

  def members(self, layout: Layout) -> tuple[int, ...]:
    """Which of the leaf's matrices are read, in the order of the rows.

    Args:
      layout: the leaf's.
    """
    mine = self.product.layout
    atoms = common_atoms(layout.shape, [layout.atoms, mine.atoms])
    assert atoms is not None, (layout, mine)
    pieces, fine = pieces_of(mine.atoms, atoms), mine.refine(atoms)
    at: dict[int, int] = {}
    for atom, index in self.product.view.taken:
      sizes = [atoms[p] for p in pieces[atom]]
      at.update(zip(pieces[atom], map(int, np.unravel_index(index, sizes))))
    numbers = np.arange(layout.num_groups).reshape(fine.sizes(fine.groups))
    flipped = {p for a in self.product.view.flipped for p in pieces[a]}
    along = lambda a: slice(None, None, -1 if a in flipped else 1)
    numbers = numbers[tuple(at.get(a, along(a)) for a in fine.groups)]
    return tuple(numbers.reshape(-1).tolist())


def read(
  jaxpr: Any,
  consts: list[Any],
  params: dict[str, Any],
  args: list[Any],
  kernels: Container[str],
  rescaling: Rescaling,
) -> tuple[list[Any], list[Read]]:
  """Runs a jaxpr and keeps what the products of some kernels read.

  Args:
    jaxpr: open jaxpr of the parameters' leaves and other arrays, written out
      by `flatten`.
    consts: values of its constants.
    params: its first operands by path.
    args: its other operands.
    kernels: paths of the kernels that are looked at.
    rescaling: what the whole function does to its parameters.

  Returns:
    The outputs, and the readings in the order of execution.

  Raises:
    UnsupportedError: such a product is inside a loop or branch, or its kernel
      is picked by an index that is computed.
  """
  reader = _Reader(kernels)
  walk = reader.top = Walk(reader, rescaling)
  values = [
    Param(View.of_leaf(path, leaf.shape, leaf.dtype), Dense(leaf))
    if path in kernels
    else leaf
    for path, leaf in params.items()
  ]
  outs = walk.run(jaxpr, consts, [*values, *args])
  return [walk.materialise(v, 'output') for v in outs], reader.reads


class _Reader:
  """Visitor that keeps what products read."""

  def __init__(self, kernels: Container[str]):
    self._kernels = kernels
    self.top: Walk | None = None
    self.reads: list[Read] = []

  def wants(self, view: View) -> bool:
    return view.path in self._kernels

  def dropped(self, view: View, reason: str) -> None:
    """What `find_sites` has told already."""

  def opaque(self, view: View, primitive: str) -> None:
    """What `find_sites` has told already."""

  def product(self, eqn, operands, which, walk):
    param, x = operands[which], operands[1 - which]
    out, found = describe.dense(eqn, operands, which)
    if isinstance(found, str):
      return out
    path = param.view.path
    picked = [by for _, by in param.view.taken if not isinstance(by, int)]
    if walk is not self.top or picked or operands[2:]:
      where = 'picked by a computed index'
      if operands[2:]:
        where = f'{eqn.primitive.name}, in which data say whose rows are whose'
      if walk is not self.top:
        where = 'inside a while loop, a branch or a shard_map'
      raise UnsupportedError(
        f'the product of {path!r} is {where}: its rows in two runs cannot be '
        f'told apart; leave {path!r} dense'
      )
    self.reads.append(Read(found, eqn, walk.origin(x), x))
    return out

  def biased(self, output: Output, bias: Param) -> bool:
    raise AssertionError('no outputs are followed when rows are read')

  def stacked(self, use: Any, loop: Loop, size: int, is_stacked: bool) -> Any:
    raise AssertionError('nothing is emitted when rows are read')


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PairSums:
  """Sums over rows x of one run and the rows xhat of another.

  Plain sums: those of two data sets add up.

  Attributes:
    count: n, number of rows.  # shape=(), dtype=int32
    total: sum x.  # shape=(g, d), dtype=float32
    total_hat: sum xhat.  # shape=(g, d), dtype=float32
    second_hat: sum xhat xhat^T.  # shape=(g, d, d), dtype=float32
    cross: sum xhat x^T.  # shape=(g, d, d), dtype=float32
  """

  count: Any
  total: Any
  total_hat: Any
  second_hat: Any
  cross: Any


def pair_sums(x: jax.Array, x_hat: jax.Array) -> PairSums:
  """Sums over pairs of rows.

  Args:
    x: (*groups, n, d), rows of one run.
    x_hat: the same rows of the other run.

  >>> sums = pair_sums(jnp.ones((3, 2)), jnp.full((3, 2), 2.0))
  >>> int(sums.count), sums.cross.tolist()
  (3, [[[6.0, 6.0], [6.0, 6.0]]])
  """
  flat = lambda v: v.reshape(-1, *v.shape[-2:])
  x, x_hat = flat(x), flat(x_hat)
  dtype = gram.accumulator_dtype(x.dtype)
  total_hat, second_hat = gram.gram(x_hat)
  cross = jnp.einsum(
    'gnd,gne->gde',
    x_hat.astype(dtype),
    x.astype(dtype),
    precision=jax.lax.Precision.HIGHEST,
  )
  return PairSums(
    jnp.int32(x.shape[1]),
    jnp.sum(x, axis=1, dtype=dtype),
    total_hat,
    second_hat,
    cross,
  )

"""A product of an activation and a kernel: what its axes mean.

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

from utilized_rank.products.factors import read_backwards
from utilized_rank.tree.layout import Atoms
from utilized_rank.tree.layout import Layout
from utilized_rank.tree.layout import View

# Label of an activation axis: the kernel atoms it runs along, or a row.
ROW = None
Label = Atoms | None


def one_block(shape: Sequence[int], *others: Any) -> int:
  """The number of blocks of what is read at once."""
  del shape, others
  return 1


def same_rows(rows: Any, block: Any) -> Any:
  """Rows of outputs that are those of the inputs already."""
  del block
  return rows


@dataclasses.dataclass(frozen=True)
class Product:
  """A product of an activation and a kernel.

  Attributes:
    kind: 'dot', 'conv' or 'ragged_dot'.
    view: the kernel as the product sees it, axes cut by role.
    layout: the role of each of the leaf's atoms.
    rows: `rows(x, i)` reads the i-th block of the other operand as an array
      whose axes have `labels`.
    labels: for each axis, the kernel atoms it runs along, or ROW.
    rows_shape: shape of the rows of all blocks.
    geometry: what else the rows depend on (a convolution's window).
    output: the product's output as a view over the kernel's atoms.
    factored: runs the product with factors instead; `once(make)` makes x A,
      or gives it back where it was made before. Operands but for the two come
      last.
    blocks: how many blocks the rows are read in, of an operand of this shape;
      it may have fewer examples than the product's own. `Tiles` where data
      say which rows are of which kernel; it reads operands but for the two.
    aligned: `aligned(responses, i)`: of all outputs' rows those that answer to
      the i-th block of the inputs', in its order.
  """

  kind: str
  view: View
  layout: Layout
  rows: Callable[[Any, Any], Any]
  labels: Sequence[Label]
  rows_shape: tuple[int, ...]
  geometry: Hashable
  output: View
  factored: Callable[..., Any]
  blocks: Callable[..., Any] = one_block
  aligned: Callable[[Any, Any], Any] = same_rows

  @property
  def present(self) -> Atoms:
    """Group atoms that are axes here, not taken by a loop or an index."""
    gone = {a for a, _ in self.view.taken}
    return tuple(a for a in self.layout.groups if a not in gone)

  @property
  def has_no_rank(self) -> bool:
    """Whether it is a number, or each of its groups has one input or output.

    Such are scales and depthwise convolutions. A dense layer of one feature is
    not: it is one matrix, of rank one.
    """
    groups = math.prod(self.layout.sizes(self.present))
    if self.layout.matrix_shape == (1, 1):
      return True
    return groups > 1 and self.layout.full_rank == 1

  @property
  def leading(self) -> Atoms:
    """Those of them that are axes of the other operand and of the output."""
    return self.present

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
    inputs = self.layout.inputs
    backwards = tuple(
      (self.layout.atoms[a], math.prod(self.layout.sizes(inputs[i + 1 :])))
      for i, a in enumerate(inputs)
      if a in self.view.flipped and self.layout.atoms[a] > 1
    )
    lead = self.layout.sizes(self.present)
    return (self.geometry, _runs(split, order), lead, backwards)

  def bound(self, others: Sequence[Any]) -> Product:
    """The product, told its operands but for the two."""
    if not others:
      return self
    blocks = lambda shape: self.blocks(shape, *others)
    return dataclasses.replace(self, blocks=blocks)

  @property
  def output_blocks(self) -> Callable[..., Any]:
    """How many blocks `responses` come in, as `blocks`."""
    return one_block

  def features(self, x: Any, block: Any = 0) -> Any:
    """The rows of X in one of its blocks, shape (*groups, n, d).

    Features are in the kernel's own order, whatever order the equation lists
    them in (`einsum('bshd,hde->bse')` contracts (d, h)) and whether or not it
    reads the kernel backwards. Groups are in the order of the view.
    """
    return self._matrices(self.rows(x, block), self.labels, self.layout.inputs)

  def responses(self, y: Any, block: Any = 0) -> Any:
    """An array like the product's output as (*groups, n, m)."""
    del block
    labels = [atoms or ROW for atoms in self.output.axes]
    return self._matrices(y, labels, self.layout.outputs)

  def paired(self, x: Any, y: Any, block: Any = 0) -> tuple[Any, Any]:
    """`features` of a block, and the responses to them row by row."""
    rows = self.aligned(self.responses(y, block), block)
    return self.features(x, block), rows

  def _matrices(self, array: Any, labels: Sequence[Label], atoms: Atoms):
    split, order = self._arrangement(array.shape, labels, atoms)
    lead = self.layout.sizes(self.leading)
    width = math.prod(self.layout.sizes(atoms))
    backwards = [i for i, a in zip(order[-1], atoms) if a in self.view.flipped]
    array = read_backwards(array.reshape(split), backwards)
    return array.transpose(sum(order, [])).reshape(*lead, -1, width)

  def in_leaf_order(self, array: Any) -> Any:
    """An array that leads with the present groups, from the view's order to
    the leaf's; the same the other way round."""
    present = self.present
    backwards = [i for i, a in enumerate(present) if a in self.view.flipped]
    return read_backwards(array, backwards)

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
      [where[a] for a in self.leading],
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
    out.append(
      tuple((math.prod(sizes[:a]), math.prod(sizes[a:b])) for a, b in runs)
    )
  return tuple(out)


def roles(view: View, inputs: Sequence[int], outputs: Sequence[int]):
  inputs, outputs = sorted(inputs), sorted(outputs)
  groups = sorted(set(range(len(view.atoms))) - set(inputs) - set(outputs))
  return Layout(
    view.shape, view.atoms, tuple(groups), tuple(inputs), tuple(outputs)
  )

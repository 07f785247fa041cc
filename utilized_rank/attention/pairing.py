"""How two kernels meet, head by head: in logits, or behind a sum over rows.

Two followed outputs in one product, over one atom of each, make logits. One
that a product sums over rows, its features untouched, and whose result a kernel
then contracts, makes values. Nothing is told from names or shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

from utilized_rank.attention import heads
from utilized_rank.attention import repeats
from utilized_rank.products import describe
from utilized_rank.products.product import Product
from utilized_rank.tree.layout import Atoms
from utilized_rank.tree.layout import Layout
from utilized_rank.tree.layout import View
from utilized_rank.tree.layout import common_atoms
from utilized_rank.tree.layout import pieces_of
from utilized_rank.tree.recut import is_long
from utilized_rank.walk import compat
from utilized_rank.walk.values import Loop
from utilized_rank.walk.values import Output
from utilized_rank.walk.values import Param


class NoPair(Exception):
  """Two values do not meet as a pair's kernels do; says why."""


@dataclasses.dataclass
class Projection:
  """One product with a kernel, and what became of its output."""

  product: Product
  bias: str | None = None
  scaled: bool = False
  end: str | None = None

  @property
  def path(self) -> str:
    return self.product.view.path

  @property
  def leaf(self) -> tuple[int, ...]:
    """Shape of the kernel's leaf."""
    return self.product.view.shape


@dataclasses.dataclass(frozen=True)
class Candidate:
  """Two products that make a pair, as far as the flow of data tells."""

  kind: str
  sides: tuple[heads.Side, heads.Side]
  projections: tuple[Projection, Projection]

  def pair(self) -> heads.HeadPair:
    """The pair, with the biases that were found in the end."""
    left, right = (
      dataclasses.replace(side, bias=projection.bias)
      for side, projection in zip(self.sides, self.projections, strict=True)
    )
    return heads.HeadPair(self.kind, left, right)


@dataclasses.dataclass(frozen=True)
class Mixed:
  """A kernel's output, summed over rows.

  All its axes, rows too, are atoms of the value's view: what reads it may
  merge heads with rows. `labels` has for each of the first `atoms` the
  kernel's atom, None for rows; `view` is the kernel's output before the sum.
  """

  projection: Projection
  view: View
  head: int
  shared: Atoms
  labels: tuple[int | None, ...]
  atoms: tuple[int, ...]


def _dims(eqn: Any, which: int):
  """((contracted, batch) of one operand, those of the other)."""
  contract, batch = eqn.params['dimension_numbers']
  return (contract[which], batch[which]), (
    contract[1 - which],
    batch[1 - which],
  )


def _named(view: View, axis: int) -> list[int]:
  """The atoms along an axis, repeats too; none along rows."""
  return [a for a in view.axes[axis] if is_long(view.atoms[a])]


def _own(output: Output, axes: Sequence[int]) -> list[int]:
  """The kernel's atoms along some axes, without repeats."""
  count = repeats.own_atoms(output.view, output.use.leaf)
  return [a for i in axes for a in _named(output.view, i) if a < count]


def _free(view: View, *used: Sequence[int]) -> list[int]:
  gone = {i for axes in used for i in axes}
  return [i for i in range(len(view.axes)) if i not in gone]


def feature_axes(output: Output) -> set[int]:
  """Axes of an output along which a head's features lie.

  Which of the kernel's output axes are features is known behind a sum alone:
  before it, all of them count.
  """
  view, use = output.view, output.use
  if not isinstance(use, Mixed):
    return {i for i in range(len(view.axes)) if _own(output, [i])}
  pieces = pieces_of(use.atoms, view.atoms)
  named = zip(use.labels, pieces, strict=True)
  features = {p for name, parts in named if name == use.head for p in parts}
  return {i for i, atoms in enumerate(view.axes) if features & set(atoms)}


def _layout(projection: Projection, view: View) -> Layout:
  count = repeats.own_atoms(view, projection.leaf)
  return projection.product.layout.refine(view.atoms[:count])


def _loops(layout: Layout, view: View, shared: Sequence[int]) -> list[Loop]:
  """What runs over the kernel's groups, other than heads."""
  taken = dict(view.taken)
  tokens = []
  for group in layout.groups:
    if group in shared or layout.atoms[group] == 1:
      continue
    by = taken.get(group)
    if not isinstance(by, Loop):
      raise NoPair('is of one of several kernels that its leaf holds')
    tokens.append(by)
  return tokens


def _alike(
  one: Output, two: Output, places: Sequence[tuple[int, int]]
) -> tuple[Output, Output]:
  """The outputs, axes of heads of which one is repeated being cut alike."""
  for i, j in places:
    axes = _named(one.view, i), _named(two.view, j)
    sizes = [
      [v.view.atoms[a] for a in n]
      for v, n in zip((one, two), axes, strict=True)
    ]
    if not all(axes) or sizes[0] == sizes[1]:
      continue
    size = one.view.sizes[i]
    cut = common_atoms((size,), sizes)
    if cut is None or (_own(one, [i]), _own(two, [j])) == axes:
      raise NoPair(f'has heads in {sizes[0]}, its partner in {sizes[1]}')
    one, two = _recut(one, i, cut), _recut(two, j, cut)
  return one, two


def _recut(output: Output, axis: int, cut: Sequence[int]) -> Output:
  sizes = output.view.sizes
  finer = output.view.reshape((*sizes[:axis], *cut, *sizes[axis + 1 :]))
  assert finer is not None  # the cut is one of its own atoms
  view = finer.reshape(sizes)
  assert view is not None
  return dataclasses.replace(output, view=view)


def logits(eqn: Any, one: Output, two: Output) -> Candidate:
  """Two outputs, contracted over one atom of each."""
  (c1, b1), (c2, b2) = _dims(eqn, 0)
  met = (
    [_named(one.view, i) for i in c1],
    [_named(two.view, i) for i in c2],
  )
  if any(isinstance(v.use, Mixed) for v in (one, two)) or not all(
    len(names) == 1 and len(names[0]) == 1 and _own(output, axes) == names[0]
    for output, axes, names in zip((one, two), (c1, c2), met, strict=True)
  ):
    raise NoPair(
      "meets another kernel's output otherwise than over one axis of heads"
    )
  one, two = _alike(one, two, list(zip(b1, b2, strict=True)))
  met = [_named(one.view, i) for i in c1], [_named(two.view, i) for i in c2]
  shared: list[tuple[int, int]] = []
  many: tuple[list[int], list[int]] = [], []
  for places in zip(b1, b2, strict=True):
    own = _own(one, places[:1]), _own(two, places[1:])
    names = _named(one.view, places[0]), _named(two.view, places[1])
    if not (names[0] and names[1]):
      for m, n in zip(many, own, strict=True):
        m += n
      continue
    for pair in zip(*names, strict=True):
      counts = [a in mine for a, mine in zip(pair, own, strict=True)]
      if all(counts):
        shared.append(pair)
      for k in (0, 1):
        # A repeated key is one key that several queries meet.
        if counts[k] and not counts[1 - k]:
          many[k].append(pair[k])
  sides, loops = [], []
  for k, (output, used) in enumerate(((one, (c1, b1)), (two, (c2, b2)))):
    view, use = output.view, output.use
    layout = _layout(use, view)
    for i in _free(view, *used):
      many[k].extend(_own(output, [i]))
    if set(many[k]) & set(layout.groups):
      raise NoPair('is of several kernels that meet one of the other leaf')
    mine = tuple(pair[k] for pair in shared)
    loops.append(_loops(layout, view, mine))
    (head,) = met[k][0]
    sides.append(heads.Side(use.path, layout, head, mine, tuple(many[k]), None))
  if loops[0] != loops[1]:
    raise NoPair('is made in another loop than that of its partner')
  return Candidate(heads.LOGITS, (sides[0], sides[1]), (one.use, two.use))


def summed(eqn, plain: list[Any], output: Output, which: int) -> list[Any]:
  """An output summed over rows, its features left alone."""
  (contract, batch), (other_contract, other_batch) = _dims(eqn, which)
  view, use = output.view, output.use
  if isinstance(use, Mixed):
    raise NoPair('meets a second sum over rows')
  if not contract or _own(output, contract):
    raise NoPair(
      "is contracted over its features with what is no kernel's output, nor "
      'one behind layout, bias and scale alone'
    )
  free = _free(view, contract, batch)
  features = _own(output, free)
  if len(features) != 1:
    raise NoPair(f'has {len(features)} axes of features in a sum over rows')
  shared = tuple(_own(output, batch))
  _loops(_layout(use, view), view, shared)  # or it is refused
  (result,) = compat.bind(eqn, plain)
  used = {*other_contract, *other_batch}
  rows = len(eqn.invars[1 - which].aval.shape) - len(used)
  axes = [_named(view, i) for i in batch]
  mine = [_named(view, i) for i in free]
  others: list[list[int]] = [[]] * rows
  axes += mine + others if which == 0 else others + mine
  labels: list[int | None] = []
  atoms: list[int] = []
  kept = {*features, *shared}
  for names, size in zip(axes, result.shape, strict=True):
    labels += [a if a in kept else None for a in names] or [None]
    atoms += [view.atoms[a] for a in names] or [size]
  whole = View.of_leaf(use.path, result.shape, result.dtype, atoms)
  state = Mixed(use, view, features[0], shared, tuple(labels), tuple(atoms))
  return [Output(whole, result, state)]


def contracted(
  eqn: Any, output: Output, kernel: Param, which: int
) -> Callable[[Projection], Candidate]:
  """A summed output as the rows of a kernel; makes the pair of the two."""
  (contract, _), (kernel_contract, kernel_batch) = _dims(eqn, which)
  mixed, view = output.use, output.view
  if any(kernel.view.axes[i] for i in kernel_batch):
    raise NoPair(f'meets {kernel.view.path!r} over its heads one by one')
  # Every piece that an atom of the sum is now in, and what it is a piece of.
  label: dict[int, int | None] = {}
  for name, pieces in zip(
    mixed.labels, pieces_of(mixed.atoms, view.atoms), strict=True
  ):
    real = [p for p in pieces if is_long(view.atoms[p])]
    if name is not None and len(real) != 1:
      raise NoPair('has its heads cut otherwise when it meets the next kernel')
    label.update(dict.fromkeys(real, name))
  names: list[int | None] = []
  sizes: list[int] = []
  at = dict(zip(kernel_contract, contract, strict=True))
  for axis, size in enumerate(kernel.view.sizes):
    parts = _named(view, at[axis]) if axis in at else []
    names += [label[a] for a in parts] or [None]
    sizes += [view.atoms[a] for a in parts] or [size]
  wanted = {mixed.head, *mixed.shared}
  if not wanted <= set(names):
    raise NoPair(f'does not meet {kernel.view.path!r} with all of its heads')
  cut = kernel.view.reshape(sizes)
  if cut is None:
    raise NoPair(f'meets {kernel.view.path!r}, whose axes cut its heads')
  rows = [a for i in kernel_contract for a in kernel.view.axes[i]]
  found: dict[int, int] = {}
  many: list[int] = []
  inputs = {p for a in rows for p in pieces_of(kernel.view.atoms, cut.atoms)[a]}
  for axis, name in enumerate(names):
    atoms = _named(cut, axis)
    if name is None:
      many += [a for a in atoms if a in inputs]
    elif len(atoms) != 1:
      raise NoPair(f'meets {kernel.view.path!r}, whose axes cut its heads')
    else:
      found[name] = atoms[0]
  shared = tuple(found[a] for a in mixed.shared)
  source = _layout(mixed.projection, mixed.view)
  loops = _loops(source, mixed.view, mixed.shared)

  described = describe.describe(eqn, kernel.view, 1 - which)
  if isinstance(described, str):
    raise NoPair(f'meets {kernel.view.path!r}: {described}')
  layout = described.layout.refine(cut.atoms)
  if _loops(layout, cut, ()) != loops:
    raise NoPair('is made in another loop than that of its partner')
  left = heads.Side(
    mixed.projection.path, source, mixed.head, mixed.shared, (), None
  )
  right = heads.Side(
    kernel.view.path, layout, found[mixed.head], shared, tuple(many), None
  )
  return lambda sink: Candidate(
    heads.VALUES, (left, right), (mixed.projection, sink)
  )

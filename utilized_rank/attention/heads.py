"""Pairs of attention's kernels that act together, head by head.

Names: a head has e features (its *width*). Query and key kernels meet in
logits, which depend on W_q W_k^T alone; value and output kernels in the output,
which depends on W_v W_o alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
import dataclasses
import math

from utilized_rank.host.columns import aligned
from utilized_rank.tree import paths
from utilized_rank.tree.layout import Atoms
from utilized_rank.tree.layout import Layout

LOGITS, VALUES = 'query-key', 'value-output'


@dataclasses.dataclass(frozen=True)
class Side:
  """One kernel of a pair, and what its atoms mean there.

  Attributes:
    path: the leaf's path.
    layout: the role of each atom in the kernel's product.
    head: the atom along which a head's features lie.
    shared: atoms that tell heads apart, in the partner's order.
    many: atoms that tell apart the heads which meet one head of the partner:
      queries in groups that share a key.
    bias: path of the leaf that is added to the kernel's product and to nothing
      else, or None.
  """

  path: str
  layout: Layout
  head: int
  shared: Atoms
  many: Atoms
  bias: str | None

  @property
  def loops(self) -> Atoms:
    """Groups that a loop runs over; the others tell heads apart."""
    gone = (*self.shared, *self.many)
    return tuple(g for g in self.layout.groups if g not in gone)

  @property
  def width(self) -> int:
    return self.layout.atoms[self.head]

  @property
  def num_params(self) -> int:
    return math.prod(self.layout.shape)

  @property
  def rows(self) -> int:
    """Rows of the matrix (rows, e) that the kernel is in each head."""
    is_output = self.head in self.layout.inputs
    layout, apart = self.layout, (*self.shared, *self.many, self.head)
    own = layout.outputs if is_output else layout.inputs
    own = tuple(a for a in own if a not in apart)
    rows = math.prod(layout.sizes(own))
    has_bias = self.bias is not None and not is_output
    return (rows + has_bias) * math.prod(layout.sizes(self.many))


@dataclasses.dataclass(frozen=True)
class HeadPair:
  """Two kernels whose product is all that counts, head by head.

  Attributes:
    kind: 'query-key' or 'value-output'.
    left: the query or value kernel. Of query and key either may be called the
      left one; it is the one that the function computes first.
    right: the key or output kernel.
  """

  kind: str
  left: Side
  right: Side

  @property
  def width(self) -> int:
    """e, features of a head."""
    return self.left.width

  @property
  def full_rank(self) -> int:
    """The rank at which the function is what it was."""
    return min(self.width, self.left.rows, self.right.rows)

  @property
  def cost(self) -> int:
    """Parameters of both kernels for each feature that heads keep."""
    return (self.left.num_params + self.right.num_params) // self.width


class Attention(Mapping[str, HeadPair]):
  """Pairs by the path of their left kernel; `print` explains every kernel.

  Attributes:
    unseen: for every other kernel, why it is in no pair.
  """

  def __init__(self, pairs: dict[str, HeadPair], unseen: dict[str, str]):
    self._pairs = pairs
    self.unseen = unseen

  def __getitem__(self, path: str) -> HeadPair:
    if path in self._pairs:
      return self._pairs[path]
    for left, pair in self._pairs.items():
      if path == pair.right.path:
        raise KeyError(f'the pair of {path!r} has the name {left!r}')
    if path in self.unseen:
      raise KeyError(f'{path!r} is in no pair: {self.unseen[path]}')
    raise KeyError('no kernel ' + paths.unknown(path, self._pairs))

  def __iter__(self) -> Iterator[str]:
    return iter(self._pairs)

  def __len__(self) -> int:
    return len(self._pairs)

  def __str__(self) -> str:
    rows = [('kernel', 'shape', 'heads', 'width', 'notes')]
    for pair in self._pairs.values():
      first, second = pair.kind.split('-')
      for side, role, other in (
        (pair.left, first, pair.right),
        (pair.right, second, pair.left),
      ):
        heads = math.prod(side.layout.sizes(side.shared + side.many))
        rows.append(
          (
            side.path,
            '×'.join(map(str, side.layout.shape)),
            str(heads),
            str(side.width),
            f'{role}, with {other.path}',
          )
        )
    rows += [(p, '', '', '', f'- {why}') for p, why in self.unseen.items()]
    lines = aligned(rows)
    paired = 2 * len(self)
    lines.append(f'{paired} of {paired + len(self.unseen)} kernels in pairs')
    return '\n'.join(lines)

"""Hidden layers: units between kernels, and all that a unit is made of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
import dataclasses
import math

from utilized_rank.host.columns import aligned
from utilized_rank.tree import paths
from utilized_rank.tree.layout import Layout
from utilized_rank.tree.layout import pieces_of


@dataclasses.dataclass(frozen=True)
class Units:
  """Where the units of a hidden layer are in one leaf.

  Attributes:
    path: the leaf's.
    axis: of the leaf, one index for each unit.
    stack: axis of the leaf along which a loop runs, each step having units of
      its own; None where there is none.
  """

  path: str
  axis: int
  stack: int | None = None


@dataclasses.dataclass(frozen=True)
class UnitKernel(Units):
  """A kernel that makes the units, or the one that reads them.

  Attributes:
    layout: how the leaf is read as matrices.
  """

  layout: Layout = dataclasses.field(kw_only=True)

  @property
  def atom(self) -> int:
    """The atom of the layout that the units' axis is."""
    return axis_atom(self.layout, self.axis)


@dataclasses.dataclass(frozen=True)
class HiddenLayer:
  """Units that kernels make, and one kernel reads, each by itself between.

  Attributes:
    firsts: kernels with an output for each unit: one, or two of a gated layer.
    second: the kernel with an input for each unit.
    vectors: leaves with a number for each unit: biases, and scales, shifts and
      statistics of a norm.
    resizes: whether the function takes the number of units from the leaves.
  """

  firsts: tuple[UnitKernel, ...]
  second: UnitKernel
  vectors: tuple[Units, ...] = ()
  resizes: bool = False

  @property
  def kernels(self) -> tuple[UnitKernel, ...]:
    return (*self.firsts, self.second)

  @property
  def name(self) -> str:
    """Path of the first kernel."""
    return self.firsts[0].path

  @property
  def width(self) -> int:
    """Number of units."""
    return self.second.layout.shape[self.second.axis]

  @property
  def cost(self) -> int:
    """Numbers in the kernels for each unit, of all members of a stack."""
    return sum(math.prod(k.layout.shape) for k in self.kernels) // self.width


class Hidden(Mapping[str, HiddenLayer]):
  """Hidden layers by the path of their first kernel; `print` explains all.

  Attributes:
    unseen: for every kernel that makes no units of these, why.
  """

  def __init__(self, layers: Mapping[str, HiddenLayer], unseen: dict[str, str]):
    self._layers = dict(layers)
    self.unseen = unseen

  def __getitem__(self, path: str) -> HiddenLayer:
    if path in self._layers:
      return self._layers[path]
    if path in self.unseen:
      raise KeyError(f'{path!r} makes no hidden layer: {self.unseen[path]}')
    raise KeyError('no hidden layer ' + paths.unknown(path, self._layers))

  def __iter__(self) -> Iterator[str]:
    return iter(self._layers)

  def __len__(self) -> int:
    return len(self._layers)

  def only(self, names: Iterable[str]) -> Hidden:
    """The same for some of the layers."""
    wanted = set(names)
    kept = {name: self._layers[name] for name in self if name in wanted}
    return Hidden(kept, self.unseen)

  def fixed(self) -> Hidden:
    """The same, as if every width were the function's own."""
    of = lambda layer: dataclasses.replace(layer, resizes=False)
    return Hidden({k: of(v) for k, v in self._layers.items()}, self.unseen)

  def apart(self) -> Hidden:
    """Layers that share no kernel, larger ones first taken.

    What a unit costs is one number only where the other side of its kernels
    stays as wide as it is.
    """
    taken: set[str] = set()
    kept = []
    size = lambda name: -self[name].cost * self[name].width
    for name in sorted(self, key=size):
      mine = {kernel.path for kernel in self[name].kernels}
      if not mine & taken:
        taken |= mine
        kept.append(name)
    return self.only(kept)

  def __str__(self) -> str:
    rows = [('kernel', 'shape', 'units', 'notes')]
    for layer in self.values():
      for kernel in layer.kernels:
        rows.append(
          (
            kernel.path,
            '×'.join(map(str, kernel.layout.shape)),
            str(layer.width),
            _note(layer, kernel),
          )
        )
    rows += [(p, '', '', f'- {why}') for p, why in self.unseen.items()]
    lines = aligned(rows)
    lines.append(f'{len(self)} hidden layers')
    return '\n'.join(lines)


def _note(layer: HiddenLayer, kernel: UnitKernel) -> str:
  if kernel is layer.second:
    return f'reads those of {layer.name}'
  if kernel is not layer.firsts[0]:
    return f'makes them too, with {layer.name}'
  notes = [f'makes units for {layer.second.path}']
  if layer.vectors:
    notes.append('with ' + ', '.join(v.path for v in layer.vectors))
  notes.append('narrower' if layer.resizes else 'the width is fixed')
  return '; '.join(notes)


def axis_atom(layout: Layout, axis: int) -> int:
  """The long atom that an axis of the leaf is.

  >>> axis_atom(Layout.of((4, 3), inputs=(0,), outputs=(1,)), 1)
  1
  """
  pieces = pieces_of(layout.shape, layout.atoms)[axis]
  long = [a for a in pieces if layout.atoms[a] > 1]
  assert len(long) == 1, (layout, axis)
  return long[0]

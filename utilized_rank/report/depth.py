"""Where layers stand along a model, and which are counterparts, from paths."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
import dataclasses
import itertools
import re
from typing import Any, Protocol

from utilized_rank.report.layer import LayerReport

OTHERS = 'other layers'
ALL = 'all layers'
# As many as there are colours that a reader tells apart.
MAX_KINDS = 8

# A number in a layer's own name takes few values when it tells kinds apart
# (Dense_0, Dense_1) and many when it counts depth (conv_0 .. conv_12).
_MAX_SIBLINGS = 4
_DIGITS = re.compile(r'(\d+)')


@dataclasses.dataclass(frozen=True)
class Place:
  """Where a layer goes in the figures.

  Attributes:
    kind: what the layer shares with its counterparts in other blocks: its
      path without the numbers that count depth.
    x: position along the model, in columns (blocks, or layers that stand
      alone); members of one stack are spread inside their column.
  """

  kind: str
  x: float


@dataclasses.dataclass(frozen=True)
class Arrangement:
  """Places of all layers, and names for the columns they stand in."""

  places: tuple[Place, ...]
  ticks: tuple[str, ...]
  axis: str

  @property
  def kinds(self) -> tuple[str, ...]:
    """Every kind once, in model order, the pooled one last."""
    names = dict.fromkeys(place.kind for place in self.places)
    return tuple(sorted(names, key=lambda kind: kind == OTHERS))


def shared_ends(paths: Iterable[str]) -> tuple[int, int]:
  """Leading and trailing parts that all paths have and need not be shown.

  Args:
    paths: leaf paths, parts joined by `/`.

  Returns:
    The number of parts to drop at the front and at the back; at least one
    part of every path remains.

  >>> shared_ends(['params/a/kernel', 'params/b/kernel'])
  (1, 1)
  """
  split = [path.split('/') for path in dict.fromkeys(paths)]
  if len(split) < 2:
    return 0, 0
  room = min(map(len, split)) - 1

  def agree(column: tuple[str, ...]) -> bool:
    return len(set(column)) == 1

  front = len(list(itertools.takewhile(agree, zip(*split, strict=False))))
  front = min(front, room)
  reverse = zip(*(parts[::-1] for parts in split), strict=False)
  back = len(list(itertools.takewhile(agree, reverse)))
  return front, min(back, room - front)


class Named(Protocol):
  """Something of one leaf; `name` goes on behind the leaf's path."""

  @property
  def path(self) -> str: ...
  @property
  def name(self) -> str: ...


def relative_names(layers: Sequence[Named]) -> tuple[str, str, list[str]]:
  """What all paths share at both ends, and what is left of each name."""
  front, back = shared_ends(layer.path for layer in layers)
  parts = layers[0].path.split('/')
  prefix = ''.join(part + '/' for part in parts[:front])
  suffix = ''.join('/' + part for part in parts[len(parts) - back :])
  return prefix, suffix, [
    '/'.join(layer.path.split('/')[front : len(layer.path.split('/')) - back])
    + layer.name[len(layer.path) :]
    for layer in layers
  ]  # fmt: skip


def arrange(layers: Sequence[LayerReport]) -> Arrangement:
  """Reads depth and kind of each layer from the numbers in its path.

  Paths that differ in their numbers alone are counterparts. Of the numbers
  that vary among them the outer ones count depth, and one in the layer's own
  name (`block_3/Dense_1`) tells kinds apart; where it is the only one that
  varies (`Dense_0`, `Dense_1`, ...) it counts depth. A stack's index counts
  depth where the path does not. Kinds with one member, and those beyond the
  eight largest, are pooled.

  Args:
    layers: the layers in model order; blocks that arrive in alphabetical
      order (10 before 2) are put right.

  Raises:
    ValueError: there is no layer.
  """
  if not layers:
    raise ValueError('no layers: a figure needs at least one LayerReport')
  front, back = shared_ends(layer.path for layer in layers)
  # Mixed leaf names (kernel, w): the layer's own name is the part before.
  own_name = max(2, back + 1)
  pieces = {layer.path: _DIGITS.split(layer.path) for layer in layers}
  values: dict[tuple[str, ...], list[set[str]]] = {}
  for piece in pieces.values():
    seen = values.setdefault(tuple(piece[::2]), [set() for _ in piece[1::2]])
    for value, number in zip(seen, piece[1::2], strict=True):
      value.add(number)

  stacks: dict[str, list[tuple[int, ...]]] = {}
  for layer in layers:
    stacks.setdefault(layer.path, []).append(layer.index)

  kinds, columns = [], []
  for layer in layers:
    piece = pieces[layer.path]
    vary = values[tuple(piece[::2])]
    numbers = [i for i, value in enumerate(vary) if len(value) > 1]
    if numbers and (len(numbers) > 1 or layer.index):
      after = ''.join(piece[2 * numbers[-1] + 2 :]).count('/')
      few = len(vary[numbers[-1]]) <= _MAX_SIBLINGS
      # In a stack a lone number may be the block's, `block_0/moe/wi[3]`.
      if after < (own_name if len(numbers) > 1 else 2) and few:
        numbers = numbers[:-1]
    at = [2 * i + 1 for i in numbers]
    blank = [('#' if i in at else text) for i, text in enumerate(piece)]
    parts = ''.join(blank).split('/')
    kinds.append('/'.join(parts[front : len(parts) - back]))
    if numbers:
      family = ''.join(blank[: at[-1] + 1])
      columns.append((family, tuple(int(piece[i]) for i in at), layer.index))
    elif layer.index:
      # Stacks of one shape run side by side: they are one scan's leaves.
      same = str(sorted(set(stacks[layer.path])))
      columns.append((same, layer.index[:1], layer.index[1:]))
    else:
      columns.append((layer.path, (), ()))

  kinds = _pool(kinds)
  order = _numeric_order(dict.fromkeys(column[:2] for column in columns))
  inner: dict[Any, list[tuple[int, ...]]] = {}
  for family, numbers_, rest in columns:
    group = inner.setdefault((family, numbers_), [])
    if rest not in group:
      group.append(rest)
  places = []
  for kind, (family, numbers_, rest) in zip(kinds, columns, strict=True):
    group = inner[family, numbers_]
    spread = 0.7 * group.index(rest) / len(group)
    places.append(Place(kind, order[family, numbers_] + spread))
  return Arrangement(tuple(places), *_ticks(list(order), front, back))


def _pool(kinds: list[str]) -> list[str]:
  """Short names for the kinds; the small ones become `OTHERS` or `ALL`."""
  counts = {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}
  if len(counts) == 1:
    keep = set(counts)
  else:
    large = [kind for kind, count in counts.items() if count > 1]
    large.sort(key=lambda kind: -counts[kind])
    keep = set(large[: MAX_KINDS if len(large) <= MAX_KINDS else MAX_KINDS - 1])
  rest = OTHERS if keep else ALL
  short = _short_names([kind for kind in counts if kind in keep])
  return [short.get(kind, rest) for kind in kinds]


def _short_names(kinds: Sequence[str]) -> dict[str, str]:
  """The shortest ends of the paths, without `#`, that tell kinds apart."""

  def end(kind: str, parts: int) -> str:
    chosen = '/'.join(kind.split('/')[-parts:])
    chosen = re.sub(r'[_.\-]?#', '', chosen)
    return re.sub(r'/+', '/', chosen).strip('/')

  result = {}
  for kind in kinds:
    for parts in range(1, kind.count('/') + 2):
      name = end(kind, parts)
      has_letter = re.search(r'[^\W\d_]', name)
      if has_letter and all(end(k, parts) != name for k in kinds if k != kind):
        break
    else:
      name = kind
    result[kind] = name
  return result


def _numeric_order(columns: Iterable[Any]) -> dict[Any, int]:
  """Columns to positions, each family's members in order of their numbers."""
  columns = list(columns)
  queues: dict[str, list[Any]] = {}
  for column in columns:
    queues.setdefault(column[0], []).append(column)
  for queue in queues.values():
    queue.sort(key=lambda column: column[1], reverse=True)
  return {queues[family].pop(): i for i, (family, _) in enumerate(columns)}


def _ticks(
  columns: Sequence[Any], front: int, back: int
) -> tuple[tuple[str, ...], str]:
  """Tick labels of the columns, and the name of the axis."""
  families = [family for family, numbers in columns if numbers]
  one = len(set(families)) == 1
  alone = len(columns) - len(families)
  if alone > 12 and alone > len(families):
    return tuple(str(i) for i in range(len(columns))), 'layer in model order'
  labels = []
  for family, numbers in columns:
    if not numbers:
      parts = family.split('/')
      # Layers that stand alone are named without the shared leaf name.
      labels.append('/'.join(parts[front : len(parts) - back][-1:]))
    elif one or not family.endswith('#'):
      labels.append('.'.join(map(str, numbers)))
    else:
      stem = re.sub(r'[_.\-/]?#$', '', family).replace('#', '')
      labels.append(stem.rsplit('/', 1)[-1] + f' {".".join(map(str, numbers))}')
  axis = 'depth' if families else 'layer in model order'
  if one and families[0].endswith('#'):
    stem = re.sub(r'[_.\-/]?#', '', families[0]).rsplit('/', 1)[-1]
    axis = stem or axis
  return tuple(labels), axis

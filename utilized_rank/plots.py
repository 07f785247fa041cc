"""Figures of a utilization report: by depth, spectra, accuracy by size.

Every function returns a `matplotlib.figure.Figure` made without pyplot: no
window, no display and no global state, so they work in a headless job, in a
thread and in a notebook. matplotlib is imported when a figure is asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import itertools
import re
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure
  from matplotlib.figure import FigureBase

  from utilized_rank.report import LayerReport

# The page in render.py swaps these for its own light and dark colours.
INK = '#1f2933'
MUTED = '#6b7784'
GRID = '#dde2e7'

# Mid-tones: they keep their contrast on a white and on a near-black page.
KIND_COLORS = (
  '#3f7fd0', '#e07b2e', '#3a9d6b', '#c956a0',
  '#8266d1', '#1f9db3', '#b8901f', '#d9534f',
)  # fmt: skip
KIND_MARKERS = 'os^Dv*XP'
DEPTH_COLORS = ('#2f86d6', '#8a6fd8', '#d65f8a', '#e8833a')

OTHERS = 'other layers'
ALL = 'all layers'

_MAX_KINDS = len(KIND_COLORS)
_MAX_TICKS = 26
_MAX_LABEL = 20
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


def utilization_by_depth(
  layers: Sequence[LayerReport], sides: bool = False
) -> Figure:
  """Utilization r / min(d, m) of every layer along the model, by kind.

  Args:
    layers: the layers in model order.
    sides: show faintly the two ratios behind it too, k_S/d dotted and k_T/m
      dashed.

  Raises:
    ValueError: there is no layer.

  >>> utilization_by_depth(report.layers).savefig('depth.png')  # doctest: +SKIP
  """
  plan = arrange(layers)
  figure = _figure(5.8, 3.5)
  axes = figure.subplots()
  _style(axes)
  mean = float(np.mean([layer.utilization for layer in layers]))
  top = max(layer.utilization for layer in layers)
  for number, kind in enumerate(plan.kinds):
    color, marker = _kind_style(number, kind)
    # A line joins counterparts; pooled layers have nothing in common.
    line = 'none' if kind in (OTHERS, ALL) else '-'
    points = _points(layers, plan, kind)
    x = [place.x for place, _ in points]
    y = [layer.utilization for _, layer in points]
    look: dict[str, Any] = dict(
      color=color, marker=marker, markeredgewidth=0, zorder=3,
      markersize=5 if len(layers) <= 60 else 3.5,
    )  # fmt: skip
    middle = _column_means(x, y)
    if line == '-' and len(middle) < len(x):
      # Members of a stack have no order: points, and a line of their means.
      axes.plot(x, y, linestyle='none', **look)
      axes.plot(*zip(*middle, strict=True), color=color, linewidth=1.6)
      line = 'none'
      axes.plot([], [], color=color, label=_label(kind), marker=marker)
    else:
      axes.plot(
        x, y, linestyle=line, linewidth=1.6, label=_label(kind), **look
      )
    if sides:
      for ratio, dashes in (
        ([layer.k_in / layer.d_in for _, layer in points], (0, (1, 1.5))),
        ([layer.k_out / layer.d_out for _, layer in points], (0, (4, 2))),
      ):
        top = max(top, *ratio)
        axes.plot(
          x, ratio, color=color, alpha=0.4, linewidth=1.2, markersize=3,
          linestyle=dashes if line == '-' else 'none',
          marker='' if line == '-' else marker,
        )  # fmt: skip
  axes.axhline(
    mean, color=MUTED, linewidth=1, linestyle=(0, (5, 3)),
    label=f'mean {mean:.1%}',
  )  # fmt: skip
  if sides:
    for dashes, label in (((0, (1, 1.5)), '$k_S/d$'), ((0, (4, 2)), '$k_T/m$')):
      axes.plot([], [], color=MUTED, linestyle=dashes, label=label)
  axes.set_ylim(0, min(1.04, max(0.1, 1.15 * top)))
  axes.yaxis.set_major_formatter(lambda value, _: f'{value:.0%}')
  axes.set_ylabel('layer utilization')
  axes.set_xlabel(_label(plan.axis))
  _column_ticks(axes, plan)
  _legend(figure, axes)
  return figure


def spectra(layers: Sequence[LayerReport], energy: float) -> Figure:
  """Energy that k directions leave out, for inputs and outputs, by kind.

  Each curve is `1 - energy(k)` of one layer on a logarithmic axis against
  k/d (inputs, S) or k/m (outputs, T); where it crosses the dashed line at
  `1 - energy` lies the share of directions that the layer uses. Colour runs
  with depth.

  Args:
    layers: the layers in model order.
    energy: share of the energy kept, in (0, 1]; at 1 no line is drawn.

  Raises:
    ValueError: there is no layer, or the energy is outside (0, 1].
  """
  plan = arrange(layers)
  kinds = plan.kinds
  across = min(len(kinds), 2 if len(kinds) <= 4 else 3)
  down = -(-len(kinds) // across)
  height = 2.1 * down
  figure = _figure(max(5.4, 3.6 * across), height + 0.35)
  key, body = figure.subfigures(
    2, 1, squeeze=False, height_ratios=[0.35, height]
  )[:, 0]
  _spectra_key(key, energy, several=len(layers) > 1)
  grid = body.subfigures(down, across, squeeze=False, wspace=0.02).flat
  for part, kind in zip(grid, kinds, strict=False):
    _spectra_pair(part, layers, plan, kind, energy)
  return figure


def spectra_by_kind(
  layers: Sequence[LayerReport], energy: float
) -> dict[str, Figure]:
  """The panels of `spectra`, one small figure per kind.

  For pages that arrange panels to their width. Colours and axes are those of
  the whole model, so that the figures compare.

  Args:
    layers: the layers in model order.
    energy: share of the energy kept, in (0, 1].

  Returns:
    Kind to figure, in model order.

  Raises:
    ValueError: there is no layer, or the energy is outside (0, 1].
  """
  plan = arrange(layers)
  figures = {}
  for kind in plan.kinds:
    figures[kind] = _figure(4.0, 2.35)
    _spectra_pair(figures[kind], layers, plan, kind, energy)
  return figures


def accuracy_by_size(runs: Sequence[Mapping[str, Any]]) -> Figure:
  """Test accuracy against parameters, before and after fine-tuning.

  Args:
    runs: the dense model first, then the compressed ones. Keys: `params`
      (whole model), `params_fraction`, `test_accuracy` (share in [0, 1]),
      `test_accuracy_before_finetune` (or None); `method` where several are
      compared.

  Raises:
    ValueError: there is no run.
  """
  if not runs:
    raise ValueError('no runs: a figure needs at least the dense model')
  figure = _figure(5.8, 3.5)
  axes = figure.subplots()
  _style(axes)
  dense, *small = runs
  methods = list(dict.fromkeys(run.get('method') or '' for run in small))
  for number, method in enumerate(methods):
    color = KIND_COLORS[number % _MAX_KINDS]
    chosen = [r for r in small if (r.get('method') or '') == method]
    name = f', {method}' if len(methods) > 1 and method else ''
    for key, label, style, face in (
      ('test_accuracy', 'after fine-tuning', '-', color),
      ('test_accuracy_before_finetune', 'before', (0, (4, 2)), 'none'),
    ):
      line = [
        (run['params'], run[key])
        for run in sorted([dense, *chosen], key=lambda run: run['params'])
        if run.get(key) is not None
      ]
      if key.endswith('finetune') and dense.get(key) is None and line:
        line.append((dense['params'], dense['test_accuracy']))
      # The dense model is drawn once, for all lines that end there.
      mark = [i for i, (size, _) in enumerate(line) if size != dense['params']]
      if mark:
        axes.plot(
          *zip(*line, strict=True), color=color, linestyle=style, linewidth=1.8,
          marker='o', markersize=7, markerfacecolor=face, markevery=mark,
          label=_label(label + name, 40), zorder=3,
        )  # fmt: skip
  reference = dense['test_accuracy']
  axes.axhline(reference, color=MUTED, linewidth=1, linestyle=(0, (1, 2)))
  axes.plot(
    [dense['params']], [reference], 's', color=INK, markersize=7,
    label=f'dense {reference:.2%}', zorder=4,
  )  # fmt: skip
  axes.set_ylabel('test accuracy')
  axes.set_xlabel('parameters (and share of the block kernels kept)')
  axes.yaxis.set_major_formatter(_percent_ticks)
  axes.margins(x=0.09, y=0.12)
  low, high = axes.get_ylim()
  # Differences of less than a point are noise; do not blow them up.
  if high - low < 0.02:
    low, high = (low + high) / 2 - 0.01, (low + high) / 2 + 0.01
  axes.set_ylim(low, high)
  _size_ticks(axes, runs)
  _legend(figure, axes)
  return figure


def depth_color(share: float) -> str:
  """Colour of a depth in [0, 1] on the ramp that `spectra` uses, as hex.

  >>> depth_color(0.0)
  '#2f86d6'
  """
  stops = [[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in DEPTH_COLORS]
  at = np.linspace(0, 1, len(stops))
  rgb = [np.interp(share, at, channel) for channel in zip(*stops, strict=True)]
  return '#' + ''.join(f'{round(value):02x}' for value in rgb)


def _pool(kinds: list[str]) -> list[str]:
  """Short names for the kinds; the small ones become `OTHERS` or `ALL`."""
  counts = {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}
  if len(counts) == 1:
    keep = set(counts)
  else:
    large = [kind for kind, count in counts.items() if count > 1]
    large.sort(key=lambda kind: -counts[kind])
    keep = set(large[: _MAX_KINDS if len(large) <= _MAX_KINDS else 7])
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


def _points(
  layers: Sequence[LayerReport], plan: Arrangement, kind: str
) -> list[tuple[Place, LayerReport]]:
  pairs = zip(plan.places, layers, strict=True)
  chosen = [pair for pair in pairs if pair[0].kind == kind]
  return sorted(chosen, key=lambda pair: pair[0].x)


def _column_means(
  x: Sequence[float], y: Sequence[float]
) -> list[tuple[float, float]]:
  """The centre of the points in every column."""
  columns: dict[int, list[tuple[float, float]]] = {}
  for point in zip(x, y, strict=True):
    columns.setdefault(int(point[0]), []).append(point)
  return [tuple(np.mean(points, axis=0)) for points in columns.values()]


def _kind_style(number: int, kind: str) -> tuple[str, str]:
  if kind == OTHERS:
    return MUTED, 'o'
  return KIND_COLORS[number % _MAX_KINDS], KIND_MARKERS[number % _MAX_KINDS]


def _spectra_pair(
  figure: FigureBase,
  layers: Sequence[LayerReport],
  plan: Arrangement,
  kind: str,
  energy: float,
) -> None:
  """Draws one kind: inputs left, outputs right, one curve per layer."""
  if not 0 < energy <= 1:
    raise ValueError(f'energy must be in (0, 1], got {energy}')
  left_out = 1 - energy
  floor = min(1e-4, left_out / 10) if left_out else 1e-6
  points = _points(layers, plan, kind)
  last = max(place.x for place in plan.places)
  both = figure.subplots(1, 2, sharex=True, sharey=True)
  # Many curves: thinner, so that the ones below still show.
  count = len(points)
  width = 1.6 if count <= 6 else 1.0 if count <= 48 else 0.6
  for axes, side, moment in zip(
    both, ('inputs S', 'outputs T'), ('spectrum_in', 'spectrum_out'),
    strict=True,
  ):  # fmt: skip
    _style(axes)
    for place, layer in points:
      color = depth_color(place.x / last if last else 0)
      axes.plot(
        *_left_out(getattr(layer, moment), floor), color=color, zorder=3,
        linewidth=width,
      )  # fmt: skip
    if left_out:
      axes.axhline(left_out, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
    axes.set_yscale('log')
    axes.minorticks_off()
    axes.set_ylim(floor, 1.4)
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.5, 1], ['0', '50%', '100%'])
    decades = range(int(np.ceil(np.log10(floor) - 1e-9)), 1)
    ticks = [10.0**power for power in decades if not power % 2]
    axes.set_yticks(ticks, [f'{100 * tick:.6g}%' for tick in ticks])
    axes.text(
      0.97, 0.95, side, transform=axes.transAxes, ha='right', va='top',
      fontsize='small', color=MUTED,
    )  # fmt: skip
    for text in axes.get_xticklabels()[::2]:
      # Neighbouring panels would otherwise run "100%" into "0".
      text.set_horizontalalignment('left')
    axes.get_xticklabels()[-1].set_horizontalalignment('right')
  figure.suptitle(_label(kind, 40), x=0.02, ha='left', fontsize=10, color=INK)


def _left_out(
  spectrum: np.ndarray, floor: float
) -> tuple[np.ndarray, np.ndarray]:
  """(k/d, share of the energy outside the first k), thinned for drawing."""
  values = np.maximum(np.asarray(spectrum, dtype=np.float64).ravel(), 0)
  # From the small end: 1 - cumsum would lose the tail to rounding.
  tail = np.append(np.cumsum(values[::-1])[::-1], 0.0)
  if tail[0] > 0:
    tail = tail / tail[0]
  steps = len(tail) - 1
  keep = np.arange(steps + 1)
  if steps > 96:
    head, rest = keep[:17], np.linspace(16, steps, 80).round().astype(int)
    keep = np.unique(np.concatenate([head, rest]))
  return keep / steps, np.maximum(tail[keep], floor / 100)


def _spectra_key(figure: FigureBase, energy: float, several: bool) -> None:
  """What colour and the dashed line mean, in a strip of its own."""
  from matplotlib.lines import Line2D

  handles = []
  if several:
    for share, label in ((0, 'first'), (0.5, 'middle'), (1, 'last in depth')):
      color = depth_color(share)
      handles.append(Line2D([], [], color=color, linewidth=3, label=label))
  if energy < 1:
    label = f'left out at energy {energy:g}'
    handles.append(
      Line2D([], [], color=INK, linestyle=(0, (4, 3)), label=label)
    )
  figure.legend(
    handles=handles, loc='center left', ncols=len(handles) or 1, fontsize=9,
    frameon=False, labelcolor=INK, handlelength=1.8, columnspacing=1.4,
    borderaxespad=0.2,
  )  # fmt: skip


def _figure(width: float, height: float) -> Figure:
  """An empty figure, in inches, that keeps its labels inside."""
  try:
    from matplotlib.figure import Figure
  except ImportError as error:
    raise ImportError(
      'plots need matplotlib: pip install matplotlib'
    ) from error
  return Figure(figsize=(width, height), dpi=120, layout='constrained')


def _style(axes: Axes) -> None:
  for side in ('top', 'right', 'left'):
    axes.spines[side].set_visible(False)
  axes.spines['bottom'].set_color(MUTED)
  axes.grid(axis='y', color=GRID, linewidth=0.8)
  axes.set_axisbelow(True)
  axes.tick_params(colors=MUTED, labelcolor=INK, length=0, labelsize=9)
  axes.tick_params(axis='x', length=3)
  for axis in (axes.xaxis, axes.yaxis):
    axis.label.set_color(INK)
    axis.label.set_fontsize(9.5)


def _column_ticks(axes: Axes, plan: Arrangement) -> None:
  count = len(plan.ticks)
  axes.set_xlim(-0.5, max(place.x for place in plan.places) + 0.5)
  step = 1 if count <= _MAX_TICKS else -(-count // (_MAX_TICKS // 2))
  at = range(0, count, step)
  labels = [_label(plan.ticks[i], 14) for i in at]
  axes.set_xticks(at, labels)
  # About 70 characters fit along the axis; only names that would run into a
  # neighbour are turned.
  room = 70 / len(labels)
  sizes = [0, *map(len, labels), 0]
  for text, size, *near in zip(
    axes.get_xticklabels(), sizes[1:], sizes, sizes[2:], strict=False
  ):
    if size > 3 and (size + max(near)) / 2 + 0.7 > room:
      text.set(rotation=40, ha='right', rotation_mode='anchor')


def _size_ticks(axes: Axes, runs: Sequence[Mapping[str, Any]]) -> None:
  """Labels each model's size; sizes too close to tell apart share one."""
  left, right = axes.get_xlim()
  labels: dict[float, str] = {}
  for run in sorted(runs, key=lambda run: run['params']):
    size = run['params']
    if not labels or size - max(labels) > 0.09 * (right - left):
      share = run.get('params_fraction')
      kept = '' if share is None else f'\n{100 * share:.3g}%'
      labels[size] = short_count(size) + kept
  axes.set_xticks(list(labels), list(labels.values()))


def short_count(value: float) -> str:
  """A count with three digits and a unit of thousands.

  >>> short_count(1234567), short_count(85_000), short_count(12)
  ('1.23 M', '85.0 k', '12')
  """
  for unit, size in (('T', 1e12), ('G', 1e9), ('M', 1e6), ('k', 1e3)):
    # 999,600 is 1.00 M, not 1000 k.
    if abs(value) >= 0.9995 * size:
      scaled = value / size
      digits = max(0, 2 - int(np.log10(max(abs(scaled), 1)) + 2e-4))
      return f'{scaled:.{digits}f} {unit}'
  return f'{value:.3g}'


def _percent_ticks(value: float, _: float) -> str:
  return f'{100 * value:.4g}%'


def _legend(figure: Figure, axes: Axes) -> None:
  handles, labels = axes.get_legend_handles_labels()
  # In points: the width of an entry without its text, and of a character.
  widest = 36 + 5.3 * max(map(len, labels))
  figure.legend(
    handles, labels, loc='outside upper left', frameon=False, fontsize=9,
    labelcolor=INK,
    ncols=max(1, min(len(labels), int(400 / widest))),
    handlelength=1.8, columnspacing=1.4, borderaxespad=0.2,
  )  # fmt: skip


def _label(text: str, limit: int = _MAX_LABEL) -> str:
  """Text that matplotlib shows as it is, cut in the middle if it is long."""
  if len(text) > limit:
    keep = limit - 1
    text = text[: keep // 2] + '…' + text[len(text) - (keep - keep // 2) :]
  # `$` starts mathematics, and a leading `_` hides a legend entry.
  return (' ' if text.startswith('_') else '') + text.replace('$', r'\$')

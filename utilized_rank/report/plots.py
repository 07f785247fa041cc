"""Figures of a utilization report: by depth, spectra, accuracy by size.

Every function returns a `matplotlib.figure.Figure` made without pyplot: no
window, no display and no global state, so they work in a headless job, in a
thread and in a notebook. matplotlib is imported when a figure is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from utilized_rank.report import depth
from utilized_rank.report import look
from utilized_rank.report import tables
from utilized_rank.report.layer import LayerReport

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure
  from matplotlib.figure import FigureBase


_MAX_TICKS = 26


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
  plan = depth.arrange(layers)
  figure = look.figure(5.8, 3.5)
  axes = figure.subplots()
  look.style(axes)
  mean = float(np.mean([layer.utilization for layer in layers]))
  top = max(layer.utilization for layer in layers)
  for number, kind in enumerate(plan.kinds):
    color, marker = _kind_style(number, kind)
    # A line joins counterparts; pooled layers have nothing in common.
    line = 'none' if kind in (depth.OTHERS, depth.ALL) else '-'
    points = _points(layers, plan, kind)
    x = [place.x for place, _ in points]
    y = [layer.utilization for _, layer in points]
    marks: dict[str, Any] = dict(
      color=color, marker=marker, markeredgewidth=0, zorder=3,
      markersize=5 if len(layers) <= 60 else 3.5,
    )  # fmt: skip
    middle = _column_means(x, y)
    if line == '-' and len(middle) < len(x):
      # Members of a stack have no order: points, and a line of their means.
      axes.plot(x, y, linestyle='none', **marks)
      axes.plot(*zip(*middle, strict=True), color=color, linewidth=1.6)
      line = 'none'
      axes.plot([], [], color=color, label=look.label(kind), marker=marker)
    else:
      axes.plot(
        x, y, linestyle=line, linewidth=1.6, label=look.label(kind), **marks
      )
    if sides:
      for ratio, dashes in (
        ([_share_in(layer) for _, layer in points], (0, (1, 1.5))),
        ([layer.k_out / layer.d_out for _, layer in points], (0, (4, 2))),
      ):
        top = max(top, float(np.nanmax([0.0, *ratio])))
        axes.plot(
          x, ratio, color=color, alpha=0.4, linewidth=1.2, markersize=3,
          linestyle=dashes if line == '-' else 'none',
          marker='' if line == '-' else marker,
        )  # fmt: skip
  axes.axhline(
    mean, color=look.MUTED, linewidth=1, linestyle=(0, (5, 3)),
    label=f'mean {mean:.1%}',
  )  # fmt: skip
  if sides:
    for dashes, label in (((0, (1, 1.5)), '$k_S/d$'), ((0, (4, 2)), '$k_T/m$')):
      axes.plot([], [], color=look.MUTED, linestyle=dashes, label=label)
  axes.set_ylim(0, min(1.04, max(0.1, 1.15 * top)))
  axes.yaxis.set_major_formatter(lambda value, _: f'{value:.0%}')
  axes.set_ylabel('layer utilization')
  axes.set_xlabel(look.label(plan.axis))
  _column_ticks(axes, plan)
  look.legend(figure, axes)
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
  plan = depth.arrange(layers)
  kinds = plan.kinds
  across = min(len(kinds), 2 if len(kinds) <= 4 else 3)
  down = -(-len(kinds) // across)
  height = 2.1 * down
  figure = look.figure(max(5.4, 3.6 * across), height + 0.35)
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

  For pages that arrange panels to their width. Colours and axes are those
  of the whole model, so that the figures compare.

  Args:
    layers: the layers in model order.
    energy: share of the energy kept, in (0, 1].

  Returns:
    Kind to figure, in model order.

  Raises:
    ValueError: there is no layer, or the energy is outside (0, 1].
  """
  plan = depth.arrange(layers)
  figures = {}
  for kind in plan.kinds:
    figures[kind] = look.figure(4.0, 2.35)
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
  figure = look.figure(5.8, 3.5)
  axes = figure.subplots()
  look.style(axes)
  dense, *small = runs
  methods = list(dict.fromkeys(run.get('method') or '' for run in small))
  for number, method in enumerate(methods):
    color = look.KIND_COLORS[number % depth.MAX_KINDS]
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
          label=look.label(label + name, 40), zorder=3,
        )  # fmt: skip
  reference = dense['test_accuracy']
  axes.axhline(reference, color=look.MUTED, linewidth=1, linestyle=(0, (1, 2)))
  axes.plot(
    [dense['params']], [reference], 's', color=look.INK, markersize=7,
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
  look.legend(figure, axes)
  return figure


def _points(
  layers: Sequence[LayerReport], plan: depth.Arrangement, kind: str
) -> list[tuple[depth.Place, LayerReport]]:
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
  if kind == depth.OTHERS:
    return look.MUTED, 'o'
  number %= depth.MAX_KINDS
  return look.KIND_COLORS[number], look.KIND_MARKERS[number]


def _spectra_pair(
  figure: FigureBase,
  layers: Sequence[LayerReport],
  plan: depth.Arrangement,
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
    curves = [
      (place, spectrum)
      for place, layer in points
      if len(spectrum := getattr(layer, moment))
    ]
    if not curves:  # all were measured from the other side
      axes.set_axis_off()
      both[1].tick_params(labelleft=True)
      continue
    look.style(axes)
    for place, spectrum in curves:
      color = look.depth_color(place.x / last if last else 0)
      axes.plot(
        *_left_out(spectrum, floor), color=color, zorder=3,
        linewidth=width,
      )  # fmt: skip
    if left_out:
      axes.axhline(
        left_out, color=look.INK, linewidth=0.9, linestyle=(0, (4, 3))
      )
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
      fontsize='small', color=look.MUTED,
    )  # fmt: skip
    for text in axes.get_xticklabels()[::2]:
      # Neighbouring panels would otherwise run "100%" into "0".
      text.set_horizontalalignment('left')
    axes.get_xticklabels()[-1].set_horizontalalignment('right')
  figure.suptitle(
    look.label(kind, 40), x=0.02, ha='left', fontsize=10, color=look.INK
  )


def _share_in(layer: LayerReport) -> float:
  return np.nan if layer.k_in is None else layer.k_in / layer.d_in


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
      color = look.depth_color(share)
      handles.append(Line2D([], [], color=color, linewidth=3, label=label))
  if energy < 1:
    label = f'left out at energy {energy:g}'
    handles.append(
      Line2D([], [], color=look.INK, linestyle=(0, (4, 3)), label=label)
    )
  figure.legend(
    handles=handles, loc='center left', ncols=len(handles) or 1, fontsize=9,
    frameon=False, labelcolor=look.INK, handlelength=1.8, columnspacing=1.4,
    borderaxespad=0.2,
  )  # fmt: skip


def _column_ticks(axes: Axes, plan: depth.Arrangement) -> None:
  count = len(plan.ticks)
  axes.set_xlim(-0.5, max(place.x for place in plan.places) + 0.5)
  step = 1 if count <= _MAX_TICKS else -(-count // (_MAX_TICKS // 2))
  at = range(0, count, step)
  labels = [look.label(plan.ticks[i], 14) for i in at]
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
      labels[size] = tables.short_count(size) + kept
  axes.set_xticks(list(labels), list(labels.values()))


def _percent_ticks(value: float, _: float) -> str:
  return f'{100 * value:.4g}%'

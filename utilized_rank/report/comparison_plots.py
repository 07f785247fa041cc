"""Utilization by depth of several models or trainings, in one figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from utilized_rank.report import look
from utilized_rank.report.repetitions import Spread

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure

# Blocks in order, each with its label.
Line = Sequence[tuple[str, Spread]]
_PANELS_ACROSS = 3


def by_depth(lines: Mapping[str, Mapping[float, Line]], axis: str) -> Figure:
  """Mean utilization of every block along the model, a panel per energy.

  Lines are means over the repetitions and bands run from the smallest to the
  largest. Models that differ in their blocks are drawn from first to last.

  Args:
    lines: by name and energy; all names have the same energies.
    axis: what the blocks of the first model are.
  """
  energies = list(next(iter(lines.values())))
  across = min(len(energies), _PANELS_ACROSS)
  down = -(-len(energies) // across)
  figure = look.figure(max(5.0, 3.0 * across), 2.6 * down + 0.5)
  grid = figure.subplots(down, across, squeeze=False, sharey=True).flat
  labels = {
    name: [label for label, _ in line[energies[0]]]
    for name, line in lines.items()
  }
  shared = len({tuple(each) for each in labels.values()}) == 1
  panels = list(grid)
  for axes in panels[len(energies) :]:
    axes.set_visible(False)
  for axes, energy in zip(panels, energies, strict=False):
    look.style(axes)
    for number, (name, line) in enumerate(lines.items()):
      _line(axes, line[energy], name, number, shared)
    axes.set_title(f'energy {energy:g}', fontsize=9.5, color=look.INK)
    axes.yaxis.set_major_formatter(lambda value, _: f'{value:.0%}')
    if shared:
      ticks = next(iter(labels.values()))
      step = max(1, -(-len(ticks) // 12))
      at = range(0, len(ticks), step)
      axes.set_xticks(at, [look.label(ticks[i], 8) for i in at])
      axes.set_xlabel(look.label(axis))
    else:
      axes.set_xticks([0, 1], ['first', 'last'])
      axes.set_xlabel('depth')
  # Shared by all: the highest band decides.
  top = max(axes.dataLim.ymax for axes in panels[: len(energies)])
  panels[0].set_ylim(0, min(1.04, 1.05 * top))
  for axes in panels[::across]:
    axes.set_ylabel('layer utilization')
  handles, names = panels[0].get_legend_handles_labels()
  figure.legend(
    handles, names, loc='outside upper left', frameon=False, fontsize=9,
    labelcolor=look.INK, ncols=min(len(names), 2 * across),
    handlelength=1.8, columnspacing=1.4, borderaxespad=0.2,
  )  # fmt: skip
  return figure


def _line(axes: Axes, line: Line, name: str, number: int, shared: bool) -> None:
  color = look.KIND_COLORS[number % len(look.KIND_COLORS)]
  marker = look.KIND_MARKERS[number % len(look.KIND_MARKERS)]
  spreads = [spread for _, spread in line]
  x = np.arange(len(spreads), dtype=float)
  if not shared:
    x = x / max(len(spreads) - 1, 1)
  axes.plot(
    x, [spread.mean for spread in spreads], color=color, marker=marker,
    linewidth=1.6, markersize=4.5, markeredgewidth=0, zorder=3,
    label=look.label(name, 24),
  )  # fmt: skip
  if spreads[0].runs > 1:
    low = [spread.low for spread in spreads]
    high = [spread.high for spread in spreads]
    axes.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)

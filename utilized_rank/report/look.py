"""The look that all figures share, and how they get into a page."""

from __future__ import annotations

import html
import io
import re
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from utilized_rank.host.extras import extra

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure

# The page swaps these for its own light and dark colours.
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

_MAX_LABEL = 20


def depth_color(share: float) -> str:
  """Colour of a depth in [0, 1] on the ramp that `spectra` uses, as hex.

  >>> depth_color(0.0)
  '#2f86d6'
  """
  stops = [[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in DEPTH_COLORS]
  at = np.linspace(0, 1, len(stops))
  rgb = [np.interp(share, at, channel) for channel in zip(*stops, strict=True)]
  return '#' + ''.join(f'{round(value):02x}' for value in rgb)


def figure(width: float, height: float) -> Figure:
  """An empty figure, in inches, that keeps its labels inside."""
  with extra('report'):
    from matplotlib.figure import Figure
  return Figure(figsize=(width, height), dpi=120, layout='constrained')


def style(axes: Axes) -> None:
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


def legend(figure: Figure, axes: Axes) -> None:
  handles, labels = axes.get_legend_handles_labels()
  # In points: the width of an entry without its text, and of a character.
  widest = 36 + 5.3 * max(map(len, labels))
  figure.legend(
    handles, labels, loc='outside upper left', frameon=False, fontsize=9,
    labelcolor=INK,
    ncols=max(1, min(len(labels), int(400 / widest))),
    handlelength=1.8, columnspacing=1.4, borderaxespad=0.2,
  )  # fmt: skip


def label(text: str, limit: int = _MAX_LABEL) -> str:
  """Text that matplotlib shows as it is, cut in the middle if it is long."""
  if len(text) > limit:
    keep = limit - 1
    text = text[: keep // 2] + '…' + text[len(text) - (keep - keep // 2) :]
  # `$` starts mathematics, and a leading `_` hides a legend entry.
  return (' ' if text.startswith('_') else '') + text.replace('$', r'\$')


def inline(figure: Figure, name: str, label: str) -> str:
  """The figure as inline SVG in the page's own colours and font."""
  import matplotlib  # which drew the figure

  stream = io.StringIO()
  # Text stays text: it can be searched, and takes the page's font.
  with matplotlib.rc_context({'svg.fonttype': 'none', 'svg.hashsalt': name}):
    figure.savefig(
      stream,
      format='svg',
      transparent=True,
      metadata={'Date': None, 'Creator': None, 'Format': None, 'Type': None},
    )
  text = stream.getvalue()
  text = text[text.index('<svg') :]
  text = re.sub(r'<metadata>.*?</metadata>', '', text, flags=re.DOTALL)
  # Inside HTML the namespaces are implied, and no address remains.
  text = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', '', text)
  text = text.replace('xlink:href=', 'href=')
  # Ids of several pictures share one page.
  text = re.sub(r'(\bid="|url\(#|href="#)', rf'\g<1>{name}-', text)
  text = re.sub(r'(<svg[^>]*?)\s+width="[^"]*"', r'\1', text, count=1)
  text = re.sub(r'(<svg[^>]*?)\s+height="[^"]*"', r'\1', text, count=1)
  text = re.sub(r'font: ([^;"]*?px) [^;"]*', r'font: \1 var(--font)', text)
  for color, variable in (
    (INK, '--ink'),
    (MUTED, '--muted'),
    (GRID, '--grid'),
  ):
    text = text.replace(color, f'var({variable})')
  # A hundredth of a point is below what a screen shows; halves the page.
  text = re.sub(r'(\d\.\d\d)\d+', r'\1', text)
  head = f'<svg role="img" aria-label="{html.escape(label)}"'
  return text.replace('<svg', head, 1).strip()


def escape(value: Any) -> str:
  """Text, with what HTML would read as its own set apart."""
  return html.escape(str(value), quote=True)


def math(text: str) -> str:
  """Escapes, and sets r, k_S, d_in as symbols, with the index below."""
  text = re.sub(r'\br\b', '<i>r</i>', escape(text))
  return re.sub(r'\b([kd])_(\w+)', r'<i>\1</i><sub>\2</sub>', text)


class _Page(Protocol):
  def html(self) -> str:
    """A page of its own."""
    ...


def framed(report: _Page) -> str:
  """A page inside another one, whose styles it neither takes nor changes."""
  try:
    text = report.html()
  except ModuleNotFoundError:
    return f'<pre>{escape(report)}</pre>'
  return (
    f'<iframe srcdoc="{escape(text)}" style="width: 100%; height: 640px; '
    'border: 0"></iframe>'
  )

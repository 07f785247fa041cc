"""A figure as SVG that lives inside a page and wears its colours."""

from __future__ import annotations

import html
import io
import re
from typing import TYPE_CHECKING

from utilized_rank import look

if TYPE_CHECKING:
  from matplotlib.figure import Figure


def inline(figure: Figure, name: str, label: str) -> str:
  """The figure as inline SVG in the page's own colours and font."""
  import matplotlib

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
    (look.INK, '--ink'),
    (look.MUTED, '--muted'),
    (look.GRID, '--grid'),
  ):
    text = text.replace(color, f'var({variable})')
  # A hundredth of a point is below what a screen shows; halves the page.
  text = re.sub(r'(\d\.\d\d)\d+', r'\1', text)
  head = f'<svg role="img" aria-label="{html.escape(label)}"'
  return text.replace('<svg', head, 1).strip()

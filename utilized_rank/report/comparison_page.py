"""A comparison of reports as one HTML page that loads nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from utilized_rank.report import look
from utilized_rank.report.frame import document
from utilized_rank.report.frame import section
from utilized_rank.report.frame import table
from utilized_rank.report.look import escape

if TYPE_CHECKING:
  from matplotlib.figure import Figure

# Titles of the columns, and rows.
Table = tuple[Sequence[str], Sequence[Sequence[str]]]


def html(
  title: str,
  facts: Sequence[str],
  tables: Mapping[str, Table],
  picture: Figure,
  repeated: bool,
) -> str:
  """A complete page: the mean layer utilization, by depth, and the rest.

  Args:
    title: of the page.
    facts: what stands below it.
    tables: by heading; the first is of the mean layer utilization.
    picture: utilization by depth.
    repeated: whether numbers are means over runs.
  """
  note = ''
  if repeated:
    note = (
      '<p class="note">Mean ± standard deviation over runs; bands in the plot '
      'run from the smallest to the largest.</p>'
    )
  (heading, first), *others = tables.items()
  drawn = look.inline(picture, 'depth', 'Layer utilization along the models')
  parts = [
    f'<header><h1>{escape(title)}</h1>\n'
    f'<p class="sub">{escape(" · ".join(facts))}</p></header>',
    section(heading, note + table(*first)),
    section('By depth', f'<div class="plot">{drawn}</div>'),
  ]
  parts += [section(name, table(*cells)) for name, cells in others]
  return document(title, '\n'.join(parts))

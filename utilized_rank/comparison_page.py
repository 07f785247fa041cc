"""A comparison of reports as one HTML page that loads nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from utilized_rank import comparison_plots
from utilized_rank import page
from utilized_rank import svg

if TYPE_CHECKING:
  from utilized_rank.comparison import Comparison


def html(comparison: Comparison, title: str) -> str:
  """A complete page: the mean layer utilization, by depth, and by kind.

  Args:
    comparison: what to show.
    title: of the page.
  """
  energy = comparison.energies[-1]
  most = max(len(group) for group in comparison.values())
  facts = [
    f'{len(comparison)} compared',
    f'up to {most} runs each' if most > 1 else 'one run each',
    'spectra about the mean' if comparison.centered else 'uncentred',
  ]
  picture = svg.inline(
    comparison_plots.by_depth(comparison),
    'depth',
    'Layer utilization along the models',
  )
  note = ''
  if most > 1:
    note = (
      '<p class="note">Mean ± standard deviation over runs; bands in the plot '
      'run from the smallest to the largest.</p>'
    )
  parts = [
    f'<header><h1>{page.escape(title)}</h1>\n'
    f'<p class="sub">{page.escape(" · ".join(facts))}</p></header>',
    page.section(
      'Mean layer utilization by energy', note + _table(*comparison.table())
    ),
    page.section('By depth', f'<div class="plot">{picture}</div>'),
  ]
  for name, table in comparison.details(energy).items():
    heading = f'{name[0].upper()}{name[1:]}, energy {energy:g}'
    parts.append(page.section(heading, _table(*table)))
  return page.document(title, '\n'.join(parts))


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  head = ''.join(f'<th scope="col">{page.escape(t)}</th>' for t in titles)
  body = ''
  for name, *cells in rows:
    body += f'<tr><th scope="row">{page.escape(name)}</th>'
    body += ''.join(f'<td>{page.escape(cell)}</td>' for cell in cells)
    body += '</tr>\n'
  return (
    f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
    f'<tbody>{body}</tbody></table></div>'
  )

"""Sections of the report's page: its layers, and what `compress` chose."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from utilized_rank.report import depth
from utilized_rank.report import look
from utilized_rank.report import tables
from utilized_rank.report.choice import Choice
from utilized_rank.report.choice import stage_table
from utilized_rank.report.frame import table
from utilized_rank.report.layer import LayerReport
from utilized_rank.report.look import escape

_TOOLS = (
  '<p class="tools"><input type="search" id="filter" '
  'aria-label="filter layers" placeholder="Filter layers"> '
  '<button data-save="csv">CSV</button> '
  '<button data-save="json">JSON</button></p>'
)


def layers_table(layers: Sequence[LayerReport]) -> str:
  """The table, which must not be empty, and what finds and saves its rows.

  The page's script sorts, filters and saves them.
  """
  prefix, suffix, names = depth.relative_names(layers)
  titles = ['layer', 'd_in', 'd_out', 'k_S', 'k_T', 'r', 'utilization']
  titles += ['error, projected', 'error, best pair']
  head = ''.join(
    f'<th scope="col"><button>{look.math(title)}</button></th>'
    for title in titles
  )
  body = []
  for layer, name in zip(layers, names, strict=True):
    counts = (layer.d_in, layer.d_out, layer.k_in, layer.k_out, layer.rank)
    share = 100 * layer.utilization
    cells = ''.join(
      f'<td data-v="{-1 if v is None else v}">{_number(v)}</td>' for v in counts
    )
    errors = ''.join(
      f'<td data-v="{-1.0 if value is None else float(value)!r}">'
      f'{_error(value)}</td>'
      for value in (layer.error_projected, layer.error_bound)
    )
    # Breaks after the slashes only, so that names wrap on a phone.
    shown = escape(name).replace('/', '/<wbr>')
    body.append(
      f'<tr><th scope="row" title="{escape(layer.name)}">{shown}</th>{cells}'
      f'<td class="bar" data-v="{share:.6g}">'
      f'<i style="--w:{share:.1f}%"></i>{share:.1f}%</td>{errors}</tr>'
    )
  shared = ''
  if prefix or suffix:
    shared = f' Names stand for <code>{escape(f"{prefix}…{suffix}")}</code>.'
  return (
    '<p class="note">Errors are shares of the layer’s output energy: lost by '
    'the projection onto the utilized directions, and by the best pair of '
    f'factors of the same rank.{shared}</p>'
    f'{_TOOLS}<div class="scroll tall"><table class="layers" id="layers" '
    f'style="--name:{max(map(len, names)) + 2}ch">'
    f'<thead><tr>{head}</tr></thead>\n<tbody>{"".join(body)}</tbody></table>'
    '</div>'
  )


def chosen(choice: Choice) -> str:
  """The line, what won, every leaf that is changed, why others are not, and
  what the stages took."""
  parts = [
    f'<p>{escape(choice.line)}</p>',
    f'<p class="note">{escape(choice.how)}.</p>',
  ]
  if choice.changed:
    titles, rows = choice.kernel_table()
    prefix, suffix, names = depth.relative_names(choice.changed)
    lines = [[name, *row] for name, row in zip(names, rows, strict=True)]
    parts.append(table(['kernel', *titles], lines))
    note = choice.units
    if prefix or suffix:
      note += f'. Names stand for {prefix}…{suffix}'
    parts.append(f'<p class="note">{escape(note)}.</p>')
  for why, paths in choice.dense.items():
    listed = escape(', '.join(paths)).replace('/', '/<wbr>')
    parts.append(f'<p class="note">Dense, {escape(why)}: {listed}.</p>')
  if choice.stages:
    parts.append(table(*stage_table(choice.stages)))
  return '\n'.join(parts)


def _number(value: int | None) -> str:
  return tables.MISSING if value is None else f'{value:,}'


def _error(value: float | None) -> str:
  if value is None or np.isnan(value):
    return tables.MISSING
  return f'{100 * value:.2f}%'

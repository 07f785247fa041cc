"""What `compress` chose, as a section of the report's page."""

from __future__ import annotations

from utilized_rank.report.choice import Choice
from utilized_rank.report.choice import stage_table
from utilized_rank.report.depth import relative_names
from utilized_rank.report.frame import table
from utilized_rank.report.look import escape


def html(choice: Choice) -> str:
  """The line, what won, every leaf that is changed, why others are not, and
  what the stages took."""
  parts = [
    f'<p>{escape(choice.line)}</p>',
    f'<p class="note">{escape(choice.how)}.</p>',
  ]
  if choice.changed:
    titles, rows = choice.kernel_table()
    prefix, suffix, names = relative_names(choice.changed)
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

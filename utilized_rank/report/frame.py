"""What all pages are made of: the frame with its look, sections, tables."""

from __future__ import annotations

from collections.abc import Sequence
import importlib.resources

from utilized_rank.report.look import escape

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
<script>{script}</script>
</body>
</html>
"""


def document(title: str, body: str) -> str:
  """A page of the report's look around HTML, which must be escaped."""
  return _PAGE.format(
    title=escape(title),
    style=_resource('page.css'),
    body=body,
    script=_resource('page.js'),
  )


def _resource(name: str) -> str:
  """Text of a file that is installed beside this one."""
  package = importlib.resources.files('utilized_rank.report')
  return package.joinpath(name).read_text('utf-8')


def section(title: str, body: str) -> str:
  """HTML, which must be escaped, under a heading."""
  return f'<section><h2>{escape(title)}</h2>\n{body}\n</section>'


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """Columns under their titles, the first of names; in view by scrolling."""
  head = ''.join(f'<th scope="col">{escape(t)}</th>' for t in titles)
  body = ''
  for name, *cells in rows:
    body += f'<tr><th scope="row">{escape(name)}</th>'
    body += ''.join(f'<td>{escape(cell)}</td>' for cell in cells)
    body += '</tr>\n'
  return (
    f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
    f'<tbody>{body}</tbody></table></div>'
  )

"""Which benchmarks there are, read from their docstrings; imports none."""

from __future__ import annotations

import ast
import difflib
import functools
import pathlib
import re
import textwrap
from typing import NamedTuple

from benchmarks import ROOMS

_HERE = pathlib.Path(__file__).parent


class Benchmark(NamedTuple):
  """A module that `python -m benchmarks.NAME` runs.

  `needs` and `takes` are what its docstring says in sentences that begin with
  these words; `needs` has `--data_root` first if its command line has it.
  """

  path: pathlib.Path
  purpose: str
  needs: tuple[str, ...]
  takes: str | None


@functools.cache
def benchmarks() -> dict[str, Benchmark]:
  """All benchmarks by name, in the order of the listing."""
  return {
    path.stem: _benchmark(path)
    for room in ROOMS
    for path in sorted((_HERE / room).glob('[!_]*.py'))
  }


def listing() -> str:
  """What `python -m benchmarks` prints."""
  lines = []
  for room in ROOMS:
    lines.append(f'{room}/: {_docstring(_HERE / room / "__init__.py")}')
    for name, found in benchmarks().items():
      if found.path.parent.name != room:
        continue
      lines += [f'  {name}', f'    {found.purpose}']
      notes = [f'needs {need}' for need in found.needs]
      notes += [f'takes {found.takes}'] if found.takes else []
      lines += textwrap.wrap(
        '; '.join(notes), 80, initial_indent=' ' * 6, subsequent_indent=' ' * 6
      )
    lines.append('')
  return '\n'.join(lines)


def refusal(argv: list[str]) -> str:
  """Why there is nothing to run, and which names are near.

  >>> print(refusal(['latencies']))
  no benchmark 'latencies'; near it: latency; `python -m benchmarks` lists all
  """
  near = difflib.get_close_matches(argv[0], benchmarks())
  hint = '; near it: ' + ', '.join(near) if near else ''
  given = argv[0] if len(argv) == 1 or near else ' '.join(argv)
  return f'no benchmark {given!r}{hint}; `python -m benchmarks` lists all'


def _docstring(path: pathlib.Path) -> str:
  return ast.get_docstring(ast.parse(path.read_text(encoding='utf-8'))) or ''


def _benchmark(path: pathlib.Path) -> Benchmark:
  doc = _docstring(path)
  needs = ['--data_root'] if '--data_root=' in doc else []
  return Benchmark(
    path,
    doc.partition('\n')[0],
    (*needs, *_sentences('Needs', doc)),
    next(iter(_sentences('Takes', doc)), None),
  )


def _sentences(begin: str, doc: str) -> list[str]:
  """What follows a word that begins a sentence, up to the full stop.

  >>> _sentences('Needs', 'One line.\\n\\nNeeds 2.5 GB\\nof memory. More.')
  ['2.5 GB of memory']
  """
  text = ' '.join(doc.split())
  return re.findall(rf'(?:^|(?<=[.:] )){begin} (.+?)\.(?= |$)', text)

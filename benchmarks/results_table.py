"""The table of all results: of which command, commit and machine each is."""

from __future__ import annotations

import json
import pathlib
import re
from typing import Any

RESULTS = pathlib.Path(__file__).parent / 'results'
TABLE = RESULTS / 'README.md'

_CAPTION = """\
# Results

Written by `python -m benchmarks --results --write`, from the files here.

*Commit* is what was checked out when the benchmark began, with `+` if files
that git knows had changes; one that goes on where it stopped names that of its
last start. Results from before they named it have *landed in*: the commit that
brought these numbers. They were measured on that commit's code or on code
shortly before it. *Command* leaves out places of one machine: `--out`, and what
DIR is.

"""
_COLUMNS = ('result', 'command', 'date', 'commit', 'machine', 'jax')


def load() -> dict[str, dict[str, Any]]:
  """Every result by the name of its file."""
  return {
    path.name: json.loads(path.read_text(encoding='utf-8'))
    for path in sorted(RESULTS.glob('*.json'))
  }


def benchmark_of(result: dict[str, Any]) -> str | None:
  """The name of the benchmark that found it.

  >>> benchmark_of({'command': 'XLA_FLAGS=1 python -m benchmarks.gram --quick'})
  'gram'
  """
  match = re.search(r'python -m benchmarks[. ](\w+)', result['command'])
  return match[1] if match else None


def commit_of(result: dict[str, Any]) -> str:
  """The commit as the table has it.

  >>> commit_of({'commit': '1a2b3c4+'}), commit_of({'landed_in': '1a2b3c4'})
  ('1a2b3c4+', 'landed in 1a2b3c4')
  >>> commit_of({'commit': None})
  'not in git'
  """
  if 'commit' in result:
    return result['commit'] or 'not in git'
  return f'landed in {result["landed_in"]}'


def text() -> str:
  """The caption and the table, in Markdown."""
  rows = [_COLUMNS, ('---',) * len(_COLUMNS)]
  rows += [_row(name, result) for name, result in load().items()]
  return _CAPTION + ''.join(f'| {" | ".join(row)} |\n' for row in rows)


def _row(name: str, result: dict[str, Any]) -> tuple[str, ...]:
  stem = name.removesuffix('.json')
  file = f'[{stem}]({name})'
  if (RESULTS / f'{stem}.png').exists():
    file += f' ([picture]({stem}.png))'
  return (
    file,
    f'`{result["command"]}`',
    result['date'],
    commit_of(result),
    result['machine'],
    result['versions']['jax'],
  )

"""Which lines of the package, and which of its errors, the tests run.

  tests/run.sh --cov
  python -m benchmarks.coverage --out benchmarks/results/coverage.json

Reads what the first command leaves (`.coverage`): the share of lines run, in
all and by room, and every `raise` that no test makes fire. Bars: 95 % of the
lines, and no such raise.
"""

from __future__ import annotations

import ast
import collections
import pathlib
from typing import Any

from benchmarks.shared import arguments
from benchmarks.shared import record

BARS = {'lines': 0.95, 'raises not run': 0}
_ROOT = pathlib.Path(__file__).parent.parent.parent
_PACKAGE = _ROOT / 'utilized_rank'


def raises(text: str) -> dict[int, str]:
  """First line and text of every `raise` of something in a module.

  Not of an `AssertionError`: it says what no input can bring about.

  >>> raises('def f():\\n  raise ValueError(\\n    "x")')
  {2: 'ValueError("x")'}
  """
  found = {}
  for node in ast.walk(ast.parse(text)):
    if isinstance(node, ast.Raise) and node.exc is not None:
      source = ast.get_source_segment(text, node.exc) or ''
      if not source.startswith('AssertionError'):
        lines = map(str.strip, source.split('\n'))
        found[node.lineno] = ''.join(lines)
  return found


def analysis(data_file: pathlib.Path) -> dict[str, Any]:
  """Lines and raises of every module of the package that were run."""
  import coverage  # with the test tools

  data = coverage.Coverage(
    data_file=str(data_file), config_file=str(_ROOT / 'setup.cfg')
  )
  data.load()
  lines: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
  fired, silent = 0, []
  for path in sorted(_PACKAGE.rglob('*.py')):
    name = path.relative_to(_PACKAGE)
    _, statements, _, missing, _ = data.analysis2(str(path))
    room = name.parts[0] if len(name.parts) > 1 else '.'
    for key in (room, 'all'):
      lines[key][0] += len(statements) - len(missing)
      lines[key][1] += len(statements)
    for line, text in raises(path.read_text(encoding='utf-8')).items():
      if line in missing:
        silent.append(f'{name}:{line} {text[:120]}')
      elif line in statements:
        fired += 1
  return {
    'lines': {k: round(run / max(of, 1), 4) for k, (run, of) in lines.items()},
    'statements': lines['all'][1],
    'raises run': fired,
    'raises not run': silent,
  }


def main():
  parser = arguments.parser(__doc__)
  parser.add_argument(
    '--data', type=pathlib.Path, default=_ROOT / '.coverage', help='of the run'
  )
  args = parser.parse_args()
  if not args.data.exists():
    parser.error(f'{args.data} is not there: tests/run.sh --cov makes it')
  found = analysis(args.data)
  for room, share in found['lines'].items():
    print(f'{room:<14} {share:.1%}')
  print(f'{found["raises run"]} raises run; not run:')
  print(*found['raises not run'], sep='\n')
  record.write(args.out, 'coverage', {'bars': BARS, **found})


if __name__ == '__main__':
  main()

"""Lists benchmarks, runs one, and shows what they found.

  python -m benchmarks                      # what there is
  python -m benchmarks NAME [options]       # as python -m benchmarks.NAME
  python -m benchmarks --results [--write]  # the table of all results

With `--write` the table becomes benchmarks/results/README.md.
"""

from __future__ import annotations

import runpy
import sys

from benchmarks import catalogue
from benchmarks import results_table


def main(argv: list[str]) -> None:
  match argv:
    case [] | ['-h' | '--help']:
      print(f'{__doc__}\n{catalogue.listing()}')
    case ['--results']:
      print(results_table.text(), end='')
    case ['--results', '--write']:
      results_table.TABLE.write_text(results_table.text(), encoding='utf-8')
    case [name, *options] if name in catalogue.benchmarks():
      sys.argv[1:] = options
      module = f'benchmarks.{name}'
      runpy.run_module(module, run_name='__main__', alter_sys=True)
    case _:
      print(catalogue.refusal(argv), file=sys.stderr)
      sys.exit(2)


if __name__ == '__main__':
  main(sys.argv[1:])

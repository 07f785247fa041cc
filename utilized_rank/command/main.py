"""`utilized-rank COMMAND --flags`; each command says more with `--help`."""

from __future__ import annotations

import importlib
import sys

from utilized_rank import version
from utilized_rank.host.extras import extra

COMMANDS = {
  'run': '--config=digits_vit --workdir=DIR: train, measure, shrink, report',
  'measure': 'CHECKPOINT: the utilized rank of each of its kernels',
  'compress': 'CHECKPOINT --params=0.5 --out=DIR: low-rank factors for them',
}


def usage() -> str:
  """The commands.

  >>> print(usage().splitlines()[0])
  usage: utilized-rank COMMAND
  """
  lines = [f'  {name:<9} {what}' for name, what in COMMANDS.items()]
  more = 'Flags of a command: utilized-rank COMMAND --help'
  return '\n'.join(['usage: utilized-rank COMMAND', *lines, more])


def main() -> None:
  """Runs the command that `sys.argv` names."""
  program, *arguments = sys.argv
  name = arguments[0] if arguments else '--help'
  if name in ('--help', '-h', 'help'):
    print(usage())
  elif name == '--version':
    print(version.__version__)
  elif name not in COMMANDS:
    raise SystemExit(f'error: no command {name!r}\n{usage()}')
  else:
    _run(name, program, arguments[1:])


def _run(name: str, program: str, arguments: list[str]) -> None:
  try:
    command = importlib.import_module(f'utilized_rank.command.{name}')
    with extra('all'):
      from absl import app
      from absl import flags
  except ModuleNotFoundError as error:
    raise SystemExit(f'error: {error}') from error
  command.define(flags.FLAGS)
  # Also what `--help` calls the program by.
  sys.argv = [f'{program} {name}', *arguments]
  app.run(command.main, flags_parser=command.parse)

"""`utilized-rank run`: an experiment, or the rest of one."""

from __future__ import annotations

from collections.abc import Sequence
import re
import sys

from utilized_rank.command import configs
from utilized_rank.command import errors
from utilized_rank.host.extras import extra

with extra('all'):
  from absl import app
  from absl import flags
  from ml_collections import config_flags


def define(values: flags.FlagValues) -> None:
  """The flags of the command."""
  config_flags.DEFINE_config_file(
    'config',
    None,
    f'The experiment: a file, or one of {", ".join(configs.names())}.',
    lock_config=True,
    flag_values=values,
  )
  text = flags.DEFINE_string
  text('workdir', None, 'Directory of the run.', flag_values=values)
  text(
    'redo',
    None,
    'Run this stage again, and those after it; what they made is lost.',
    flag_values=values,
  )
  text(
    'compilation_cache',
    None,
    'Keep compiled programs here, across runs.',
    flag_values=values,
  )
  flags.mark_flags_as_required(['config', 'workdir'], flag_values=values)


def parse(argv: Sequence[str]) -> list[str]:
  """Parses `sys.argv`, experiments by name."""
  with errors.in_one_line():
    # `config_flags` looks for overridden values there.
    sys.argv = configs.by_path(argv)
  try:
    return app.parse_flags_with_usage(sys.argv)
  except AttributeError as error:
    # ml_collections names the key that it does not know, and nothing else.
    key = re.findall(r'\w+', str(error))[0]
    given = [a for a in argv if a.startswith('--config.') and key in a]
    raise SystemExit(
      f'error: the config has no key {key!r}, given as {given}; its keys are '
      'in the file that --config names'
    ) from error


def main(argv: Sequence[str], values: flags.FlagValues = flags.FLAGS) -> None:
  """Runs what the flags say."""
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments {argv[1:]}')
  errors.prepare()
  with errors.in_one_line(errors.same_command()):
    import jax

    from utilized_rank.experiment import pipeline

    if values.compilation_cache:
      jax.config.update('jax_compilation_cache_dir', values.compilation_cache)
    pipeline.run(values.config, values.workdir, redo=values.redo)

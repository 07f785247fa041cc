"""Runs an experiment: train, collect, measure, factorize, finetune, report.

  python -m launch.main --config=configs/digits_vit.py --workdir=runs/digits

Any value of the config can be overridden: `--config.train.steps=3000`. A run
that is started again goes on after its last finished stage.
"""

import re

from absl import app
from absl import flags
from absl import logging
import jax
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'The experiment, one of configs/.', lock_config=True
)
_WORKDIR = flags.DEFINE_string('workdir', None, 'Directory of the run.')
_CACHE = flags.DEFINE_string(
  'compilation_cache', None, 'Keep compiled programs here, across runs.'
)


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments {argv[1:]}')
  logging.set_verbosity(logging.WARNING)  # orbax tells of every file
  from utilized_rank.experiment import pipeline

  if _CACHE.value:
    jax.config.update('jax_compilation_cache_dir', _CACHE.value)
  try:
    pipeline.run(_CONFIG.value, str(_WORKDIR.value))
  except (ValueError, OSError) as error:
    logging.debug('failed', exc_info=True)
    raise SystemExit(f'error: {error}') from error


def _parse(argv: list[str]) -> list[str]:
  try:
    return app.parse_flags_with_usage(argv)
  except AttributeError as error:
    # ml_collections names the key that it does not know, and nothing else.
    key = re.findall(r'\w+', str(error))[0]
    given = [a for a in argv if a.startswith('--config.') and key in a]
    raise SystemExit(
      f'error: the config has no key {key!r}, given as {given}; its keys are '
      'in the file that --config names'
    ) from error


if __name__ == '__main__':
  jax.config.config_with_absl()
  flags.mark_flags_as_required(['config', 'workdir'])
  app.run(main, flags_parser=_parse)

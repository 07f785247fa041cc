"""Runs an experiment: train, collect, measure, factorize, finetune, report.

  python -m launch.main --config=configs/digits_vit.py --workdir=runs/digits

Any value of the config can be overridden: `--config.train.steps=3000`. A run
that is started again goes on after its last finished stage.
"""

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
  from utilized_rank import pipeline

  if _CACHE.value:
    jax.config.update('jax_compilation_cache_dir', _CACHE.value)
  try:
    pipeline.run(_CONFIG.value, _WORKDIR.value)
  except (ValueError, OSError) as error:
    logging.debug('failed', exc_info=True)
    raise SystemExit(f'error: {error}') from error


if __name__ == '__main__':
  # orbax tells of every file it opens.
  flags.FLAGS.set_default('verbosity', logging.WARNING)
  jax.config.config_with_absl()
  flags.mark_flags_as_required(['config', 'workdir'])
  app.run(main)

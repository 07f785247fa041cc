"""Runs an experiment: train, collect, measure, factorize, finetune, report.

  python -m launch.main --config=configs/digits_vit.py --workdir=runs/digits

Any value of the config can be overridden: `--config.train.steps=3000`. A run
that is started again goes on after its last finished stage. The command
`utilized-rank run` does the same, and JAX's own flags are taken here.
"""

from absl import app
from absl import flags
import jax

from utilized_rank.command import run

if __name__ == '__main__':
  jax.config.config_with_absl()
  run.define(flags.FLAGS)
  app.run(run.main, flags_parser=run.parse)

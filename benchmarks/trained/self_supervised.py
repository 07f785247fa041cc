"""Utilization of one ViT after supervised and masked-autoencoder training.

  python -m benchmarks.self_supervised --data_root=DIR \
    --config=configs/self_supervised.py:cpu

DIR holds the `.npz` files of `data/`. Every seed trains the same encoder on
the same images twice, with labels and as a masked autoencoder; the untrained
encoder is the third. Utilization of all is measured on the same held-out
images, uncentred and centred. Writes `self_supervised_NAME.json` and `.png`.
A run that is started again goes on where it stopped.
Takes ten minutes for a seed on two CPU cores.
"""

import json
import os
import pathlib
import time

from absl import app
from absl import flags
from absl import logging
import jax
import jax.numpy as jnp
from ml_collections import config_flags
import numpy as np

from benchmarks.shared import record
import utilized_rank as ur
from utilized_rank.data import splits
from utilized_rank.models.vit import ViT
from utilized_rank.training import masked_autoencoder
from utilized_rank.training import objectives
from utilized_rank.training import train

_CONFIG = config_flags.DEFINE_config_file(
  'config', 'configs/self_supervised.py:cpu', 'Size of the experiment.'
)
_DATA_ROOT = flags.DEFINE_string(
  'data_root', None, 'Holds data/.', required=True
)
_WORKDIR = flags.DEFINE_string(
  'workdir', 'runs/self_supervised', 'Of the runs.'
)
_NAME = flags.DEFINE_string('name', 'cpu', 'Of the result.')
_OUT = flags.DEFINE_string('out', str(record.RESULTS), 'Directory of results.')

TRAININGS = ('untrained', 'supervised', 'masked autoencoder')
# Block kernels: what supervised and self-supervised models share.
SELECT = (
  (r'params/Transformer/encoderblock_\d+/.*kernel', True),
  ('.*', False),
)
PROBE_IMAGES = 5_000


def main(argv: list[str]) -> None:
  del argv
  logging.set_verbosity(logging.WARNING)
  config = _CONFIG.value
  config.data.data_dir = os.path.join(_DATA_ROOT.value, 'data')
  result = run(config, pathlib.Path(_WORKDIR.value))
  config.data.data_dir = 'DIR/data'  # what is written names no machine
  out = pathlib.Path(_OUT.value) / f'self_supervised_{_NAME.value}'
  for centered, comparison in result['comparisons'].items():
    print(f'\n{comparison}')
    comparison.plot().savefig(f'{out}{"_centred" if centered else ""}.png')
  record.write(
    out.with_suffix('.json'),
    'self_supervised',
    {
      'config': json.loads(config.to_json_best_effort()),
      'runs': result['runs'],
      **{
        'centred' if centered else 'uncentred': comparison.json()
        for centered, comparison in result['comparisons'].items()
      },
    },
  )


def run(config, workdir: pathlib.Path):
  """Trains and measures whatever is not there yet.

  Returns:
    `runs`, facts of every model, and `comparisons`, one `ur.compare` of the
    uncentred (False) and one of the centred (True) reports.
  """
  sources = splits.load(config.data.to_dict())
  model = ViT(num_classes=sources['train'].num_classes, **config.model)
  runs, names = [], []
  reports: dict[bool, list[ur.Report]] = {False: [], True: []}
  for seed in config.seeds:
    for training in TRAININGS:
      folder = workdir / f'seed{seed}' / training.replace(' ', '_')
      fact = _finished(folder) or _one(
        config, sources, model, seed, training, folder
      )
      runs.append(fact)
      names.append(training)
      for centered, path in _report_paths(folder).items():
        reports[centered].append(ur.Report.load(path))
  return {
    'runs': runs,
    'comparisons': {
      centered: ur.compare(found, names, energies=config.energies)
      for centered, found in reports.items()
    },
  }


def _report_paths(folder):
  return {
    c: folder / f'report_{"un" * (not c)}centred.json' for c in (False, True)
  }


def _finished(folder):
  path = folder / 'run.json'
  return json.loads(path.read_text()) if path.exists() else None


def _one(config, sources, model, seed, training, folder):
  folder.mkdir(parents=True, exist_ok=True)
  since = time.monotonic()
  variables = _trained(config, sources, model, seed, training, folder / 'train')
  seconds = time.monotonic() - since
  forward = train.linen_forward(model)
  moments = ur.collect(
    lambda v, batch: forward(v, batch['image']),
    variables,
    sources['calibration'].epoch(100),
    select=SELECT,
    progress=False,
  )
  for centered, path in _report_paths(folder).items():
    ur.measure(variables, moments, centered=centered).save(path)
  fact = {
    'seed': seed,
    'training': training,
    'seconds': round(seconds, 1),
    'probe_accuracy': _probe(model, variables, sources),
  }
  if training == 'supervised':
    scores = train.evaluate(forward, variables, sources['test'].epoch(500))
    fact['test_accuracy'] = scores['accuracy']
  (folder / 'run.json').write_text(json.dumps(fact))
  print(fact, flush=True)
  return fact


def _trained(config, sources, model, seed, training, folder):
  """The encoder's variables; every training of a seed starts from the same."""
  shape = sources['train'].image_shape
  decoder = masked_autoencoder.decoder_of(model, shape, **config.decoder)
  start = masked_autoencoder.init(
    model, decoder, jax.random.key(seed), jnp.zeros((1, *shape))
  )
  if training == 'untrained':
    return start['encoder']
  masked = training != 'supervised'
  options = {'seed': seed, **(config.masked if masked else config.supervised)}
  options = train.TrainConfig(**options)
  batches = lambda step: sources['train'].batches(
    options.batch_size, seed=seed, start_step=step
  )
  if masked:
    objective = masked_autoencoder.objective(
      model, decoder, masked=config.masked_share
    )
  else:
    objective = objectives.supervised(train.linen_forward(model))
    start = start['encoder']
  trained = train.minimize(
    objective, start, batches, options, directory=folder, desc=training
  )
  return trained['encoder'] if masked else trained


def _probe(model, variables, sources) -> float:
  """Test accuracy of a ridge regression on the averaged tokens."""
  features = jax.jit(
    lambda v, x: masked_autoencoder.encode(model, v, x).mean(axis=1)
  )

  def gather(source, count):
    parts, labels = [], []
    for batch in source.epoch(500):
      parts.append(np.asarray(features(variables, batch['image'])))
      labels.append(batch['label'])
      if sum(map(len, labels)) >= count:
        break
    x = np.concatenate(parts).astype(np.float64)
    return np.pad(x, ((0, 0), (0, 1)), constant_values=1.0), np.concatenate(
      labels
    )

  x, y = gather(sources['train'], PROBE_IMAGES)
  gram = x.T @ x
  ridge = 1e-4 * np.trace(gram) / len(gram) * np.eye(len(gram))
  w = np.linalg.solve(gram + ridge, x.T @ np.eye(model.num_classes)[y])
  x, y = gather(sources['test'], len(sources['test']))
  return float(np.mean((x @ w).argmax(axis=1) == y))


if __name__ == '__main__':
  app.run(main)

"""The main job over seeds: accuracy of half and of a quarter against dense.

  python -m benchmarks.digits_seeds --workdir=runs/seeds

Writes benchmarks/results/digits_seeds.json. Every seed is a whole run of
configs/digits_vit.py; finished ones are not run again.
Takes three minutes for a seed on two idle CPU cores.
"""

import importlib.util
import json
import os
import pathlib
import statistics

from absl import app
from absl import flags
from absl import logging

from benchmarks.shared import record
from utilized_rank.experiment import pipeline

_ROOT = pathlib.Path(__file__).parents[2]
_WORKDIR = flags.DEFINE_string('workdir', 'runs/seeds', 'One run per seed.')
_SEEDS = flags.DEFINE_list('seeds', list(map(str, range(10))), 'Seeds.')
_OUT = flags.DEFINE_string(
  'out', str(record.RESULTS / 'digits_seeds.json'), 'Result.'
)


def main(argv: list[str]) -> None:
  del argv
  logging.set_verbosity(logging.WARNING)
  runs = {}
  for seed in map(int, _SEEDS.value):
    config = _config()
    config.seed = seed
    folder = os.path.join(_WORKDIR.value, f'seed{seed}')
    runs[seed] = pipeline.run(config, folder)
  any_run = next(iter(runs.values()))
  result = {
    'versions': any_run['versions'],
    'rows': _rows(list(runs.values())),
    'seeds': {
      str(seed): {
        'seconds': run['seconds'],
        'mean_layer_utilization': run['mean_layer_utilization'],
        'dense': run['dense'],
        'compressed': run['compressed'],
      }
      for seed, run in runs.items()
    },
  }
  record.write(pathlib.Path(_OUT.value), 'digits_seeds', result)
  for row in result['rows']:
    print(json.dumps(row))


def _config():
  path = _ROOT / 'configs/digits_vit.py'
  spec = importlib.util.spec_from_file_location('digits_vit', path)
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config()


def _rows(runs):
  """Mean over seeds, how far the seeds spread, and the paired difference."""
  dense = [run['dense']['test_accuracy'] for run in runs]
  rows = [{'params_fraction': 1.0, **_spread('test_accuracy', dense)}]
  for i, first in enumerate(runs[0]['compressed']):
    parts = [run['compressed'][i] for run in runs]
    row = {'params_fraction': first['params_fraction']}
    for name in ('test_accuracy_before_finetune', 'test_accuracy'):
      row |= _spread(name, [part[name] for part in parts])
    points = [100 * (p['test_accuracy'] - d) for p, d in zip(parts, dense)]
    row |= _spread('points_vs_dense', points)
    if len(points) > 1:
      error = statistics.stdev(points) / len(points) ** 0.5
      row['points_vs_dense_standard_error'] = round(error, 5)
    rows.append(row)
  return rows


def _spread(name, values):
  return {
    name: round(statistics.mean(values), 5),
    f'{name}_range': [round(min(values), 5), round(max(values), 5)],
  }


if __name__ == '__main__':
  app.run(main)

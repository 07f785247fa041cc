"""Accuracy given back by fine-tuning, on real networks, by recipe.

  python -m benchmarks.recovery --data_root=DIR --workdir=runs/recovery \\
    [--networks digits_vit ...] [--recipes plain muon ...] [--seeds 0 1 2]

DIR holds `networks/` and `data/` (see `benchmarks/networks`). Each network is
cut to each share of its kernels' parameters by `ur.compress` and fine-tuned by
each recipe on training examples; the best parameters on validation examples
are kept. The dense network is fine-tuned as long, and stands beside. Two
recipes train the network before it is cut as well, within the same number of
updates (`benchmarks/shared/preparing.py`). Every run is a row on disk as soon
as it is done, and is not run again. For the last line of a network the recipe
that is best on validation is taken, and only it and the dense network see the
test examples. Writes `recovery.json` and `.png`.
Takes two minutes for a run of digits_vit on two CPU cores, hours for one of a
ResNet or a ViT.
"""

from __future__ import annotations

from collections.abc import Iterable
import functools
import json
import pathlib
import statistics
from typing import Any

import jax
import numpy as np

from benchmarks import networks
from benchmarks.shared import cache
from benchmarks.shared import preparing
from benchmarks.shared import record
from benchmarks.shared import tasks
from benchmarks.trained import recovery_plots
import utilized_rank as ur
from utilized_rank.host import files

FRACTIONS = (0.5, 0.25)
RATE = 5e-4
DENSE = 'dense'
# Arguments of `ur.finetune`, and of its optimizer.
RECIPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
  'plain': ({}, {}),
  'labels': ({'distill_weight': 0.0}, {}),
  'distilled': ({'distill_weight': 1.0}, {}),
  'balanced': ({'balance': True}, {}),
  'decay': ({}, {'weight_decay': 0.05}),
  'product_decay': ({}, {'weight_decay': 0.05, 'decay_products': True}),
  'pair_rates': ({}, {'pair_rates': True}),
  'muon': ({}, {'kind': 'muon'}),
  'balanced_muon': ({'balance': True}, {'kind': 'muon'}),
  'ema': ({'ema': 0.99}, {}),
  **dict.fromkeys(preparing.PREPARATIONS, ({}, {})),
}


def compressed(
  task: tasks.Task, fraction: float, recipe: str, seed: int,
  folder: pathlib.Path, steps: int,
) -> Any:  # fmt: skip
  """The tree of a share, made once for recipes that cut the same network."""
  path = cut_of(recipe, folder)
  if not path.exists():
    params = task.params
    if recipe in preparing.PREPARATIONS:
      preparation = preparing.PREPARATIONS[recipe]
      of_round, _ = preparation.updates(steps)

      def tune(tree: Any, part: str) -> Any:
        how = 'plain' if _is_cut(tree) else DENSE
        return tuned(
          task, tree, how, seed, folder / f'{recipe}_{part}', of_round
        )

      params = preparation.prepare(task, fraction, tune)
    small, _ = ur.compress(
      task.fn,
      params,
      task.calibration(),
      params_fraction=fraction,
      loss=ur.sampled_cross_entropy(),
      select=task.select,
    )
    ur.save(path, small)
  return ur.load(path)


def cut_of(recipe: str, folder: pathlib.Path) -> pathlib.Path:
  """Where the tree is that a recipe begins with after the cut."""
  is_apart = recipe in preparing.PREPARATIONS
  return folder / (f'{recipe}_compressed' if is_apart else 'compressed')


def left_of(recipe: str, steps: int) -> int:
  """Updates after the cut."""
  if recipe in preparing.PREPARATIONS:
    return preparing.PREPARATIONS[recipe].updates(steps)[1]
  return steps


def _is_cut(tree: Any) -> bool:
  is_pair = lambda v: isinstance(v, ur.LowRank)
  return any(map(is_pair, jax.tree.leaves(tree, is_leaf=is_pair)))


def tuned(
  task: tasks.Task, small: Any, recipe: str, seed: int, folder: pathlib.Path,
  steps: int,
) -> Any:  # fmt: skip
  """What a recipe makes of a tree."""
  how, rates = ({}, {}) if recipe == DENSE else RECIPES[recipe]
  weight = how.get('distill_weight', 0.5)
  if recipe == DENSE:
    weight = 0.0  # it would imitate itself
  if not task.labels:
    weight = 1.0
  return ur.finetune(
    task.fn,
    small,
    task.params,
    task.batches(seed),
    loss=tasks.labels if task.labels else None,
    divergence=ur.kl_divergence(),
    **{**how, 'distill_weight': weight},
    steps=steps,
    optimizer=ur.FactorOptimizer(learning_rate=RATE, **rates),
    validation=task.whole(task.validation),
    metric=metric(task),
    validate_every=max(1, steps // 20),
    directory=folder,
    checkpoint_every=max(1, steps // 4),
    seed=seed,
    desc=f'{task.name} {recipe}',
  )


def metric(task: tasks.Task) -> Any:
  """What is judged by, lower being better: mistakes, or nats of text."""
  return tasks.mistakes if task.labels else tasks.labels


@functools.partial(jax.jit, static_argnums=(0, 1))
def _values(fn: Any, judge: Any, tree: Any, batch: Any) -> Any:
  return judge(ur.low_rank(fn)(tree, batch), batch)


def score(task: tasks.Task, tree: Any, examples: tasks.Batch) -> float:
  """Mean of the metric; of mistakes in percent."""
  values = [
    np.asarray(_values(task.fn, metric(task), tree, batch))
    for batch in task.whole(examples)
  ]
  mean = float(np.concatenate(values).mean())
  return round(100 * mean if task.labels else mean, 4)


def row_of(
  task: tasks.Task, fraction: float, recipe: str, seed: int,
  folder: pathlib.Path, steps: int,
) -> dict[str, Any]:  # fmt: skip
  """One run, made now or read: what validation says before and after."""
  path = folder / f'{recipe}.json'
  if path.exists():
    return json.loads(path.read_text('utf-8'))
  small = task.params
  if recipe != DENSE:
    small = compressed(task, fraction, recipe, seed, folder, steps)
  left = left_of(recipe, steps)
  after = tuned(task, small, recipe, seed, folder / recipe, left)
  ur.save(folder / f'{recipe}_tuned', after, overwrite=True)
  row = {
    'network': task.name,
    'fraction': fraction,
    'recipe': recipe,
    'seed': seed,
    'steps': steps,
    'params': ur.count_params(after),
    'before': score(task, small, task.validation),
    'after': score(task, after, task.validation),
  }
  files.write_text(path, json.dumps(row))
  print(row, flush=True)
  return row


def test_row(
  task: tasks.Task, fraction: float, recipe: str, seed: int,
  folder: pathlib.Path,
) -> dict[str, Any]:  # fmt: skip
  """The chosen recipe on the test, before and after."""
  tuned_ = ur.load(folder / f'{recipe}_tuned')
  small = task.params if recipe == DENSE else ur.load(cut_of(recipe, folder))
  return {
    'network': task.name,
    'fraction': fraction,
    'recipe': recipe,
    'seed': seed,
    'params': ur.count_params(tuned_),
    'test_before': score(task, small, task.test),
    'test_after': score(task, tuned_, task.test),
  }


def best_recipe(rows: list[dict[str, Any]], network: str, fraction: float):
  """The recipe of the least mean on validation."""
  found: dict[str, list[float]] = {}
  for row in rows:
    if (row['network'], row['fraction']) == (network, fraction):
      found.setdefault(row['recipe'], []).append(row['after'])
  return min(found, key=lambda recipe: statistics.mean(found[recipe]))


def summary(tests: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """Mean over seeds, and the paired excess over the dense network."""
  dense = {
    (t['network'], t['seed']): t['test_after']
    for t in tests
    if t['recipe'] == DENSE
  }
  lines = []
  for network, fraction in dict.fromkeys(
    (t['network'], t['fraction']) for t in tests
  ):
    mine = [
      t for t in tests if (t['network'], t['fraction']) == (network, fraction)
    ]
    excess = [t['test_after'] - dense[network, t['seed']] for t in mine]
    several = len(excess) > 1
    error = statistics.stdev(excess) / len(excess) ** 0.5 if several else None
    lines.append(
      {
        'network': network,
        'fraction': fraction,
        'recipe': mine[0]['recipe'],
        'seeds': len(mine),
        'test_before': _mean(t['test_before'] for t in mine),
        'test_after': _mean(t['test_after'] for t in mine),
        'over_dense': _mean(excess),
        'over_dense_error': None if error is None else round(error, 4),
      }
    )
  return lines


def _mean(values: Iterable[float]) -> float:
  return round(statistics.mean(values), 4)


def main():
  names = list(tasks.TASKS)
  parser = networks.parser(
    __doc__,
    default=names,
    choices=names,
    fractions=FRACTIONS,
    out=record.RESULTS,
  )
  parser.add_argument('--workdir', type=pathlib.Path, required=True)
  parser.add_argument(
    '--recipes', nargs='+', default=['plain'], choices=list(RECIPES)
  )
  parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2])
  parser.add_argument('--steps', type=int, help="in place of a task's own")
  args = parser.parse_args()
  root = args.workdir.absolute()
  root.mkdir(parents=True, exist_ok=True)
  rows: list[dict[str, Any]] = []
  tests: list[dict[str, Any]] = []
  with cache.compilations():
    for network in args.networks:
      made = {}
      for seed in args.seeds:
        task = tasks.TASKS[network](args.data_root, seed, str(root))
        made[seed] = task
        steps = args.steps or task.steps
        for fraction, recipes in [
          (1.0, [DENSE]),
          *((f, args.recipes) for f in args.fractions),
        ]:
          folder = root / network / f'{fraction}_seed{seed}'
          folder.mkdir(parents=True, exist_ok=True)
          rows += [
            row_of(task, fraction, recipe, seed, folder, steps)
            for recipe in recipes
          ]
      for fraction in (1.0, *args.fractions):
        chosen = best_recipe(rows, network, fraction)
        for seed, task in made.items():
          folder = root / network / f'{fraction}_seed{seed}'
          tests.append(test_row(task, fraction, chosen, seed, folder))
      for line in summary(tests):
        if line['network'] == network:
          print(line, flush=True)
  result = {
    'metric': 'percent of mistakes; nats per token of stories260k',
    'rows': rows,
    'tests': tests,
    'summary': summary(tests),
  }
  record.write(args.out / 'recovery.json', 'recovery', result)
  recovery_plots.plot(result, args.out / 'recovery.png')


if __name__ == '__main__':
  main()

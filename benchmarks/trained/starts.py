"""From which start fine-tuning recovers most, and what tells it before.

  python -m benchmarks.starts --data_root=DIR \\
    [--networks resnet20_cifar10 ...] [--fractions 0.25] [--steps 100] \\
    [--starts compress 'one prediction' ...]

Each network is cut to a share of its kernels' parameters in several ways,
without labels. Every such start is looked at as it is, after a rehearsal (so
many updates towards the dense outputs, on the calibration examples: `distill`)
and after fine-tuning on labels and dense outputs (`finetune`, as many updates
from one stream of training examples), always on validation examples. What
orders the starts as their nats after fine-tuning do tells it before: the rank
correlation over a network's starts, and how far the start that it would take is
from the best.
Takes a quarter of an hour for a start of ResNet-20 on two CPU cores.
"""

from __future__ import annotations

from collections.abc import Callable
import functools
import tempfile
from typing import Any

import numpy as np
import scipy.stats

from benchmarks import networks
from benchmarks.shared import judging
from benchmarks.shared import record
from benchmarks.shared import tasks
import utilized_rank as ur
from utilized_rank.ranks.trials import divergences
from utilized_rank.refit.distill import distill

RATE = 5e-4
SEED = 0
BEFORE = ('cut_divergence', 'cut_mistakes', 'rehearsed_divergence')
AFTER = 'tuned_nats'
KL = ur.kl_divergence()

Start = Callable[[tasks.Task, ur.Moments, float], Any]


def searched(
  task: tasks.Task, moments: ur.Moments, share: float, **options: Any
) -> Any:
  """What `compress` takes for the nearest, not trained on dense outputs."""
  tree, _ = ur.compress(
    task.fn, task.params, task.calibration(), moments=moments,
    params_fraction=share, loss=ur.sampled_cross_entropy(), refine=0,
    progress=False, **options,
  )  # fmt: skip
  return tree


def predicted(
  task: tasks.Task,
  moments: ur.Moments,
  share: float,
  method: str,
  ranks_of: Callable[..., Any],
) -> Any:
  """Factors of closed form: nothing is tried."""
  ranks = ranks_of(
    task.params, moments, params_fraction=share, gauge='identity'
  )
  return ur.factorize(
    task.params, moments, ranks, method=method, gauge='identity',
    progress=False,
  )  # fmt: skip


STARTS: dict[str, Start] = {
  'compress': searched,
  'pairs searched for': functools.partial(searched, heads=False, layers=False),
  'not anchored': functools.partial(
    searched, heads=False, layers=False, anchored=False
  ),
  'one prediction': functools.partial(
    predicted,
    method='loss',
    ranks_of=functools.partial(ur.budget_ranks, progress=False, method='loss'),
  ),
  'uniform ranks': functools.partial(
    predicted, method='output', ranks_of=ur.uniform_ranks
  ),
  'SVD': functools.partial(
    predicted, method='weight', ranks_of=ur.uniform_ranks
  ),
}


def judged(task: tasks.Task, tree: Any, name: str) -> dict[str, float]:
  """What validation says of a tree: KL divergence, nats, mistakes (%)."""
  of = {
    f'{name}_divergence': KL,
    f'{name}_nats': lambda dense, outputs, batch: tasks.labels(outputs, batch),
    f'{name}_mistakes': lambda dense, outputs, batch: (
      100 * tasks.mistakes(outputs, batch)
    ),
  }
  batches = task.whole(task.validation)
  found = {
    key: divergences(task.fn, task.params, tree, batches, measure)
    for key, measure in of.items()
  }
  return {key: round(float(v.mean()), 4) for key, v in found.items()}


def row(task: tasks.Task, name: str, tree: Any, steps: int) -> dict[str, Any]:
  """A start as it is, rehearsed and fine-tuned."""
  near = distill(
    task.fn, task.params, tree, task.calibration(), divergence=KL,
    steps=steps, progress=False,
  )  # fmt: skip
  with tempfile.TemporaryDirectory() as folder:
    tuned = ur.finetune(
      task.fn, tree, task.params, task.batches(SEED), loss=tasks.labels,
      divergence=KL, distill_weight=0.5, steps=steps,
      optimizer=ur.FactorOptimizer(learning_rate=RATE),
      directory=folder, progress=False, seed=SEED,
    )  # fmt: skip
  return {
    'start': name,
    'params': ur.count_params(tree),
    **judged(task, tree, 'cut'),
    **judged(task, near, 'rehearsed'),
    **judged(task, tuned, 'tuned'),
  }


def told(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
  """Of each sign: its rank correlation with the end, and what it would cost."""
  end = np.array([r[AFTER] for r in rows])
  found = {}
  for sign in BEFORE:
    values = np.array([r[sign] for r in rows])
    alike = scipy.stats.spearmanr(values, end).statistic
    found[sign] = {
      'rank_correlation': round(float(alike), 3),
      'over_best': round(float(end[values.argmin()] - end.min()), 5),
    }
  return found


def run(
  root: str, name: str, fractions: list[float], steps: int, starts: list[str]
) -> dict:
  with tempfile.TemporaryDirectory() as folder:
    task = tasks.TASKS[name](root, SEED, folder)
  moments = ur.collect(
    task.fn, task.params, task.calibration(), loss=ur.sampled_cross_entropy(),
    select=task.select, progress=False,
  )  # fmt: skip
  found: dict[str, Any] = {}
  for share in fractions:
    rows = []
    for start in starts:
      tree = STARTS[start](task, moments, share)
      rows.append(
        {
          'kept': round(judging.share_kept(tree, moments), 4),
          **row(task, start, tree, steps),
        }
      )
      print(f'{name} {share:.0%}', rows[-1], flush=True)
    found[f'{share:g}'] = {'rows': rows, 'told': told(rows)}
    print(found[f'{share:g}']['told'], flush=True)
  return {'steps': steps, 'batch_size': task.batch_size, 'shares': found}


def main() -> None:
  names = [n for n in tasks.TASKS if not n.startswith(('stories', 'vit'))]
  parser = networks.parser(
    __doc__,
    default=['resnet20_cifar10'],
    choices=names,
    fractions=(0.25,),
    out=record.RESULTS / 'starts.json',
  )
  parser.add_argument('--steps', type=int, default=100)
  parser.add_argument(
    '--starts', nargs='+', default=list(STARTS), choices=list(STARTS)
  )
  args = parser.parse_args()
  networks.write_each(
    args,
    'starts',
    {'examples': SEED, 'sampled_cross_entropy': 0},
    lambda name, root: run(root, name, args.fractions, args.steps, args.starts),
  )


if __name__ == '__main__':
  main()

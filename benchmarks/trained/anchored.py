"""Anchored factors against independent ones, without fine-tuning.

  python -m benchmarks.anchored --data_root=DIR [--networks char_mlp ...]

DIR holds `networks/` and `data/` (see `benchmarks/networks`). Uniform ranks, so
that only the factors differ: of closed form, fitted behind compressed kernels
(`anchor`), and trained, each block on its own (`refine`), all end to end
(`distill`), or one after the other. The character MLP, trained here in a minute
or two unless `--cache` names a file to keep it in, is cut to rank fraction 0.15
with 512, 2,048 and 8,192 calibration positions; the others to shares of their
kernels' parameters. Writes `anchored_NAME.json`.
"""

from __future__ import annotations

import argparse
import functools
import time
from typing import Any, NamedTuple

import numpy as np

from benchmarks import networks
from benchmarks.networks import char_mlp
from benchmarks.shared import judging
from benchmarks.shared import record
import utilized_rank as ur

FRACTIONS = (0.35, 0.25, 0.15)
RANK_FRACTION = 0.15
POSITIONS = (512, 2048, 8192)
# Calibration batches: a fifth of them judges what training does.
BATCHES = 10


class Recipe(NamedTuple):
  """A method, the ridge of `anchor` (None: `factorize`), and training."""

  method: str
  ridge: float | None = None
  trained: str = ''

  @property
  def before(self) -> Recipe:
    """What is trained."""
    done = 'blocks' if self.trained == BOTH else ''
    return self._replace(trained=done)


BOTH = 'blocks, ends'


REFERENCE = Recipe('loss')
RECIPES = (
  REFERENCE,
  Recipe('weight'),
  Recipe('output'),
  Recipe('output', 0.2),
  Recipe('loss', 0.0),
  Recipe('loss', 0.2),
  Recipe('output', trained='blocks'),
  Recipe('loss', trained='blocks'),
  Recipe('output', 0.2, 'blocks'),
  Recipe('loss', 0.2, 'blocks'),
  Recipe('weight', trained='ends'),
  Recipe('loss', trained='ends'),
  Recipe('loss', 0.2, 'ends'),
  Recipe('loss', trained=BOTH),
  Recipe('loss', 0.2, BOTH),
)
GROUPS = {'kwt1': lambda path: path.split('/')[0]}


def batches_of(x: np.ndarray) -> list[dict[str, np.ndarray]]:
  """About ten batches of one size; what is left over is left out."""
  size = max(1, len(x) // BATCHES)
  return [{'x': x[i * size : (i + 1) * size]} for i in range(BATCHES)]


def make(network, moments, batches, ranks, recipe: Recipe, known: dict):
  """The tree of a recipe, and CPU seconds; trained from a known one."""
  start = time.process_time()
  params = network.params
  if recipe.trained in ('ends', BOTH):
    small = ur.distill(
      network.fn,
      params,
      known[recipe.before],
      batches,
      divergence=ur.kl_divergence(),
      progress=False,
    )
  elif recipe.trained:
    small = ur.refine(
      network.fn,
      params,
      known[recipe.before],
      batches,
      loss=ur.sampled_cross_entropy() if recipe.method == 'loss' else None,
      group=GROUPS.get(network.name),
      progress=False,
    )
  elif recipe.ridge is None:
    small = ur.factorize(params, moments, ranks, method=recipe.method)
  else:
    small = ur.anchor(
      network.fn,
      params,
      batches,
      ranks,
      moments=moments,
      method=recipe.method,
      ridge=recipe.ridge,
      progress=False,
    )
  known[recipe] = small
  return small, time.process_time() - start


def measure(network, rows: int | None, choose, asked: float) -> list[dict]:
  """One row per recipe, the folds pooled.

  Args:
    network: a ported network.
    rows: calibration examples; None for all.
    choose: from moments to ranks.
    asked: what the ranks were chosen for, for the record.
  """
  found: dict[Recipe, list] = {}
  seconds = dict.fromkeys(RECIPES, 0.0)
  dense = []
  for calibration, judged in network.folds:
    batches = batches_of(calibration['x'][:rows])
    moments = ur.collect(
      network.fn,
      network.params,
      batches,
      loss=ur.sampled_cross_entropy(),
      select=network.select,
      progress=False,
    )
    judge = judging.Judge(network, moments, judged)
    dense.append(judge(network.params))
    ranks = choose(moments)
    known: dict[Recipe, Any] = {}
    for recipe in RECIPES:
      small, taken = make(network, moments, batches, ranks, recipe, known)
      found.setdefault(recipe, []).append(judge(small))
      seconds[recipe] += taken
  pooled = {recipe: judging.pool(parts) for recipe, parts in found.items()}
  base = judging.pool(dense)
  out = [_row(None, base, base, base) | {'asked': 1.0}]
  for recipe in RECIPES:
    row = _row(recipe, pooled[recipe], pooled[REFERENCE], base)
    out.append(row | {'asked': asked, 'cpu_s': round(seconds[recipe], 1)})
  for row in out:
    row['examples'] = rows or len(network.folds[0][0]['x'])
  return out


def _row(recipe: Recipe | None, scores, reference, dense) -> dict:
  over, error = judging.excess(scores, reference)
  recipe = recipe or Recipe('dense')
  return {
    'method': recipe.method,
    'anchored': recipe.ridge is not None,
    'ridge': recipe.ridge,
    'trained': recipe.trained,
    **judging.means(scores),
    'increase': judging.excess(scores, dense)[0],
    'over_loss': over,
    'over_loss_error': error,
  }


def show(rows: list[dict]) -> None:
  print(
    f'\nasked {rows[-1]["asked"]}, {rows[-1]["examples"]} examples; last '
    "column: cross-entropy over 'loss', paired"
  )
  print(
    f'{"method":8}{"ridge":>6}{"trained":>14}{"acc %":>8}{"CE":>8}{"KL":>8}'
    f'{"CPU s":>7}  over'
  )
  for r in rows:
    ridge = '-' if r['ridge'] is None else r['ridge']
    print(
      f'{r["method"]:8}{ridge:>6}{r["trained"] or "-":>14}'
      f'{100 * r["accuracy"]:8.2f}{r["cross_entropy"]:8.3f}{r["kl"]:8.3f}'
      f'{r.get("cpu_s", 0):7.1f}  {r["over_loss"]:+.4f} +- '
      f'{r["over_loss_error"]:.4f}',
      flush=True,
    )


def run(name: str, args: argparse.Namespace) -> dict:
  print(f'\n== {name}')
  start = time.perf_counter()
  rows = []
  if name == 'char_mlp':
    network = char_mlp.load(args.data_root, args.cache)
    uniform = lambda moments: {
      path: round(RANK_FRACTION * moments[path].layout.full_rank)
      for path in moments
    }
    for count in args.positions:
      rows += measure(network, count, uniform, RANK_FRACTION)
      show(rows[-len(RECIPES) - 1 :])
  else:
    network = networks.LOADERS[name](args.data_root)
    for fraction in args.fractions:
      choose = functools.partial(
        ur.uniform_ranks, network.params, params_fraction=fraction
      )
      rows += measure(network, None, choose, fraction)
      show(rows[-len(RECIPES) - 1 :])
  return {
    'network': name,
    'protocol': network.protocol,
    'batches': BATCHES,
    'seeds': {'sampled_cross_entropy': 0, 'training': 0},
    'seconds': round(time.perf_counter() - start, 1),
    'rows': rows,
  }


def main():
  parser = networks.parser(
    __doc__,
    default=['char_mlp', 'mlp_fmnist_relu', 'kwt1'],
    fractions=FRACTIONS,
    out=record.RESULTS,
  )
  parser.add_argument('--positions', nargs='+', type=int, default=POSITIONS)
  parser.add_argument('--cache', help='.npz of the trained character MLP')
  args = parser.parse_args()
  for name in args.networks:
    result = run(name, args)
    argv = ['--data_root=DIR', '--networks', name]
    if tuple(args.fractions) != FRACTIONS:
      argv += ['--fractions', *map(str, args.fractions)]
    record.write(args.out / f'anchored_{name}.json', 'anchored', result, argv)


if __name__ == '__main__':
  main()

"""Which prediction of damage to choose ranks and factors by, on real networks.

  python -m benchmarks.predictions --data_root=DIR [--networks kwt1 ...]

DIR holds `networks/` and `data/` (see `benchmarks/networks`); `minilm` also
needs the package that `benchmarks/networks/minilm.py` names. Each network is
cut to two shares of its kernels' parameters: without gradients by uniform ranks
and by the metrics of `budget_ranks`, and with them by 'loss' and by 'coupled'
factors. What is judged, on data that calibrated nothing (1,000 examples at
most), is the KL divergence from the dense network, for MiniLM one minus the
cosine to the dense embedding. `dependence` says of each network how far a row's
input and gradient are from independent. Networks that are not asked for keep
what the result file says of them.
Takes about ten minutes on two CPU cores.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from benchmarks import networks
from benchmarks.networks import minilm as minilm_network
from benchmarks.shared import judging
from benchmarks.shared import record
from benchmarks.trained import minilm
import utilized_rank as ur
from utilized_rank.factorization.coupled import dependence
from utilized_rank.factorization.kernels import kernels

SHARES = {
  'mlp_fmnist_relu': (0.35, 0.15),
  'kwt1': (0.5, 0.25),
  'stories260k': (0.75, 0.5),
  'minilm': (0.5, 0.35),
  'resnet20_cifar10': (0.75, 0.5),
  'digits_vit': (0.25, 0.15),
}
JUDGED = 1000
# Method of the factors, and metric of the ranks or 'uniform'.
RECIPES = (
  ('output', 'uniform'),
  ('output', 'output'),
  ('output', 'relative'),
  ('output', 'balanced'),
  ('loss', 'loss'),
  ('loss', 'geometric'),
  ('coupled', 'loss'),
  ('coupled', 'geometric'),
)


class Problem(NamedTuple):
  """A network, its moments, and what says how far a tree is from it."""

  params: Any
  moments: ur.Moments
  score: Callable[[Any], float]


def published(name: str, root: str) -> Problem:
  network = networks.LOADERS[name](root)
  calibration, judged = network.folds[0]
  moments = ur.collect(
    network.fn,
    network.params,
    network.batches(calibration),
    loss=ur.sampled_cross_entropy(),
    coupled=True,
    select=network.select,
    progress=False,
  )
  few = {k: v[:JUDGED] for k, v in judged.items()}
  judge = judging.Judge(network, moments, few)
  score = lambda tree: float(judge(tree)['kl'].mean())
  return Problem(network.params, moments, score)


def sentences(root: str) -> Problem:
  params, pieces = minilm_network.load()
  texts = minilm.windows(root, pieces)
  moments = ur.collect(
    minilm.fn,
    params,
    minilm.batches(texts['calibration']),
    loss=ur.sampled_squared_error(energies=[1.0]),
    coupled=True,
    select=minilm_network.SELECT,
    progress=False,
  )
  judge = minilm.Judge(params, texts)
  return Problem(params, moments, lambda tree: 1 - judge(tree)['in'])


def cut(problem: Problem, method: str, metric: str, share: float, families):
  params, moments, _ = problem
  options = dict(method=method, families=families, progress=False)
  if metric == 'uniform':
    ranks = ur.uniform_ranks(params, moments, params_fraction=share)
  else:
    ranks = ur.budget_ranks(
      params, moments, params_fraction=share, metric=metric, **options
    )
  return ur.factorize(params, moments, ranks, **options)


def run(name: str, root: str) -> dict[str, Any]:
  problem = sentences(root) if name == 'minilm' else published(name, root)
  rows = []
  made: dict[str, ur.Families] = {}
  for method, metric in RECIPES:
    if method not in made:
      made = {
        method: ur.decompose(
          problem.params, problem.moments, method=method, progress=False
        )
      }
    for share in SHARES[name]:
      tree = cut(problem, method, metric, share, made[method])
      found = round(problem.score(tree), 5)
      rows.append(
        {
          'method': method,
          'metric': metric,
          'asked': share,
          'from_dense': found,
        }
      )
      print(f'{name:18}{share:6.0%} {method:8}{metric:10}{found:9.4f}')
  apart = [
    dependence(kernel)
    for _, members in kernels(problem.params, problem.moments)
    for kernel in members
  ]
  quantiles = dict(median=np.median(apart), most=np.max(apart))
  quantiles = {k: round(float(v), 4) for k, v in quantiles.items()}
  print(f'{name:18}dependence {quantiles}', flush=True)
  return {'dependence': quantiles, 'rows': rows}


def main():
  parser = networks.parser(
    __doc__,
    default=list(SHARES),
    choices=list(SHARES),
    out=record.RESULTS / 'predictions.json',
  )
  seeds = {'sampled_cross_entropy': 0, 'sampled_squared_error': 0}
  networks.write_each(parser.parse_args(), 'predictions', seeds, run)


if __name__ == '__main__':
  main()

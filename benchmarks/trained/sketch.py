"""What sketches of inputs know of published networks, and what they cost.

  python -m benchmarks.sketch --data_root=DIR

For every kernel whose sketch is smaller than its S: the share of tr S that is
unseen, how far k_S can be from what it is, and the output error, on all of S,
of a pair of a quarter of the kernel's numbers made from the sketch, over the
least possible. Time and memory of the sums over those of S itself, in one run,
for wide inputs.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import networks
from benchmarks.shared import record
from benchmarks.shared import timing
import utilized_rank as ur
from utilized_rank.linalg import gram
from utilized_rank.linalg import sketch
from utilized_rank.lowrank.leaf import is_low_rank
from utilized_rank.tree import paths

NAMES = ['mlp_fmnist_relu', 'kwt1', 'resnet56_cifar10', 'char_mlp']
COLUMNS = (16, 32, 64, 128)
ENERGIES = (0.95, 0.99)
SHAPES = [(1576, 3072, 512), (1576, 8192, 512), (1576, 8192, 1024)]


def error(kernel, low, second):
  """Mean square error at the outputs, on rows of this second moment."""
  off = np.asarray(kernel, np.float64)
  off = off - np.asarray(low.dense(), np.float64)
  off = low.layout.to_matrices(off)
  return np.einsum('...dm,...de,...em->', off, second, off)


def known(network):
  """One row for every number of columns, over all kernels it is for."""
  calibration, _ = network.folds[0]
  collect = functools.partial(
    ur.collect,
    network.fn,
    network.params,
    network.batches(calibration),
    select=network.select,
    progress=False,
  )
  whole = collect()
  leaves, _ = paths.flatten(network.params)
  ranks = {}
  for path, moment in whole.items():
    d, m = moment.layout.matrix_shape
    ranks[path] = max(1, round(0.25 * d * m / (d + m)))
  make = functools.partial(
    ur.factorize,
    network.params,
    ranks=ranks,
    compensate_mean=False,
    progress=False,
  )
  reports = {
    e: ur.measure(network.params, whole, energy=e, progress=False)
    for e in ENERGIES
  }
  best, _ = paths.flatten(make(moments=whole), is_low_rank)
  rows = []
  for columns in COLUMNS:
    some = [
      path
      for path, moment in whole.items()
      if sketch.saves(moment.layout.matrix_shape[0], columns)
    ]
    if not some:
      continue
    moments = collect(sketch=[('.*', columns)])
    low, _ = paths.flatten(make(moments=moments), is_low_rank)
    row = {'columns': columns, 'kernels': len(some)}
    row['widest'] = max(whole[p].layout.matrix_shape[0] for p in some)
    excess = [
      error(leaves[p], low[p], whole[p].second)
      / error(leaves[p], best[p], whole[p].second)
      for p in some
    ]
    row['error_over_least'] = quantiles(excess)
    for energy, report in reports.items():
      mine = ur.measure(network.params, moments, energy=energy, progress=False)
      layers = [n for n in mine if mine[n].columns]
      row['unseen'] = quantiles([mine[n].unseen for n in layers])
      bounds = [(mine[n], report[n].k_in) for n in layers]
      row[f'k_in_{energy}'] = {
        'above': quantiles([(b.k_in - k) / b.d_in for b, k in bounds]),
        'below': quantiles([(k - b.k_in_least) / b.d_in for b, k in bounds]),
      }
      assert all(b.k_in_least <= k <= b.k_in for b, k in bounds)
    print(row, flush=True)
    rows.append(row)
  return rows


def quantiles(values):
  return {
    'median': float(np.median(values)),
    'worst': float(np.max(values)),
  }


def costs(repeats):
  rows = []
  for n, d, columns in SHAPES:
    x = jax.random.normal(jax.random.key(0), (n, d), jnp.float32)
    fns = {
      'whole': timing.Adding(lambda x: gram.panels(x)[1], x),
      'sketch': timing.Adding(lambda x, c=columns: sketch.sketch(x, c)[1], x),
    }
    took = timing.interleaved(fns, repeats)
    row = {'rows': n, 'd': d, 'columns': columns}
    row['seconds'] = {name: spent['wall'] for name, spent in took.items()}
    row['time_over_whole'] = row['seconds']['sketch'] / row['seconds']['whole']
    row['flops_over_whole'] = sketch.flops(n, d, columns) / gram.panel_flops(
      n, d
    )
    row['numbers_over_whole'] = d * (columns + 1) / gram.panel_entries(d)
    print(row, flush=True)
    rows.append(row)
  return rows


def main():
  parser = networks.parser(
    __doc__, default=NAMES, repeats=5, out=record.RESULTS / 'sketch.json'
  )
  args = parser.parse_args()
  result = {
    'costs': costs(args.repeats),
    'networks': {
      network.name: known(network)
      for network, _ in networks.each(args.networks, args.data_root)
    },
  }
  record.write(args.out, 'sketch', result)


if __name__ == '__main__':
  main()

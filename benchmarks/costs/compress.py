"""What `compress` costs, beside an older checkout: CPU time and programs.

  python -m benchmarks.compress --data_root=DIR --base=CHECKOUT

Moments, a first share and a second one in the same process, each network and
each checkout in a process of its own, one after the other. Counts CPU seconds
of all threads (a busy machine changes them little), programs that were
compiled, and the KL divergence on data that calibrated nothing. Bars: the first
share with its moments at most a third of the older one's, the second at most a
quarter of that, no more than 25 programs, and KL no higher.
Needs a checkout of the older code (`git worktree add`).
Takes half an hour on two CPU cores.
"""

from __future__ import annotations

import json
import pathlib
import resource
from typing import Any

from benchmarks import networks
from benchmarks.shared import processes
from benchmarks.shared import record

# The share that the bar is at, and another one.
SHARES = {
  'mlp_fmnist_relu': (0.15, 0.25),
  'kwt1': (0.25, 0.15),
  'digits_vit': (0.15, 0.25),
  'resnet20_cifar10': (0.5, 0.25),
}
ROOT = pathlib.Path(__file__).parents[2]
# The library of one checkout, the benchmark of this one.
PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
import utilized_rank
sys.path[0] = sys.argv[2]
from benchmarks.costs import compress
compress.one(*sys.argv[3:])
"""


class Meter:
  """CPU seconds and compiled programs of calls."""

  def __init__(self) -> None:
    import jax

    self._programs = 0

    def listen(event, duration_secs, **_):
      del duration_secs
      self._programs += event == '/jax/core/compile/backend_compile_duration'

    jax.monitoring.register_event_duration_secs_listener(listen)

  def __call__(self, call: Any) -> tuple[Any, dict[str, float]]:
    before, programs = cpu_seconds(), self._programs
    result = call()
    return result, {
      'cpu': round(cpu_seconds() - before, 2),
      'programs': self._programs - programs,
    }


def cpu_seconds() -> float:
  """Of this process, all of its threads."""
  used = resource.getrusage(resource.RUSAGE_SELF)
  return used.ru_utime + used.ru_stime


def one(name: str, data_root: str, *shares: str) -> None:
  """Measures one network with the library that is imported; prints JSON."""
  import numpy as np

  from benchmarks.networks import common
  import utilized_rank as ur

  network = networks.LOADERS[name](data_root)
  calibration, judged = network.folds[0]
  batches, loss = network.batches(calibration), ur.sampled_cross_entropy()
  common_args = network.fn, network.params, batches
  meter = Meter()
  moments, row = meter(
    lambda: ur.collect(
      *common_args, loss=loss, select=network.select, progress=False
    )
  )
  rows: dict[str, Any] = {'collect': row}
  trees = []
  for number, share in enumerate(shares):
    (tree, _), row = meter(
      lambda share=share: ur.compress(
        *common_args,
        moments=moments,
        loss=loss,
        params_fraction=float(share),
        progress=False,
      )
    )
    rows[('first', 'second')[number]] = {'share': float(share), **row}
    trees.append(tree)
  size = network.batch_size
  dense = common.scores(network.fn, network.params, judged, size)
  for place, tree in zip(('first', 'second'), trees):
    log_p = common.scores(ur.low_rank(network.fn), tree, judged, size)
    kl = np.sum(np.exp(dense) * (dense - log_p), -1)
    rows[place]['kl'] = round(float(kl[judged['y'].astype(int) >= 0].mean()), 5)
  print(json.dumps(rows))


def compared(new: dict[str, Any], old: dict[str, Any]) -> dict[str, Any]:
  """What the bars are of.

  >>> row = {'cpu': 3.0, 'programs': 5, 'kl': 0.1}
  >>> rows = {'collect': row, 'first': row, 'second': row}
  >>> compared(rows, rows)['first']
  1.0
  """
  whole = lambda rows: rows['collect']['cpu'] + rows['first']['cpu']
  return {
    'first': round(whole(new) / whole(old), 3),
    'second': round(new['second']['cpu'] / whole(old), 3),
    'programs': new['collect']['programs'] + new['first']['programs'],
    'kl': round(new['first']['kl'] / max(old['first']['kl'], 1e-9), 3),
  }


def main():
  parser = networks.parser(
    __doc__, default=list(SHARES), out=record.RESULTS / 'compress.json'
  )
  parser.add_argument('--base', required=True, help='the older checkout')
  args = parser.parse_args()
  rows = {}
  for name in args.networks:
    measured = {
      what: processes.printed(
        '-c',
        PROGRAM,
        str(code),
        str(ROOT),
        name,
        args.data_root,
        *map(str, SHARES[name]),
      )
      for what, code in (('base', args.base), ('now', ROOT))
    }
    ratio = compared(measured['now'], measured['base'])
    rows[name] = {**measured, 'ratio': ratio}
    print(name, json.dumps(rows[name], indent=1), flush=True)
    result = {'base': record.commit(pathlib.Path(args.base)), 'rows': rows}
    record.write(args.out, 'compress', result)


if __name__ == '__main__':
  main()

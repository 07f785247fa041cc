"""Utilization of published networks, and what the paper's search finds.

  python -m benchmarks.utilization --data_root=DIR [--networks kwt1 ...]

DIR holds `networks/` and `data/` (see `benchmarks/networks`). Each network is
checked against its published numbers, measured at three energies, and searched:
per kernel the lowest energy whose projection costs no more than 0.1 % of the
accuracy on data that calibrated nothing. On few examples that means not one
more mistake. In networks of more than 24 kernels those of a block are searched
together. Writes `utilization.json` and `utilization.png`; a network whose
measurement `--workdir` holds, with the same options, is not measured again.
Takes over half an hour on two CPU cores.
"""

from __future__ import annotations

import json
import pathlib
import re
import time

import jax
import numpy as np

from benchmarks import networks
from benchmarks.networks import common
from benchmarks.shared import record
import utilized_rank as ur
from utilized_rank.linalg import subspace

ENERGIES = (0.9, 0.95, 0.99)
# The most kernels that are searched one by one.
UNGROUPED = 24


def main() -> None:
  parser = networks.parser(
    __doc__, default=list(networks.LOADERS), out=record.RESULTS
  )
  parser.add_argument('--judged', type=int, default=256, help='examples')
  parser.add_argument('--steps', type=int, default=8, help='of the search')
  parser.add_argument(
    '--workdir', type=pathlib.Path, default=pathlib.Path('runs/utilization')
  )
  args = parser.parse_args()
  options = {'judged': args.judged, 'steps': args.steps}
  args.workdir.mkdir(parents=True, exist_ok=True)
  found, reports = {}, []
  for name in args.networks:
    spectra = args.workdir / f'{name}_spectra.json'
    path = args.workdir / f'{name}.json'
    old = json.loads(path.read_text()) if path.exists() else {}
    if old.get('options') != options:
      print(name, flush=True)
      network = networks.LOADERS[name](args.data_root)
      old = {'options': options, **measure(network, **options, spectra=spectra)}
      path.write_text(json.dumps(old))
    found[name] = old
    reports.append(ur.Report.load(spectra))
  comparison = ur.compare(reports, list(found), energies=ENERGIES)
  record.write(
    args.out / 'utilization.json',
    'utilization',
    {'networks': found, 'by_depth': comparison.json()},
  )
  comparison.plot().savefig(args.out / 'utilization.png')
  print(f'\n{comparison}\n')
  for name, each in found.items():
    print(
      f'{name}: the search keeps {each["search"]["mean_layer_utilization"]:.1%}'
      f' ({each["search"]["evaluations"]} evaluations)'
    )


def measure(
  network: common.Network, judged: int, steps: int, spectra: pathlib.Path
) -> dict:
  """Utilization at three energies, and the search's; saves the report."""
  calibration, held_out = network.folds[0]
  size, since = network.batch_size, time.monotonic()
  moments = ur.collect(
    network.fn,
    network.params,
    network.batches(calibration),
    select=network.select,
    progress=False,
  )
  report = ur.measure(network.params, moments)
  held_out = {k: v[:judged] for k, v in held_out.items()}
  real = held_out['y'] >= 0
  run = jax.jit(network.fn)

  def accuracy(params) -> float:
    log_p = common.scores(run, params, held_out, min(size, len(real)))
    return float(np.mean((log_p.argmax(-1) == held_out['y'])[real]))

  by_block = len(moments) > UNGROUPED
  searched = ur.search_ranks(
    accuracy,
    network.params,
    moments,
    tolerance=1e-3,
    steps=steps,
    group=block_of if by_block else None,
    progress=False,
  )
  report.save(spectra)
  return {
    'protocol': network.protocol,
    'examples_judged': int(real.sum()),
    'mean_layer_utilization': report.json(ENERGIES)['mean_layer_utilization'],
    'search': {
      'by_block': by_block,
      'accuracy_dense': searched.baseline,
      'evaluations': len(searched.trials) + 1,
      'energies': searched.energies,
      'mean_layer_utilization': searched_utilization(report, searched),
    },
    'seconds': round(time.monotonic() - since, 1),
  }


def block_of(path: str) -> str:
  """The path up to its first numbered part.

  >>> block_of('params/Transformer/encoderblock_3/MlpBlock_3/Dense_0/kernel')
  'params/Transformer/encoderblock_3'
  """
  match = re.match(r'.*?\d[^/]*', path)
  return match[0] if match else path


def searched_utilization(
  report: ur.Report, searched: ur.SearchedRanks
) -> float:
  """MLU at each kernel's own energy; 1 where no energy was enough."""
  shares = []
  for layer in report.layers:
    share = 1.0
    if layer.path in searched.energies:
      e_in, e_out = searched.energies[layer.path]
      k_in = subspace.energy_rank(layer.spectrum_in, e_in)
      k_out = subspace.energy_rank(layer.spectrum_out, e_out)
      share = min(k_in, k_out) / layer.full_rank
    shares.append(share)
  return float(np.mean(shares))


if __name__ == '__main__':
  main()

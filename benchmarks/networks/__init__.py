"""Published networks for benchmarks; see `common.Network`.

Weights and data are read from `--data_root`, a directory with `networks/` and
`data/`; none are in this repository. `char_mlp` and `digits_vit` are
trained when they are loaded.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
import functools
import json
import pathlib
import time
from typing import Any

from benchmarks.networks import char_mlp
from benchmarks.networks import digits_vit
from benchmarks.networks import gpt_nano_sort
from benchmarks.networks import kwt1
from benchmarks.networks import mlp_fmnist_relu
from benchmarks.networks import resnet_cifar10
from benchmarks.networks import stories260k
from benchmarks.networks.common import Network
from benchmarks.shared import arguments
from benchmarks.shared import cache
from benchmarks.shared import record

LOADERS: dict[str, Callable[[str], Network]] = {
  'mlp_fmnist_relu': mlp_fmnist_relu.load,
  'kwt1': kwt1.load,
  'stories260k': stories260k.load,
  'char_mlp': char_mlp.load,
  'digits_vit': digits_vit.load,
  'gpt_nano_sort': gpt_nano_sort.load,
  **resnet_cifar10.LOADERS,
}


def parser(
  doc: str | None,
  *,
  default: Sequence[str],
  out: pathlib.Path,
  fractions: Sequence[float] | None = None,
  repeats: int | None = None,
  choices: Sequence[str] = tuple(LOADERS),
) -> argparse.ArgumentParser:
  """`arguments.parser` with where networks are, which, and how much to keep.

  Args:
    doc, out, repeats: of `arguments.parser`.
    default: names of networks; none for no such option.
    fractions: default of `--fractions`; None for no such option.
    choices: names that there are.
  """
  made = arguments.parser(doc, out=out, repeats=repeats)
  made.add_argument('--data_root', required=True)
  if default:
    made.add_argument(
      '--networks', nargs='+', default=default, choices=list(choices)
    )
  if fractions is not None:
    made.add_argument('--fractions', nargs='+', type=float, default=fractions)
  return made


def each(
  names: Sequence[str], data_root: str
) -> Iterator[tuple[Network, Callable[[], float]]]:
  """Loads one after the other; they share compiled programs.

  Yields:
    The network, and a function: seconds since its loading began.
  """
  with cache.compilations():
    for name in names:
      print(f'\n== {name}', flush=True)
      start = time.perf_counter()
      network = LOADERS[name](data_root)
      yield network, functools.partial(_since, start)


def write_each(
  args: argparse.Namespace,
  name: str,
  seeds: dict[str, int],
  run: Callable[[str, str], Any],
) -> None:
  """Runs a benchmark network by network, and writes what is known after each.

  What the result file says of other networks stays, with the day and the commit
  that it is of.

  Args:
    args: of `parser`.
    name: of the benchmark.
    seeds: to be written down.
    run: `run(name, data_root)` of a network gives its result.
  """
  known: dict[str, Any] = {}
  if args.out.exists():
    before = json.loads(args.out.read_text(encoding='utf-8'))
    known = {
      network: {'measured': _when(before), **result}
      for network, result in before['networks'].items()
    }
  with cache.compilations():
    for network in args.networks:
      result = run(network, args.data_root)
      now = _when(record.conditions(''))
      known[network] = {'measured': now, **result}
      found = {'seeds': seeds, 'networks': known}
      record.write(args.out, name, found, ['--data_root=DIR'])


def _when(conditions: dict[str, Any]) -> dict[str, Any]:
  return {name: conditions.get(name) for name in ('date', 'commit')}


def _since(start: float) -> float:
  return round(time.perf_counter() - start, 1)

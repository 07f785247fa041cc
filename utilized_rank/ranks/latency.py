"""How long the product of each kernel takes, dense and as a pair of each rank.

FLOPs say little about time: a thin product is bound by memory, and a rank that
the hardware does not like costs as much as the next one that it does. So the
products are timed, once for each distinct shape, and what was timed is a value:
to look at, to keep, and to choose ranks by on another machine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import os
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from utilized_rank.host import files
from utilized_rank.host.progress import track
from utilized_rank.moments.sites import Site
from utilized_rank.tree import paths

# Calls are timed in batches of about this many seconds, the best batch counts.
_BATCH_SECONDS = 0.01
_MOST_CALLS = 200


class Curve(NamedTuple):
  """Seconds of one product.

  Attributes:
    dense: of x W.
    ranks: ranks that were timed, ascending.
    seconds: of (x A) B at each of them.
  """

  dense: float
  ranks: tuple[int, ...]
  seconds: tuple[float, ...]

  def at(self, ranks: Sequence[int] | np.ndarray) -> np.ndarray:
    """Seconds at any ranks, never falling with rank.

    A pair can be padded with zeros to a higher rank, so it takes no longer than
    the fastest of those; between ranks that were timed, a straight line.
    """
    best = np.minimum.accumulate(self.seconds[::-1])[::-1]
    return np.asarray(np.interp(ranks, self.ranks, best))


class Product(NamedTuple):
  """What a leaf's kernels multiply in one call of the function.

  Attributes:
    members: kernels that the leaf holds.
    d: input features.
    m: output features.
    rows: rows of x for each kernel.
  """

  members: int
  d: int
  m: int
  rows: int

  @property
  def shape(self) -> tuple[int, int, int]:
    return self.d, self.m, self.rows


@dataclasses.dataclass(frozen=True)
class LatencyTable:
  """Timed products of every kernel; made by `measure_latency`.

  Attributes:
    products: path to what is multiplied.
    curves: (d, m, rows) to the seconds it takes.
    about: device, dtype and version of jax, for the reader.
  """

  products: dict[str, Product]
  curves: dict[tuple[int, int, int], Curve]
  about: dict[str, str]

  def dense(self, path: str) -> int:
    """Nanoseconds of a leaf's dense products in one call of the function."""
    product = self._product(path)
    return round(1e9 * product.members * self.curves[product.shape].dense)

  def pairs(self, path: str, ranks: Sequence[int] | np.ndarray) -> np.ndarray:
    """Nanoseconds of a leaf's pairs, whole numbers; see `Curve.at`."""
    product = self._product(path)
    seconds = product.members * self.curves[product.shape].at(ranks)
    return np.round(1e9 * seconds).astype(np.int64)

  def _product(self, path: str) -> Product:
    if path not in self.products:
      raise ValueError(
        'no latency was measured for ' + paths.unknown(path, self.products)
      )
    return self.products[path]

  def __str__(self) -> str:
    lines = [', '.join(f'{k} {v}' for k, v in self.about.items())]
    lines.append(
      '     d      m    rows   dense us  rank where a pair is as slow'
    )
    for (d, m, rows), curve in self.curves.items():
      ranks = np.arange(1, min(d, m) + 1)
      slow = ranks[curve.at(ranks) >= curve.dense]
      lines.append(
        f'{d:6} {m:6} {rows:7} {1e6 * curve.dense:10.1f}  '
        f'{slow[0] if len(slow) else "none"} (equal FLOPs {d * m // (d + m)})'
      )
    return '\n'.join(lines)

  def save(self, path: str | os.PathLike[str]) -> None:
    """Writes the table as one JSON file."""
    record = {
      'about': self.about,
      'products': self.products,
      'curves': [[*shape, *curve] for shape, curve in self.curves.items()],
    }
    files.write_json(path, record)

  @classmethod
  def load(cls, path: str | os.PathLike[str]) -> LatencyTable:
    """Reads what `save` wrote.

    Raises:
      ValueError: the file is damaged, or holds something else.
    """
    make = lambda record: cls(
      {p: Product(*found) for p, found in record['products'].items()},
      {
        (d, m, rows): Curve(dense, tuple(ranks), tuple(seconds))
        for d, m, rows, dense, ranks, seconds in record['curves']
      },
      record['about'],
    )
    return files.read_json(path, 'latency table', make)


def measure_latency(
  sites: Mapping[str, Site],
  *,
  multiple_of: int = 8,
  points: int = 8,
  dtype: Any = jnp.float32,
  repeats: int = 5,
  progress: bool = True,
) -> LatencyTable:
  """Times the products of every kernel, each distinct shape once.

  A convolution is timed as the product of its patches, and kernels of a stack
  one after the other: relative costs, not those of the whole network.

  Args:
    sites: `find_sites(fn, params, batch)` for a batch as it will be served: its
      size decides how many rows a product has.
    multiple_of: ranks to time are multiples of this.
    points: how many of them for each shape; ranks between them are
      interpolated.
    dtype: of kernels and activations.
    repeats: batches of calls, of which the fastest counts.
    progress: show a progress bar.

  Raises:
    ValueError: no sites, or a count below 1.

  >>> import utilized_rank as ur
  >>> sites = ur.find_sites(
  ...     lambda p, x: x @ p['w'], {'w': jnp.eye(8)}, jnp.ones((4, 8)))
  >>> table = measure_latency(sites, points=2, repeats=1, progress=False)
  >>> table.products['w']
  Product(members=1, d=8, m=8, rows=4)
  """
  if not sites or min(multiple_of, points, repeats) < 1:
    raise ValueError(
      f'{len(sites)} sites, multiple_of={multiple_of}, points={points}, '
      f'repeats={repeats}: each at least 1'
    )
  products = {
    path: Product(site.layout.num_groups, *site.matrix_shape, site.rows)
    for path, site in sites.items()
  }
  shapes = list(dict.fromkeys(p.shape for p in products.values()))
  todo = track(shapes, desc='latency', unit='shape') if progress else shapes
  curves = {
    shape: _curve(*shape, multiple_of, points, dtype, repeats) for shape in todo
  }
  device = jax.devices()[0]
  about = {
    'device': device.device_kind,
    'dtype': jnp.dtype(dtype).name,
    'jax': jax.__version__,
  }
  return LatencyTable(products, curves, about)


def _curve(
  d: int,
  m: int,
  rows: int,
  multiple_of: int,
  points: int,
  dtype: Any,
  repeats: int,
) -> Curve:
  full = min(d, m)
  steps = np.linspace(1, max(full // multiple_of, 1), points).round()
  ranks = [min(int(r), full) for r in multiple_of * np.unique(steps)]
  ones = lambda *shape: jnp.ones(shape, dtype)
  x = ones(rows, d)
  pair = jax.jit(lambda x, a, b: (x @ a) @ b)
  return Curve(
    _seconds(jax.jit(jnp.matmul), (x, ones(d, m)), repeats),
    tuple(ranks),
    tuple(_seconds(pair, (x, ones(d, r), ones(r, m)), repeats) for r in ranks),
  )


def _seconds(fn: Callable[..., Any], args: Any, repeats: int) -> float:
  """Seconds of a call, the first ones left out."""
  fn(*args).block_until_ready()
  start = time.perf_counter()
  fn(*args).block_until_ready()
  once = time.perf_counter() - start
  calls = int(np.clip(_BATCH_SECONDS / max(once, 1e-9), 1, _MOST_CALLS))
  best = np.inf
  for _ in range(repeats):
    start = time.perf_counter()
    for _ in range(calls):
      out = fn(*args)
    out.block_until_ready()
    best = min(best, (time.perf_counter() - start) / calls)
  return best

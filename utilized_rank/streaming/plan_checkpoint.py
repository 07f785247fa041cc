"""What compressing a checkpoint block by block will take, before it starts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
import dataclasses
import math
import os
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from utilized_rank.host import threads
from utilized_rank.host import usage
from utilized_rank.host.columns import aligned
from utilized_rank.host.units import of_bytes
from utilized_rank.linalg import gram
from utilized_rank.refit.blocks import Block
from utilized_rank.refit.blocks import Program
from utilized_rank.refit.streams import distinct
from utilized_rank.streaming import phases
from utilized_rank.streaming.sweep import Sweep
from utilized_rank.tree import paths
from utilized_rank.walk import cost

# An eigendecomposition's arrays of its own, and those of LAPACK beside it.
_OF_EIGH = 4
# What BLAS, XLA and the C library were seen to keep for themselves.
_LIBRARIES = 300 * 2**20
# Width of the matrices that the machine is tried with on the host.
_TRIED = 384
# Share of the time of compiling a block's programs that it takes to find that
# another block's are the same.
_AGAIN = 0.2


@dataclasses.dataclass(frozen=True)
class CheckpointPlan:
  """What `compress_checkpoint` will take; `print` it.

  Attributes:
    blocks: how many have kernels.
    parameters: numbers that the model holds.
    kernels: of them in the chosen kernels.
    largest: bytes of the largest block's weights, in float32.
    seconds: predicted, of each kind of work, from what this machine was seen
      to do in a second; waiting for the disk is not counted.
    memory: predicted peak in bytes, of each step that may have it; what the
      process holds already is in all of them.
    out_bytes: of the new checkpoint, at most.
    work_bytes: of what lies between blocks, while it runs.
  """

  blocks: int
  parameters: int
  kernels: int
  largest: int
  seconds: Mapping[str, float]
  memory: Mapping[str, int]
  out_bytes: int
  work_bytes: int

  @property
  def total_seconds(self) -> float:
    return sum(self.seconds.values())

  @property
  def peak_bytes(self) -> int:
    return max(self.memory.values())

  def __str__(self) -> str:
    longest = max(self.memory, key=self.memory.__getitem__)
    rows = [
      ('time', _time(self.total_seconds), _parts(self.seconds, _time)),
      ('memory', of_bytes(self.peak_bytes), f'while it {longest}'),
      (
        'disk',
        of_bytes(self.out_bytes + self.work_bytes),
        f'checkpoint {of_bytes(self.out_bytes)}, '
        f'work {of_bytes(self.work_bytes)}',
      ),
    ]
    return '\n'.join(
      [
        f'{self.blocks} blocks, {self.parameters:,} parameters, '
        f'{self.kernels / self.parameters:.1%} of them in their kernels; the '
        f'largest block has {of_bytes(self.largest)} of weights',
        *aligned(rows),
      ]
    )


def plan_checkpoint(
  path: str | os.PathLike[str],
  batches: Iterable[Any],
  *,
  params_fraction: float,
  uniform: bool = False,
  anchored: bool = True,
  select: paths.Rules | None = None,
  **options: Any,
) -> CheckpointPlan:
  """Says what `compress_checkpoint` will take, reading no weights.

  Times are products and decompositions counted, over what a second of trying
  says this machine does: right within a factor of two, if it does nothing else.
  Takes a few compilations.

  Args:
    path: as for `compress_checkpoint`, as the others.
    batches: see there; only their number and shapes are looked at.
    params_fraction: see there.
    uniform: see there.
    anchored: see there.
    select: see there.
    **options: see there.

  Raises:
    ValueError: as `compress_checkpoint`.
  """
  sweep = Sweep.of(path, batches, select, options)
  opened = sweep.opened
  shapes, _ = paths.flatten(opened.abstract)
  sizes = {path: math.prod(leaf.shape) for path, leaf in shapes.items()}
  kernels = sum(sizes[path] for path in sweep.sites)
  seconds = _seconds(sweep, shapes, uniform, anchored)
  start = time.perf_counter()
  memory = _memory(sweep, shapes, sizes, uniform, anchored)
  programs = time.perf_counter() - start
  seconds['programs'] = programs * (1 + _AGAIN * len(sweep.blocks))
  stored = sum(size for _, size, _ in phases.files_of(opened.path))
  numbers = sum(math.prod(t.shape) for t in opened.tensors.values())
  gone = kernels * (1 - params_fraction) * stored / max(numbers, 1)
  return CheckpointPlan(
    sum(bool(block.reads) for block in sweep.blocks),
    sum(sizes.values()),
    kernels,
    4 * max(_size(block, sizes) for block in sweep.blocks),
    seconds,
    memory,
    int(stored - gone),
    (1 + anchored) * _between(sweep),
  )


def _size(block: Block, sizes: Mapping[str, int]) -> int:
  return sum(sizes[path] for path in block.params)


def _between(sweep: Sweep) -> int:
  """The most that one run has in files at once: behind a block, and before."""
  total = 0
  for program in sweep.streams.programs:
    kept = [
      sum(v.aval.size * v.aval.dtype.itemsize for v in block.kept)
      for block in program.blocks
    ]
    total += max((a + b for a, b in zip(kept[:-2], kept[1:-1])), default=0)
  return total


@dataclasses.dataclass(frozen=True)
class _Rates:
  """Seconds for each operation here: of products in float32 on the device and
  in float64 on the host, and of decompositions by n^3."""

  device: float
  host: float
  eigh: float

  @classmethod
  def tried(cls) -> _Rates:
    ones = jnp.ones((1024, 1024))
    product = jax.jit(jnp.matmul)
    x = np.random.default_rng(0).normal(size=(_TRIED, _TRIED))
    s = x @ x.T
    # As kernels side by side have it; several threads wait for each other.
    with threads.one_blas_thread():
      host, eigh = _least(lambda: x @ x), _least(lambda: np.linalg.eigh(s))
    device = _least(lambda: product(ones, ones).block_until_ready())
    cubes = 2 * 1024**3, 2 * _TRIED**3, _TRIED**3
    return cls(device / cubes[0], host / cubes[1], eigh / cubes[2])


def _least(run: Any) -> float:
  taken = []
  for _ in range(4):  # the first compiles
    start = time.perf_counter()
    run()
    taken.append(time.perf_counter() - start)
  return min(taken)


def _seconds(
  sweep: Sweep, shapes: Mapping[str, Any], uniform: bool, anchored: bool
) -> dict[str, float]:
  forward = sums = pairs = 0
  known: dict[Any, int] = {}
  for program in sweep.streams.programs:
    for number, block in enumerate(program.blocks):
      if not sweep.is_needed(number):
        continue
      # Blocks that are alike, and batches.
      key = id(program), _kind(block, shapes)
      if key not in known:
        known[key] = _forward_flops(program, block, shapes)
      forward += known[key]
      for i in distinct(block):
        site = sweep.sites[block.reads[i].path]
        d, n = site.matrix_shape[0], site.rows
        sums += gram.panel_flops(n, d)
        pairs += gram.panel_flops(n, d) + 2 * n * d * d
  rates = _Rates.tried()
  decompose = fit = 0.0
  for block in sweep.blocks:
    seen: set[int] = set()
    for path in block.paths:
      site = sweep.sites[path]
      first = site.index not in seen
      seen.add(site.index)
      decompose += _decompose_seconds(*site.matrix_shape, first, rates)
      fit += _fit_seconds(*site.matrix_shape, rates)
  # A block is run for what its kernels read, and then for the next.
  runs = 2 * (not uniform) + (4 if anchored else 2)
  first = not uniform
  return {
    'forward': runs * forward * rates.device,
    'moments': ((first + (not anchored)) * sums + anchored * pairs)
    * rates.device,
    'decompositions': (first + (not anchored)) * decompose + anchored * fit,
  }


def _kind(block: Block, shapes: Mapping[str, Any]) -> Any:
  params = tuple(shapes[path].shape for path in block.params)
  return params, tuple(v.aval.shape for v in block.needs), len(block.gives)


def _forward_flops(
  program: Program, block: Block, shapes: Mapping[str, Any]
) -> int:
  return cost.forward_flops(
    lambda named, values: program.run(block, named, values),
    {path: shapes[path] for path in block.params},
    [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in block.needs],
  )


def _decompose_seconds(d: int, m: int, first: bool, rates: _Rates) -> float:
  """Of `decompose`, method 'output'."""
  if d < m:
    products = 2 * d * d * m * 4 + 2 * d**3
    return products * rates.host + (first + 1) * d**3 * rates.eigh
  products = 2 * d * d * m + 6 * d * m * m
  return products * rates.host + m**3 * rates.eigh


def _fit_seconds(d: int, m: int, rates: _Rates) -> float:
  """Of one kernel of `anchor`."""
  least = min(d, m)
  # A product and two solutions with (d, d), the factors, and what they leave.
  products = 2 * d * d * m * 4 + 3 * d**3 + 2 * d * m * least * 3
  return products * rates.host + least**3 * rates.eigh


def _memory(
  sweep: Sweep,
  shapes: Mapping[str, Any],
  sizes: Mapping[str, int],
  uniform: bool,
  anchored: bool,
) -> dict[str, int]:
  """Bytes that each step holds at once, this process's own with them."""
  found: dict[str, int] = {}
  done: set[Any] = set()
  for number, block in enumerate(sweep.blocks):
    kind = _kind(block, shapes)
    if kind in done or not sweep.is_needed(number):
      continue
    done.add(kind)
    own = {path: shapes[path] for path in block.params}
    device = sweep.streams.peak_bytes(number, own)
    steps = {'runs a block': device['through']}
    leaves = 4 * _size(block, sizes)
    if block.reads:
      steps |= _of_kernels(sweep, block, device, leaves, uniform, anchored)
    for what, size in steps.items():
      found[what] = max(found.get(what, 0), size)
  # With the programs, which the work will have too.
  held = usage.held() + _LIBRARIES
  return {what: held + size for what, size in found.items()}


def _of_kernels(
  sweep: Sweep,
  block: Block,
  device: Mapping[str, int],
  leaves: int,
  uniform: bool,
  anchored: bool,
) -> dict[str, int]:
  sites = [sweep.sites[path] for path in block.paths]
  widths = [
    sweep.sites[block.reads[i].path].matrix_shape[0] for i in distinct(block)
  ]
  sums = sum(4 * gram.panel_entries(d) for d in widths)
  pairs = sum(8 * d * d for d in widths)
  most = lambda of: max(of(*site.matrix_shape) for site in sites)
  steps: dict[str, int] = {}
  if not uniform or not anchored:
    # Of the batch, of those before, and of both.
    steps['sums moments'] = device['moments'] + 2 * sums
    of_one = lambda d, m: 8 * (2 * d * d + 4 * d * m + _basis(d, m))
    side_by_side = min(threads.most_workers(), len(sites))
    steps['decomposes'] = leaves + sums + side_by_side * most(of_one)
  if anchored:
    kernels = sum(math.prod(site.matrix_shape) for site in sites)
    steps['sums pairs of inputs'] = device['measure'] + 2 * pairs
    # Kernels in float64, their products, and the factors so far.
    steps['fits'] = (
      leaves
      + 2 * pairs
      + 16 * kernels
      + most(
        lambda d, m: 8 * (5 * d * d + 4 * d * m + _OF_EIGH * min(d, m) ** 2)
      )
    )
  return steps


def _basis(d: int, m: int) -> int:
  """Numbers of the eigenbases that `decompose` makes."""
  return _OF_EIGH * (min(d, m) ** 2 + d * d * (d < m))


def _parts(of: Mapping[str, Any], said: Any) -> str:
  return ', '.join(f'{what} {said(value)}' for what, value in of.items())


def _time(seconds: float) -> str:
  if seconds < 100:
    return f'{seconds:.0f} s'
  minutes = seconds / 60
  return f'{minutes:.0f} min' if minutes < 100 else f'{minutes / 60:.1f} h'

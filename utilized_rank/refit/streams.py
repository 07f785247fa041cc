"""Two runs of a function over the same batches, held between two blocks.

One run is of the dense parameters, the other of a tree whose earlier blocks are
compressed already. Both are carried from block to block, so that a sweep over
all blocks costs about two runs of the function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from utilized_rank.linalg import gram
from utilized_rank.lowrank.low_rank import low_rank
from utilized_rank.moments.gradients import LossFn
from utilized_rank.refit import blocks
from utilized_rank.refit import readings
from utilized_rank.refit.blocks import Block
from utilized_rank.refit.blocks import Group
from utilized_rank.refit.blocks import Program
from utilized_rank.refit.blocks import State
from utilized_rank.refit.readings import PairSums
from utilized_rank.tree.layout import Layout

Leaves = dict[str, Any]


class Streams:
  """The values of all batches between two blocks, on the host.

  A function is traced once for each shape of batch, a block compiled once.

  Attributes:
    programs: per batch, the function cut into blocks.
    dense: per batch, the values of the dense run.
    small: per batch, those of the compressed run.
  """

  def __init__(
    self,
    fn: Callable[[Any, Any], Any],
    params: Any,
    batches: Iterable[Any],
    layouts: dict[str, Layout],
    group: Group | None,
  ):
    """Starts before the first block.

    Args:
      fn: `fn(params, batch) -> outputs`.
      params: dense parameters, arrays or shapes.
      batches: batches, each looked at once.
      layouts: the kernels by path.
      group: see `blocks.cut`.
    """
    cuts: dict[str, Program] = {}
    self.programs: list[Program] = []
    self.dense: list[State] = []
    for batch in batches:
      shapes = str(jax.tree.map(np.shape, batch))
      if shapes not in cuts:
        cuts[shapes] = blocks.cut(fn, params, batch, layouts, group)
      self.programs.append(cuts[shapes])
      self.dense.append(cuts[shapes].start(batch))
    self.small = list(self.dense)

  @property
  def blocks(self) -> Sequence[Block]:
    """The blocks; their variables are those of the first batch."""
    return self.programs[0].blocks

  def measure(self, number: int, params: Leaves, small: Leaves):
    """Takes the dense run through a block, and sums what its kernels read.

    Args:
      number: the next block of the dense run.
      params: dense leaves by path.
      small: leaves of the compressed run, the block's own kernels dense still.

    Returns:
      Sums over all batches for each distinct input of the block's products,
      by `Read.key` of the first batch's block, in order.
    """

    def make(program: Program, block: Block):
      first = distinct(block)

      def step(params, small, values, values_hat):
        given, reads = program.read(block, params, values, block.paths)
        _, hats = program.read(block, small, values_hat, block.paths)
        return given, [
          readings.pair_sums(reads[i].rows(), hats[i].rows()) for i in first
        ]

      return step

    sums: list[PairSums] = []
    for i, block, run in self.each(number, make):
      values, hats = (
        blocks.needs_of(block, s[i]) for s in (self.dense, self.small)
      )
      given, new = run(params, small, values, hats)
      self.dense[i] = blocks.after(block, self.dense[i], jax.device_get(given))
      sums = jax.tree.map(jnp.add, sums, new) if sums else new
    return jax.device_get(sums)

  def advance(self, number: int, leaves: Leaves, states: list[State]) -> None:
    """Takes a run through a block.

    Args:
      number: its next block.
      leaves: its leaves by path, `LowRank` ones among them.
      states: `self.dense` or `self.small`.
    """
    make = lambda program, block: low_rank(
      lambda params, values: program.run(block, params, values)
    )
    for i, block, run in self.each(number, make):
      given = run(leaves, blocks.needs_of(block, states[i]))
      states[i] = blocks.after(block, states[i], jax.device_get(given))

  def gradients(
    self, number: int, params: Leaves, loss: LossFn, batches: Sequence[Any]
  ) -> list[Any]:
    """Second moments of the loss's gradient at what a block gives.

    Args:
      number: the block that the dense run was taken through last.
      params: dense leaves by path.
      loss: `loss(outputs, batch) -> (B,)`.
      batches: the batches.

    Returns:
      For each value that the block gives G over its last axis, (m, m), of an
      example's loss; None for values that are no floating arrays.
    """

    def make(program: Program, block: Block):
      rest = program.rests[number]

      def sums(params, values, given, batch):
        moving = {
          var: v
          for var, v in zip(block.gives, given, strict=True)
          if v.ndim and jnp.issubdtype(v.dtype, jnp.floating)
        }
        names = list(moving)

        def total(arrays):
          new = dict(zip(rest.needs, values, strict=True))
          new |= {v: a for v, a in zip(names, arrays) if v in new}
          outs = program.run(rest, params, [new[v] for v in rest.needs])
          outputs = jax.tree.unflatten(program.out_tree, outs)
          return jnp.sum(loss(outputs, batch))

        of = dict(zip(names, jax.grad(total)([moving[v] for v in names])))
        rows = [_rows(of[v]) if v in of else None for v in block.gives]
        return [None if r is None else (gram.gram(r)[1], len(r)) for r in rows]

      return sums

    found: list[Any] = []
    for i, block, run in self.each(number, make):
      rest, state = self.programs[i].rests[number], self.dense[i]
      new = run(
        params,
        blocks.needs_of(rest, state),
        [state[var] for var in block.gives],
        batches[i],
      )
      found = jax.tree.map(jnp.add, found, new) if found else new
    return [None if of is None else of[0] / of[1] for of in found]

  def each(
    self, number: int, make: Callable[[Program, Block], Callable[..., Any]]
  ) -> Iterator[tuple[int, Block, Callable[..., Any]]]:
    """(batch, its block, compiled) for every batch."""
    runs: dict[int, Callable[..., Any]] = {}
    for i, program in enumerate(self.programs):
      block = program.blocks[number]
      if id(program) not in runs:
        runs[id(program)] = jax.jit(make(program, block))
      yield i, block, runs[id(program)]


def _rows(array: Any) -> Any:
  return array.reshape(-1, array.shape[-1])


def distinct(block: Block) -> list[int]:
  """For each distinct input of a block, the first product that reads it."""
  first: dict[Any, int] = {}
  for i, read in enumerate(block.reads):
    first.setdefault(read.key, i)
  return list(first.values())

"""Two runs of a function over the same batches, held between two blocks.

One run is of the dense parameters, the other of a tree whose earlier blocks are
compressed already. Both are carried from block to block, so that a sweep over
all blocks costs about two runs of the function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from utilized_rank.host.kept import kept
from utilized_rank.linalg import gram
from utilized_rank.lowrank.leaf import is_low_rank
from utilized_rank.lowrank.low_rank import low_rank
from utilized_rank.moments.capture import capture
from utilized_rank.moments.gradients import LossFn
from utilized_rank.moments.merging import merge_moments
from utilized_rank.moments.moments import Moments
from utilized_rank.refit import blocks
from utilized_rank.refit import readings
from utilized_rank.refit.alike import Compiled
from utilized_rank.refit.alike import compiled
from utilized_rank.refit.blocks import Block
from utilized_rank.refit.blocks import Group
from utilized_rank.refit.blocks import Program
from utilized_rank.refit.blocks import State
from utilized_rank.refit.readings import PairSums
from utilized_rank.tree import paths
from utilized_rank.tree.layout import Layout
from utilized_rank.walk import compat
from utilized_rank.walk import cost
from utilized_rank.walk import tracing
from utilized_rank.walk.tracing import Form

Leaves = dict[str, Any]


class Held(Protocol):
  """The values of one run between two blocks, by batch."""

  def __len__(self) -> int: ...

  def __getitem__(self, i: int, /) -> State: ...

  def __setitem__(self, i: int, state: State, /) -> None: ...


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
    lean: bool = False,
  ):
    """Starts before the first block.

    Args:
      fn: `fn(params, batch) -> outputs`.
      params: dense parameters, arrays or shapes.
      batches: batches, each looked at once.
      layouts: the kernels by path.
      group: see `blocks.cut`.
      lean: see there.
    """
    self._known: Compiled = kept([fn], 'blocks', lambda fn: {})
    cuts = _Cuts(fn, params, layouts, group, lean)
    self.programs: list[Program] = []
    start: list[State] = []
    for batch in batches:
      program = cuts.of(batch)
      self.programs.append(program)
      start.append(program.start(batch))
    self.dense: Held = start
    self.small: Held = list(start)

  @property
  def blocks(self) -> Sequence[Block]:
    """The blocks; their variables are those of the first batch."""
    return self.programs[0].blocks

  def measure(self, number: int, params: Leaves, small: Leaves):
    """Sums what the kernels of a block read in the two runs before it.

    Args:
      number: the next block of both.
      params: dense leaves by path.
      small: leaves of the compressed run, the block's own kernels dense still.

    Returns:
      Sums over all batches for each distinct input of the block's products,
      by `Read.key` of the first batch's block, in order.
    """

    sums: list[PairSums] = []
    for i, program in enumerate(self.programs):
      block = program.blocks[number]
      if not block.reads:
        return sums
      step = functools.partial(_pair_sums, program, block)
      own, own_hat = (_own(block, leaves) for leaves in (params, small))
      values, hats = (
        blocks.needs_of(block, s[i]) for s in (self.dense, self.small)
      )
      args = own, own_hat, values, hats
      new = jax.device_get(self._alike(program, number, 'sums', step, args))
      # Of counts in int32; what is added on the host compiles nothing.
      sums = jax.tree.map(np.add, sums, new) if sums else new
    return sums

  def moments(self, number: int, params: Leaves) -> Moments:
    """Moments of what the kernels of a block read in the dense run.

    Args:
      number: its next block.
      params: dense leaves by path, at least the block's.
    """
    found: Moments | None = None
    for i, program in enumerate(self.programs):
      block = program.blocks[number]
      step = functools.partial(_moments, program, block)
      args = _own(block, params), blocks.needs_of(block, self.dense[i])
      given = self._alike(program, number, 'moments', step, args)
      new = jax.device_get(given)
      found = new if found is None else merge_moments(found, new)
    assert found is not None  # there are batches
    return found

  def peak_bytes(self, number: int, shapes: Leaves) -> dict[str, int]:
    """What a block's programs take on the device, by XLA's account.

    Args:
      number: of the block.
      shapes: its leaves' shapes by path.

    Returns:
      Bytes, arguments and all, of 'moments', 'measure' and 'through'.
    """
    program, block = self.programs[0], self.blocks[number]
    own = _own(block, shapes)
    values = [
      jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in block.needs
    ]
    steps: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
      'through': (_outputs, (own, values))
    }
    if block.reads:
      steps['moments'] = _moments, (own, values)
      steps['measure'] = _pair_sums, (own, own, values, values)
    return {
      what: cost.peak_bytes(
        jax.jit(functools.partial(step, program, block)).lower(*args).compile()
      )
      for what, (step, args) in steps.items()
    }

  def through(self, number: int, leaves: Leaves, states: Held) -> None:
    """As `advance`, for leaves that are as large as the dense ones.

    Blocks that compute the same are one program then.
    """
    for i, program in enumerate(self.programs):
      block = program.blocks[number]
      step = functools.partial(_outputs, program, block)
      args = _own(block, leaves), blocks.needs_of(block, states[i])
      given = self._alike(program, number, 'outputs', step, args)
      states[i] = blocks.after(block, states[i], jax.device_get(given))

  def _alike(
    self,
    program: Program,
    number: int,
    what: str,
    step: Callable[..., Any],
    args: Any,
  ) -> Any:
    """What a block's step makes of arguments, compiled once for all alike."""
    leaves, treedef = jax.tree.flatten(args)
    places = [str(getattr(v, 'sharding', None)) for v in leaves]
    key = number, what, treedef, *(compat.type_of(v) for v in leaves), *places
    if key not in program.compiled:
      program.compiled[key] = compiled(step, args, self._known)
    return program.compiled[key](*args)

  def advance(self, number: int, leaves: Leaves, states: Held) -> None:
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


class _Cuts:
  """A function cut into blocks, for each shape of batch once."""

  def __init__(
    self,
    fn: Callable[[Any, Any], Any],
    params: Any,
    layouts: dict[str, Layout],
    group: Group | None,
    lean: bool,
  ):
    self._fn, self._params = fn, params
    self._layouts, self._group, self._lean = layouts, group, lean
    self._made: dict[Any, Program] = {}
    self._key = (
      Form(params),
      tuple(
        map(compat.type_of, filter(tracing.is_array, jax.tree.leaves(params)))
      ),
      tuple(layouts.items()),
      lean,
      compat.trace_context(),
    )

  def of(self, batch: Any) -> Program:
    """Where it is cut for batches like this."""
    types = tuple(
      map(compat.type_of, filter(tracing.is_array, jax.tree.leaves(batch)))
    )
    key = Form(batch), types
    if key not in self._made:
      make = lambda fn: blocks.cut(
        fn, self._params, batch, self._layouts, self._group, self._lean
      )
      self._made[key] = (
        kept([self._fn], ('cuts', self._key, key), make)
        if self._group is None
        else make(self._fn)
      )
    return self._made[key]


def _own(block: Block, leaves: Leaves) -> list[Any]:
  """The leaves that a block uses, in its own order."""
  return [leaves[path] for path in block.params]


def _outputs(program: Program, block: Block, own, values):
  run = lambda named, values: program.run(block, named, values)
  if any(map(is_low_rank, own)):
    run = low_rank(run)
  return run(dict(zip(block.params, own, strict=True)), values)


def _moments(program: Program, block: Block, own, values):
  run = lambda named, values: program.run(block, named, values)
  captured = capture(run, select=paths.only(block.paths))
  return captured(dict(zip(block.params, own, strict=True)), values)[1]


def _pair_sums(program: Program, block: Block, own, own_hat, values, hats):
  def rows(own, values):
    named = dict(zip(block.params, own, strict=True))
    reads = program.read(block, named, values, block.paths)[1]
    return [reads[i].rows() for i in distinct(block)]

  pairs = zip(rows(own, values), rows(own_hat, hats), strict=True)
  return [readings.pair_sums(*pair) for pair in pairs]


def _rows(array: Any) -> Any:
  return array.reshape(-1, array.shape[-1])


def distinct(block: Block) -> list[int]:
  """For each distinct input of a block, the first product that reads it."""
  first: dict[Any, int] = {}
  for i, read in enumerate(block.reads):
    first.setdefault(read.key, i)
  return list(first.values())

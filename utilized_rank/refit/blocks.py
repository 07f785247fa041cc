"""A function cut into blocks of kernels, to be run block by block.

Between two blocks lie the values that later equations read. What follows from
parameters alone (a transposed kernel, a mask, positions) is no such value: it
is computed again in every block that reads it, so that a kernel stays a
kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from utilized_rank.refit import readings
from utilized_rank.refit.readings import Read
from utilized_rank.tree.layout import Layout
from utilized_rank.walk import compat
from utilized_rank.walk import tracing
from utilized_rank.walk.flatten import flatten
from utilized_rank.walk.rescaling import Rescaling

# From a kernel's path to the name of its block.
Group = Callable[[str], Hashable]


@dataclasses.dataclass(frozen=True)
class Piece:
  """Consecutive equations of a function, and what they need.

  Has the attributes of an open jaxpr that a walk reads.

  Attributes:
    constvars: the whole function's.
    invars: its parameters, then the values that come in from before.
    eqns: the equations.
    outvars: what later equations or the caller read.
  """

  constvars: Sequence[Any]
  invars: Sequence[Any]
  eqns: Sequence[Any]
  outvars: Sequence[Any]


@dataclasses.dataclass(frozen=True)
class Block:
  """A piece of a function that begins with the first product of a kernel.

  Attributes:
    piece: its equations.
    params: paths of the parameters that it uses, in the order of their use:
      blocks that are alike have them in one order.
    reads: its kernels' products in order, without activations.
    needs: values that come in.
    gives: values that go out.
    kept: values that later blocks need, these or older ones.
  """

  piece: Piece
  params: Sequence[str]
  reads: Sequence[Read]
  needs: Sequence[Any]
  gives: Sequence[Any]
  kept: frozenset[Any]

  @property
  def paths(self) -> list[str]:
    return list(dict.fromkeys(r.path for r in self.reads))


State = dict[Any, Any]


@dataclasses.dataclass(frozen=True)
class Program:
  """A function cut into blocks.

  Attributes:
    consts: values of the function's constants.
    args: variables of the arrays of the batch.
    blocks: in order of execution; the first is what comes before any kernel.
    rests: for each block, all that comes after it; gives the outputs.
    out_tree: pytree structure of the outputs.
    rescaling: what the function does to its parameters.
    compiled: what was compiled of its blocks, by whoever did.
  """

  consts: Sequence[Any]
  args: Sequence[Any]
  blocks: Sequence[Block]
  rests: Sequence[Block]
  out_tree: Any
  rescaling: Rescaling
  compiled: dict[Any, Any] = dataclasses.field(default_factory=dict)

  def run(
    self, block: Block, params: dict[str, Any], values: Sequence[Any]
  ) -> list[Any]:
    """What a block gives; a pure function of arrays."""
    return self.read(block, params, values, ())[0]

  def read(
    self,
    block: Block,
    params: dict[str, Any],
    values: Sequence[Any],
    kernels: Iterable[str],
  ) -> tuple[list[Any], list[Read]]:
    """What a block gives, and what the products of some kernels read."""
    named = {path: params[path] for path in block.params}
    return readings.read(
      block.piece,
      list(self.consts),
      named,
      list(values),
      set(kernels),
      self.rescaling,
    )

  def start(self, batch: Any) -> State:
    """The values that a batch is, before the first block."""
    leaves = [v for v in jax.tree.leaves(batch) if tracing.is_array(v)]
    return dict(zip(self.args, leaves, strict=True))


def needs_of(block: Block, state: State) -> list[Any]:
  return [state[var] for var in block.needs]


def after(block: Block, state: State, given: Sequence[Any]) -> State:
  """The values between a block and the next."""
  new = state | dict(zip(block.gives, given, strict=True))
  return {var: value for var, value in new.items() if var in block.kept}


def cut(
  fn: Callable[[Any, Any], Any],
  params: Any,
  batch: Any,
  layouts: dict[str, Layout],
  group: Group | None = None,
  lean: bool = False,
) -> Program:
  """Cuts a function before the products of its kernels.

  Args:
    fn: `fn(params, batch) -> outputs`.
    params: dense parameters, arrays or shapes.
    batch: a batch, arrays or shapes.
    layouts: the kernels by path, as `find_sites` found them.
    group: consecutive kernels of one name make a block; default those that
      read one value (q, k and v). Where a kernel is read more than once, all
      that lies between is one block.
    lean: cut where the least has to be kept from one block to the next, in
      place of right before a product (behind a residual sum, before the norm),
      and once more behind the last kernel: the last block has no kernels then.

  Raises:
    UnsupportedError: a kernel is read inside a loop that is no `scan`, in a
      branch, or at an index that is computed.
  """
  flat = flatten(tracing.trace(fn, params, (batch,), {}), layouts)
  jaxpr, names = flat.jaxpr, list(flat.params)
  reads = _abstract_reads(flat, layouts)
  ranges = _ranges(reads, layouts, group)
  place = {id(eqn): i for i, eqn in enumerate(jaxpr.eqns)}
  starts = [place[id(reads[first].eqn)] for first, _ in ranges]
  param_vars = jaxpr.invars[: len(names)]
  name_of = dict(zip(param_vars, names, strict=True))
  args = jaxpr.invars[len(names) :]
  fixed = _fixed(jaxpr, param_vars, {id(r.eqn) for r in reads})
  made = {var: -1 for var in args}
  for i, eqn in enumerate(jaxpr.eqns):
    made.update({var: i for var in eqn.outvars if var not in fixed})
  # Var -> the last place that reads it; what the caller reads is read last.
  last = {
    var: i
    for i, eqn in [*enumerate(jaxpr.eqns), (len(jaxpr.eqns), None)]
    for var in _variables(jaxpr.outvars if eqn is None else eqn.invars)
    if var in made
  }
  if lean:
    ends = [place[id(reads[stop - 1].eqn)] + 1 for _, stop in ranges]
    between = zip([0, *ends], [*starts, len(jaxpr.eqns)], strict=True)
    starts = _where_least_is_alive(made, last, list(between))
    ranges.append((len(reads), len(reads)))
  cuts = [0, *starts, len(jaxpr.eqns)]

  def part(begin, end, gives, reads=()) -> Block:
    here = [
      eqn
      for i, eqn in enumerate(jaxpr.eqns[:end])
      if i >= begin or fixed.issuperset(eqn.outvars)
    ]
    eqns = _needed(here, _variables(gives))
    inner = {v for eqn in eqns for v in eqn.outvars}
    read = dict.fromkeys(v for eqn in eqns for v in _variables(eqn.invars))
    read.update(dict.fromkeys(_variables(gives)))
    needs = [v for v in made if v in read and v not in inner]
    own = [v for v in read if v in name_of]
    piece = Piece(jaxpr.constvars, [*own, *needs], eqns, gives)
    params = [name_of[v] for v in own]
    kept = frozenset(v for v, at in last.items() if made[v] < end <= at)
    return Block(piece, params, reads, needs, gives, kept)

  parts, rests = [], []
  for n, (begin, end) in enumerate(zip(cuts, cuts[1:])):
    first, stop = ranges[n - 1] if n else (0, 0)
    gives = [v for v, at in last.items() if begin <= made[v] < end <= at]
    parts.append(part(begin, end, gives, reads[first:stop]))
    rests.append(part(end, len(jaxpr.eqns), jaxpr.outvars))
  return Program(flat.consts, args, parts, rests, flat.out_tree, flat.rescaling)


def _where_least_is_alive(
  made: dict[Any, int],
  last: dict[Any, int],
  between: Sequence[tuple[int, int]],
) -> list[int]:
  """For each range of places the one before which the fewest bytes are kept.

  Of several the last. Whole numbers count first: tokens are small, but what is
  looked up for them belongs before the blocks, with its table.

  Args:
    made: variable to the place that makes it.
    last: variable to the last place that reads it.
    between: first and last place of each range.
  """
  end = max(stop for _, stop in between) + 2
  steps = np.zeros((2, end), np.int64)
  for var, at in last.items():
    floating = int(jnp.issubdtype(var.aval.dtype, jnp.inexact))
    size = var.aval.size * var.aval.dtype.itemsize
    steps[floating, made[var] + 1] += size
    steps[floating, min(at, end - 2) + 1] -= size
  alive = list(zip(*np.cumsum(steps, axis=1).tolist(), strict=True))
  return [
    min(range(begin, stop + 1), key=lambda place: (*alive[place], -place))
    for begin, stop in between
  ]


def _variables(atoms: Iterable[Any]) -> list[Any]:
  return [a for a in atoms if not isinstance(a, compat.Literal)]


def _abstract_reads(flat: tracing.Traced, layouts) -> list[Read]:
  found: list[Read] = []

  def look(params, args):
    named = dict(zip(flat.params, params, strict=True))
    outs, reads = readings.read(
      flat.jaxpr, flat.consts, named, args, layouts, flat.rescaling
    )
    found[:] = [dataclasses.replace(r, x=None) for r in reads]
    return outs

  jax.eval_shape(look, list(flat.params.values()), flat.args)
  return found


def _ranges(
  reads: Sequence[Read], layouts: dict[str, Layout], group: Group | None
) -> list[tuple[int, int]]:
  """Which consecutive reads make a block."""
  names = [r.source if group is None else group(r.path) for r in reads]
  joined = [i > 0 and names[i] == names[i - 1] for i in range(len(reads))]
  seen: dict[tuple[str, int], int] = {}
  for i, r in enumerate(reads):
    for matrix in r.members(layouts[r.path]):
      since = seen.setdefault((r.path, matrix), i)
      joined[since + 1 : i + 1] = [True] * (i - since)
  starts = [i for i, glued in enumerate(joined) if not glued]
  return list(zip(starts, [*starts[1:], len(reads)], strict=True))


def _fixed(jaxpr: Any, params: Sequence[Any], products: set[int]) -> set[Any]:
  """Variables that no batch changes."""
  fixed = {*params, *jaxpr.constvars}
  for eqn in jaxpr.eqns:
    if id(eqn) not in products and fixed.issuperset(_variables(eqn.invars)):
      fixed.update(eqn.outvars)
  return fixed


def _needed(eqns: Sequence[Any], outs: Iterable[Any]) -> list[Any]:
  """The equations that the given variables follow from."""
  wanted, kept = set(outs), []
  for eqn in reversed(eqns):
    if wanted.intersection(eqn.outvars):
      wanted.update(_variables(eqn.invars))
      kept.append(eqn)
  return kept[::-1]

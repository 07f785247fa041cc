"""Follows examples and tokens from a batch to every product of a function.

Read off the jaxpr. Whatever is not known to keep examples apart is said to mix
them, with its name: the analysis may refuse a function that it could have
accepted, and never accepts one that mixes. Tokens are followed as rows that
stand for a token: attention mixes them, and its output is still in their
order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import math
from typing import Any

from utilized_rank.axes.rules import RULES
from utilized_rank.axes.where import EXAMPLE
from utilized_rank.axes.where import TOKEN
from utilized_rank.axes.where import Where
from utilized_rank.axes.where import join
from utilized_rank.axes.where import lead
from utilized_rank.axes.where import mixed_up
from utilized_rank.axes.where import names
from utilized_rank.axes.where import plain
from utilized_rank.axes.where import token_of
from utilized_rank.axes.where import whole
from utilized_rank.walk import compat
from utilized_rank.walk.analysis import Analysis


class Flow(Analysis[Where]):
  """One analysis of a traced function.

  Attributes:
    examples: number of examples, at least 2.
    found: every variable of the jaxpr, those of inner ones included.
  """

  def __init__(self, examples: int):
    self.examples = examples
    self.found: dict[Any, Where] = {}

  def constant(self, atom: Any) -> Where:
    return plain(getattr(atom.aval, 'shape', ()))

  def learn(self, var: Any, value: Where, eqn: Any = None) -> Where:
    if eqn is not None:
      value = self._checked(eqn, value)
    known = self.found.get(var)
    self.found[var] = (
      value if known is None else join([known, value], 'two calls')
    )
    return value

  def _checked(self, eqn: Any, where: Where) -> Where:
    """Examples lie on a value once and whole, or it counts as mixed."""
    if where.mixed:
      return where.without(EXAMPLE)
    if where.has(EXAMPLE) and not where.is_along(EXAMPLE, self.examples):
      return mixed_up(eqn.primitive.name, where)
    return where

  def equation(self, eqn: Any, ins: list[Where]) -> list[Where]:
    name = eqn.primitive.name
    shapes = [v.aval.shape for v in eqn.outvars]
    mixed = next((w.mixed for w in ins if w.mixed), None)
    if mixed is not None:
      return [Where(plain(s).axes, mixed) for s in shapes]
    if not any(w.has(EXAMPLE) for w in ins):
      return [plain(s) for s in shapes]
    rule = RULES.get(name)
    outs = None if rule is None else rule(eqn, ins)
    if outs is None:
      return [mixed_up(name, plain(s)) for s in shapes]
    token = token_of(ins)
    return [
      mixed_up(name, w)
      if not w.has(EXAMPLE)
      else w
      if w.token is not None
      else dataclasses.replace(w, token=token)
      for w in outs
    ]

  # --- computations inside ---

  def join(self, values: Sequence[Where], what: str) -> Where:
    found = join(values, what)
    return found.without(EXAMPLE) if found.mixed else found

  def decided(self, by: Where, what: str, values: list[Where]) -> list[Where]:
    reason = by.mixed
    if reason and what != 'cond':
      reason = f'{what} whose length depends on them ({reason})'
    return [mixed_up(reason, w) for w in values] if reason else values

  def again(self) -> Callable[[], None]:
    keep = dict(self.found)

    def start_over():
      self.found = dict(keep)

    return start_over

  def scan(self, eqn: Any, ins: list[Where]) -> list[Where]:
    jaxpr, _ = compat.open_jaxpr(eqn.params['jaxpr'])
    n_consts, n_carry = compat.scan_split(eqn.params)
    consts, carry = ins[:n_consts], ins[n_consts : n_consts + n_carry]
    xs = ins[n_consts + n_carry :]
    lead = next((w.axes[0] for w in xs if TOKEN in names(w.axes[0])), None)
    slices = [_without_axis(w, 'a scan over the examples') for w in xs]
    if lead is not None:
      lost = lambda w: dataclasses.replace(w, token='a scan over the tokens')
      carry, slices = [*map(lost, carry)], [*map(lost, slices)]
    outs, carry = self.repeat(jaxpr, consts, carry, slices)
    over = whole(eqn.params['length']) if lead is None else lead
    ys = [
      dataclasses.replace(w, axes=(over, *w.axes)) for w in outs[len(carry) :]
    ]
    outs = [*carry, *ys]
    if lead is not None:
      outs = [dataclasses.replace(w, token=None) for w in outs]
    return outs

  def opaque(self, eqn: Any, ins: list[Where]) -> list[Where]:
    outs = [plain(v.aval.shape) for v in eqn.outvars]
    if any(w.mixed or w.has(EXAMPLE) for w in ins):
      outs = [mixed_up(eqn.primitive.name, w) for w in outs]
    return outs

  inner = {**Analysis.inner, 'shard_map': 'opaque'}


def in_loop(
  body: Any, consts: Sequence[bool], examples: Sequence[int]
) -> dict[Any, Where]:
  """What is known of a vmapped loop's body whose examples are not all alike.

  What every example has of its own leads with them, as `vmap` has it.

  Args:
    body: open jaxpr.
    consts: of its first inputs, that are not carried, whether each is made of
      parameters: their first axis is no example's, whatever its size is.
    examples: shape of the carried values' leading axes, at least 2 in all.
  """
  shapes = [v.aval.shape for v in body.invars]
  flow = Flow(math.prod(examples))
  flow.run(
    body,
    [
      plain(shape)
      if is_param or shape[: len(examples)] != tuple(examples)
      else lead(shape, examples)
      for shape, is_param in zip(shapes, consts)
    ]
    + [lead(shape, examples) for shape in shapes[len(consts) :]],
  )
  return flow.found


def _without_axis(where: Where, reason: str) -> Where:
  """A value along whose first axis a loop walks."""
  first, *rest = where.axes
  out = dataclasses.replace(where, axes=tuple(rest))
  if any(p.name == EXAMPLE for p in first):
    return mixed_up(reason, out)
  return out

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


class Flow:
  """One analysis of a traced function.

  Attributes:
    examples: number of examples, at least 2.
    found: every variable of the jaxpr, those of inner ones included.
  """

  def __init__(self, examples: int):
    self.examples = examples
    self.found: dict[Any, Where] = {}

  def run(self, jaxpr: Any, args: Sequence[Where]) -> list[Where]:
    """What is known of an open jaxpr's outputs; its constants are plain."""
    env: dict[Any, Where] = {}

    def read(atom):
      if isinstance(atom, compat.Literal):
        return plain(getattr(atom.aval, 'shape', ()))
      return env[atom]

    def write(var, where):
      env[var] = where
      known = self.found.get(var)
      self.found[var] = (
        where if known is None else join([known, where], 'two calls')
      )

    for var in jaxpr.constvars:
      write(var, plain(var.aval.shape))
    for var, where in zip(jaxpr.invars, args, strict=True):
      write(var, where)
    for eqn in jaxpr.eqns:
      outs = self._equation(eqn, [read(a) for a in eqn.invars])
      for var, where in zip(eqn.outvars, outs, strict=True):
        write(var, self._checked(eqn, where))
    return [read(a) for a in jaxpr.outvars]

  def _checked(self, eqn: Any, where: Where) -> Where:
    """Examples lie on a value once and whole, or it counts as mixed."""
    if where.mixed:
      return where.without(EXAMPLE)
    if where.has(EXAMPLE) and not where.is_along(EXAMPLE, self.examples):
      return mixed_up(eqn.primitive.name, where)
    return where

  def _equation(self, eqn: Any, ins: list[Where]) -> list[Where]:
    name = eqn.primitive.name
    inner = _INNER.get(name)
    if inner is not None:
      return inner(self, eqn, ins)
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

  def _call(self, eqn: Any, ins: list[Where]) -> list[Where]:
    name = eqn.primitive.name
    jaxpr, _ = compat.open_jaxpr(eqn.params[compat.CALLS.get(name, 'jaxpr')])
    return self.run(jaxpr, ins)

  def _barrier(self, eqn: Any, ins: list[Where]) -> list[Where]:
    del eqn
    return ins

  def _scan(self, eqn: Any, ins: list[Where]) -> list[Where]:
    jaxpr, _ = compat.open_jaxpr(eqn.params['jaxpr'])
    n_consts, n_carry = compat.scan_split(eqn.params)
    consts, carry = ins[:n_consts], ins[n_consts : n_consts + n_carry]
    xs = ins[n_consts + n_carry :]
    lead = next((w.axes[0] for w in xs if TOKEN in names(w.axes[0])), None)
    slices = [_without_axis(w, 'a scan over the examples') for w in xs]
    if lead is not None:
      lost = lambda w: dataclasses.replace(w, token='a scan over the tokens')
      carry, slices = [*map(lost, carry)], [*map(lost, slices)]
    outs, carry = self._repeat(jaxpr, consts, carry, slices)
    over = whole(eqn.params['length']) if lead is None else lead
    ys = [
      dataclasses.replace(w, axes=(over, *w.axes)) for w in outs[len(carry) :]
    ]
    outs = [*carry, *ys]
    if lead is not None:
      outs = [dataclasses.replace(w, token=None) for w in outs]
    return outs

  def _repeat(self, jaxpr, consts, carry, slices):
    """Outputs of a loop's body once its carry does not change any more."""
    keep = dict(self.found)
    while True:
      self.found = dict(keep)
      outs = self.run(jaxpr, [*consts, *carry, *slices])
      before = carry
      carry = [
        join([a, b], 'a loop') for a, b in zip(carry, outs, strict=False)
      ]
      carry = [w.without(EXAMPLE) if w.mixed else w for w in carry]
      if carry == before:
        return outs, carry

  def _while(self, eqn: Any, ins: list[Where]) -> list[Where]:
    p = eqn.params
    nt, nb = p['cond_nconsts'], p['body_nconsts']
    test, _ = compat.open_jaxpr(p['cond_jaxpr'])
    jaxpr, _ = compat.open_jaxpr(p['body_jaxpr'])
    _, carry = self._repeat(jaxpr, ins[nt : nt + nb], ins[nt + nb :], [])
    (go_on,) = self.run(test, [*ins[:nt], *carry])
    if go_on.mixed:
      reason = f'a while loop whose length depends on them ({go_on.mixed})'
      carry = [mixed_up(reason, w) for w in carry]
    return carry

  def _cond(self, eqn: Any, ins: list[Where]) -> list[Where]:
    branches = [
      self.run(compat.open_jaxpr(b)[0], ins[1:]) for b in eqn.params['branches']
    ]
    outs = [join(same, 'cond') for same in zip(*branches, strict=True)]
    if ins[0].mixed:
      outs = [mixed_up(ins[0].mixed, w) for w in outs]
    return outs

  def _opaque(self, eqn: Any, ins: list[Where]) -> list[Where]:
    outs = [plain(v.aval.shape) for v in eqn.outvars]
    if any(w.mixed or w.has(EXAMPLE) for w in ins):
      outs = [mixed_up(eqn.primitive.name, w) for w in outs]
    return outs


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


_INNER: dict[str, Callable[[Flow, Any, list[Where]], list[Where]]] = {
  **dict.fromkeys(compat.CALLS, Flow._call),
  **dict.fromkeys(compat.REMAT, Flow._call),
  'scan': Flow._scan,
  'while': Flow._while,
  'cond': Flow._cond,
  'optimization_barrier': Flow._barrier,
  'shard_map': Flow._opaque,
}

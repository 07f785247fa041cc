"""What is known of every value of a jaxpr, one equation after the other.

The frame of an analysis: calls are entered, the body of a loop is read again
until what it carries does not change any more, and of branches what is common
is known. What is known, and what an equation makes of it, its subclasses say.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Generic, TypeVar

from utilized_rank.walk import compat

V = TypeVar('V')


class Analysis(abc.ABC, Generic[V]):
  """One analysis of a traced function; V is what it knows of a value.

  `inner` has the method for each primitive that holds computations; a subclass
  may have others.
  """

  inner: ClassVar[dict[str, str]] = {
    **dict.fromkeys((*compat.CALLS, *compat.REMAT), 'call'),
    'scan': 'scan',
    'while': 'while_loop',
    'cond': 'cond',
    'optimization_barrier': 'barrier',
  }

  # --- what a subclass says ---

  @abc.abstractmethod
  def constant(self, atom: Any) -> V:
    """What is known of a literal, or of a constant."""

  @abc.abstractmethod
  def equation(self, eqn: Any, ins: list[V]) -> list[V]:
    """What is known of the results of an equation without inner ones."""

  @abc.abstractmethod
  def join(self, values: Sequence[V], what: str) -> V:
    """What is known of a value that is any of these, by 'cond' or 'a loop'."""

  @abc.abstractmethod
  def decided(self, by: V, what: str, values: list[V]) -> list[V]:
    """What is known of values that are one or the other by the value of `by`:
    a condition ('cond'), or whether a loop goes on ('a while loop')."""

  @abc.abstractmethod
  def scan(self, eqn: Any, ins: list[V]) -> list[V]:
    """What is known of the results of a scan, by `repeat`."""

  def argument(self, var: Any, value: V) -> V:
    """What is known of a jaxpr's input of which its caller knows `value`."""
    del var
    return value

  def learn(self, var: Any, value: V, eqn: Any = None) -> V:
    """Told of every variable, with the equation that made it; what is kept."""
    del var, eqn
    return value

  def again(self) -> Callable[[], None]:
    """Called before a loop; what it returns, before its body is read."""
    return lambda: None

  # --- the frame ---

  def run(self, jaxpr: Any, args: Sequence[V]) -> list[V]:
    """What is known of an open jaxpr's outputs."""
    env: dict[Any, V] = {}

    def read(atom: Any) -> V:
      return (
        self.constant(atom) if isinstance(atom, compat.Literal) else env[atom]
      )

    for var in jaxpr.constvars:
      env[var] = self.learn(var, self.constant(var))
    for var, value in zip(jaxpr.invars, args, strict=True):
      env[var] = self.learn(var, self.argument(var, value))
    for eqn in jaxpr.eqns:
      ins = [read(a) for a in eqn.invars]
      rule = self.inner.get(eqn.primitive.name, 'equation')
      outs = getattr(self, rule)(eqn, ins)
      for var, value in zip(eqn.outvars, outs, strict=True):
        env[var] = self.learn(var, value, eqn)
    return [read(a) for a in jaxpr.outvars]

  def call(self, eqn: Any, ins: list[V]) -> list[V]:
    name = eqn.primitive.name
    jaxpr, _ = compat.open_jaxpr(eqn.params[compat.CALLS.get(name, 'jaxpr')])
    return self.run(jaxpr, ins)

  def barrier(self, eqn: Any, ins: list[V]) -> list[V]:
    del eqn
    return ins

  def repeat(
    self, jaxpr: Any, consts: list[V], carry: list[V], slices: list[V]
  ) -> tuple[list[V], list[V]]:
    """Outputs of a loop's body once its carry does not change any more, and
    the carry."""
    start_over = self.again()
    while True:
      start_over()
      outs = self.run(jaxpr, [*consts, *carry, *slices])
      before = carry
      carry = [
        self.join(both, 'a loop') for both in zip(carry, outs, strict=False)
      ]
      if carry == before:
        return outs, carry

  def while_loop(self, eqn: Any, ins: list[V]) -> list[V]:
    p = eqn.params
    nt, nb = p['cond_nconsts'], p['body_nconsts']
    test, _ = compat.open_jaxpr(p['cond_jaxpr'])
    jaxpr, _ = compat.open_jaxpr(p['body_jaxpr'])
    _, carry = self.repeat(jaxpr, ins[nt : nt + nb], ins[nt + nb :], [])
    (go_on,) = self.run(test, [*ins[:nt], *carry])
    return self.decided(go_on, 'a while loop', carry)

  def cond(self, eqn: Any, ins: list[V]) -> list[V]:
    branches = [
      self.run(compat.open_jaxpr(b)[0], ins[1:]) for b in eqn.params['branches']
    ]
    outs = [self.join(same, 'cond') for same in zip(*branches, strict=True)]
    return self.decided(ins[0], 'cond', outs)

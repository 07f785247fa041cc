"""A function as one list of equations, so that it can be cut anywhere.

Calls and remat that parameters enter are written out, and so are the steps of
scans that hold a chosen kernel's product. What has no part in such a product (a
`relu`'s own `jit`, a scan over time of other layers) stays one equation.
"""

from __future__ import annotations

from collections.abc import Callable, Container
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from utilized_rank.tree.layout import View
from utilized_rank.walk import compat
from utilized_rank.walk import control
from utilized_rank.walk import parts
from utilized_rank.walk.interpret import Walk
from utilized_rank.walk.tracing import Traced
from utilized_rank.walk.values import Dense
from utilized_rank.walk.values import Loop
from utilized_rank.walk.values import Output
from utilized_rank.walk.values import Param


def flatten(traced: Traced, kernels: Container[str]) -> Traced:
  """Writes calls out, and scans over the chosen kernels.

  Args:
    traced: a traced function.
    kernels: paths of the leaves whose products are to be equations of the
      outermost level. Those in `while` loops, branches and `shard_map`s stay
      where they are.

  Returns:
    The same function; its trace is longer by the steps of the scans.
  """

  def run(params, args):
    walk = _Flat(_Flattening(kernels), traced.rescaling)
    values = [
      Param(View.of_leaf(path, leaf.shape, leaf.dtype), Dense(leaf))
      for path, leaf in params.items()
    ]
    outs = walk.run(traced.jaxpr, traced.consts, [*values, *args])
    return [walk.materialise(v, 'output') for v in outs]

  # A dict's keys are sorted when it is flattened; a list's places are not.
  names = list(traced.params)
  jaxpr, consts, _ = compat.trace(
    lambda leaves, args: run(dict(zip(names, leaves, strict=True)), args),
    (list(traced.params.values()), traced.args),
  )
  return dataclasses.replace(traced, jaxpr=jaxpr, consts=consts)


class _Flattening:
  """Visitor that leaves products as they are."""

  def __init__(self, kernels: Container[str]):
    self._kernels = kernels

  def wants(self, view: View) -> bool:
    return view.path in self._kernels

  def dropped(self, view: View, reason: str) -> None:
    """Other uses of a leaf are no matter here."""

  def opaque(self, view: View, primitive: str) -> None:
    """What hides its computation stays one equation."""

  def product(self, eqn, operands, which, walk):
    del walk
    plain = list(operands)
    plain[which] = operands[which].payload.materialise(operands[which].view)
    return compat.bind(eqn, plain)[0]

  def biased(self, output: Output, bias: Param) -> bool:
    raise AssertionError('no outputs are followed when calls are written out')

  def stacked(self, use: Any, loop: Loop, size: int, is_stacked: bool) -> Any:
    raise AssertionError('nothing is emitted when calls are written out')


def _inline(walk: Any, eqn: Any, operands: list[Any]) -> list[Any]:
  jaxpr, consts = compat.open_jaxpr(eqn.params['jaxpr'])
  return walk.run(jaxpr, consts, operands)


def _keep(walk: Any, eqn: Any, operands: list[Any]) -> list[Any]:
  return compat.bind(
    eqn, [walk.materialise(v, eqn.primitive.name) for v in operands]
  )


def _unroll(walk: Any, eqn: Any, operands: list[Any]) -> list[Any]:
  p = eqn.params
  n_consts, n_carry = compat.scan_split(p)
  n_state = n_consts + n_carry
  consts, carry = operands[:n_consts], operands[n_consts:n_state]
  stacks = operands[n_state:]
  jaxpr, closed = compat.open_jaxpr(p['jaxpr'])
  steps = list(range(p['length']))

  def at(i):
    return [_member(walk, v, i) for v in stacks]

  if not steps or not control.holds_product(
    walk, jaxpr, closed, [*consts, *carry, *at(0)]
  ):
    return _keep(walk, eqn, operands)
  out: list[Any] = []
  for i in reversed(steps) if p['reverse'] else steps:
    results = walk.run(jaxpr, closed, [*consts, *carry, *at(i)])
    carry = results[:n_carry]
    out.append([walk.materialise(v, 'scan output') for v in results[n_carry:]])
  if p['reverse']:
    out.reverse()
  return [*carry, *(jnp.stack(ys) for ys in zip(*out, strict=True))]


def _member(walk: Any, value: Any, i: int) -> Any:
  if isinstance(value, Param):
    one = parts.member(value, 0, i)
    if one is not None:
      return one
  array = walk.materialise(value, 'scan')
  return jax.lax.index_in_dim(array, i, keepdims=False)


class _Flat(Walk):
  """A walk that writes calls and scans out, and leaves other bodies alone."""

  rules: dict[str, Callable[[Any, Any, list[Any]], list[Any]]] = {
    **{name: control.RULES[name] for name in compat.CALLS},
    **dict.fromkeys(compat.REMAT, _inline),
    **dict.fromkeys(('while', 'cond', 'shard_map'), _keep),
    'scan': _unroll,
  }

"""Calls, loops and branches, rebuilt around what a walk does inside them.

Every rule takes the walk, an equation with at least one `Param` among its
operands, and the operands; it returns the equation's results and leaves what
was emitted inside on the walk's own tape. A body is walked once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp

from utilized_rank.tree.layout import View
from utilized_rank.walk import compat
from utilized_rank.walk import custom
from utilized_rank.walk import shard_map
from utilized_rank.walk.values import Emission
from utilized_rank.walk.values import Loop
from utilized_rank.walk.values import Output
from utilized_rank.walk.values import Param
from utilized_rank.walk.values import Pieces
from utilized_rank.walk.values import Running
from utilized_rank.walk.values import split


def _call(walk: Any, eqn: Any, operands: list[Any]) -> list[Any]:
  inner = eqn.params[compat.CALLS[eqn.primitive.name]]
  jaxpr, consts = compat.open_jaxpr(inner)
  return walk.run(jaxpr, consts, operands)


def _custom(walk: Any, eqn: Any, operands: list[Any]) -> list[Any]:
  """A function with its own rule for derivatives.

  The rule survives where the walk is differentiated; what looks at forward
  values alone enters the function.
  """
  inner = eqn.params[compat.CALLS[eqn.primitive.name]]
  jaxpr, consts = compat.open_jaxpr(inner)
  if holds_product(walk, jaxpr, consts, operands):
    is_vjp = eqn.primitive.name == 'custom_vjp_call'
    if is_vjp and getattr(walk.visitor, 'is_differentiated', False):
      return custom.keep_rule(walk, eqn, jaxpr, consts, operands)
    return walk.run(jaxpr, consts, operands)
  name = eqn.primitive.name
  return compat.bind(eqn, [walk.materialise(v, name) for v in operands])


class _Probe:
  """Visitor that only looks for products."""

  def __init__(self, visitor: Any):
    self._visitor = visitor
    self.found = False

  def product(self, eqn, operands, which, walk):
    self.found = True
    plain = list(operands)
    param = operands[which]
    plain[which] = param.payload.materialise(param.view)
    return compat.bind(eqn, plain)[0]

  def wants(self, view: View) -> bool:
    return self._visitor.wants(view)

  def opaque(self, view: View, primitive: str) -> None:
    self._visitor.opaque(view, primitive)

  def dropped(self, view: View, reason: str) -> None:
    pass

  def biased(self, output: Output, bias: Param) -> bool:
    raise AssertionError('a probe makes no outputs')

  def stacked(self, use: Any, loop: Any, size: int, is_stacked: bool) -> Any:
    raise AssertionError('a probe emits nothing')


def holds_product(
  walk: Any, jaxpr: Any, consts: Sequence[Any], operands: Sequence[Any]
) -> bool:
  """Whether a body has a product that the walk's visitor looks at."""
  probe = _Probe(walk.visitor)
  arrays, rebuild = split(operands)

  def shapes(arrays):
    scope = type(walk)(probe, walk.rescaling)
    outs = scope.run(jaxpr, consts, rebuild(arrays))
    return [v for v in outs if not isinstance(v, (Param, Pieces))]

  jax.eval_shape(shapes, arrays)
  return probe.found


def _remat(walk: Any, eqn: Any, operands: list[Any]) -> list[Any]:
  jaxpr, consts = compat.open_jaxpr(eqn.params['jaxpr'])
  arrays, rebuild = split(operands)
  emitted: list[Emission] = []

  def body(arrays):
    scope = walk.scope()
    outs = scope.run(jaxpr, consts, rebuild(arrays))
    outs = [scope.materialise(v, 'remat output') for v in outs]
    emitted[:] = scope.tape.emissions.values()
    return outs, [e.value for e in emitted]

  outs, values = jax.checkpoint(
    body,
    prevent_cse=eqn.params['prevent_cse'],
    policy=eqn.params['policy'],
  )(arrays)
  token = Loop('remat')
  for emission, value in zip(emitted, values, strict=True):
    for use in emission.uses:
      walk.tape.emit(
        (token, emission.key), lambda v=value: v, use, emission.loops
      )
  return outs


class _Carry:
  """A loop's carry, of which parameters that never change stay parameters."""

  def __init__(self, walk, values, before, after, name):
    # A parameter that is carried unchanged is as good as a constant.
    self.fixed = [
      isinstance(v, Param) and a is b
      for v, b, a in zip(values, before, after, strict=True)
    ]
    self.values = [
      v if fixed else walk.materialise(v, name)
      for v, fixed in zip(values, self.fixed, strict=True)
    ]
    self._name = name

  @property
  def params(self) -> list[Any]:
    return [v for v, fixed in zip(self.values, self.fixed) if fixed]

  @property
  def loose(self) -> list[Any]:
    return [v for v, fixed in zip(self.values, self.fixed) if not fixed]

  def join(self, params: Sequence[Any], loose: Sequence[Any]) -> list[Any]:
    kept, moving = iter(params), iter(loose)
    return [next(kept) if fixed else next(moving) for fixed in self.fixed]

  def moved(self, scope: Any, values: Sequence[Any]) -> list[Any]:
    return [
      scope.materialise(v, self._name)
      for v, fixed in zip(values, self.fixed, strict=True)
      if not fixed
    ]


def _scan(walk: Any, eqn: Any, operands: list[Any]) -> list[Any]:
  p = eqn.params
  if not p['length']:
    return compat.bind(
      eqn, [walk.materialise(v, 'a scan of no steps') for v in operands]
    )
  jaxpr, closed = compat.open_jaxpr(p['jaxpr'])
  n_consts, n_carry = compat.scan_split(p)
  n_state = n_consts + n_carry
  token = Loop('scan')
  carry = _Carry(
    walk,
    operands[n_consts:n_state],
    jaxpr.invars[n_consts:n_state],
    jaxpr.outvars[:n_carry],
    'scan carry',
  )
  const_arrays, rebuild = split(operands[:n_consts] + carry.params)
  slices, read = _slice_over(walk, operands[n_state:], token)
  emitted: list[Emission] = []

  def step(loose, x):
    inner = rebuild(const_arrays)
    consts, params = inner[:n_consts], inner[n_consts:]
    scope = walk.scope()
    outs = scope.run(
      jaxpr, closed, consts + carry.join(params, loose) + read(x)
    )
    ys = [scope.materialise(v, 'scan output') for v in outs[n_carry:]]
    emitted[:] = scope.tape.emissions.values()
    values = [e.value for e in emitted]
    stacks = [v for e, v in zip(emitted, values) if token in e.loops]
    sums = [v for e, v in zip(emitted, values) if token not in e.loops]
    return carry.moved(scope, outs[:n_carry]), sums, (ys, stacks)

  one = lambda a: jax.lax.index_in_dim(a, 0, keepdims=False)
  first = jax.eval_shape(lambda t: jax.tree.map(one, t), slices)
  staged, (_, sums, _) = compat.stage(step, carry.loose, first)

  def body(state, x):
    loose, totals = state
    loose, sums, ys = staged(loose, x)
    return (loose, jax.tree.map(jnp.add, totals, sums)), ys

  (loose, totals), (ys, stacked) = jax.lax.scan(
    body,
    (carry.loose, compat.zeros(sums)),
    slices,
    length=p['length'],
    reverse=p['reverse'],
    unroll=p['unroll'],
  )
  _leave(walk, token, p['length'], emitted, stacked, totals)
  return carry.join(carry.params, loose) + ys


def _slice_over(walk: Any, xs: Sequence[Any], token: Loop):
  """What a scan walks over, and how its body reads one step of it."""
  slices: list[Any] = []
  readers: list[Callable[[Any], Any]] = []
  for value in xs:
    parts = None
    if isinstance(value, Param):
      parts = value.payload.unstack(value.view)
    if parts is None:
      slices.append(walk.materialise(value, 'scan'))
      readers.append(lambda x: x)
      continue
    arrays, read = parts
    inner = value.view.take(0, token)
    slices.append(arrays)
    readers.append(functools.partial(_read, inner, read))
  return slices, lambda x: [r(v) for r, v in zip(readers, x, strict=True)]


def _read(view: View, read: Callable[[Any], Any], x: Any) -> Param:
  return Param(view, read(x))


def _while(walk: Any, eqn: Any, operands: list[Any]) -> list[Any]:
  p = eqn.params
  test, test_closed = compat.open_jaxpr(p['cond_jaxpr'])
  jaxpr, closed = compat.open_jaxpr(p['body_jaxpr'])
  nt, nb = p['cond_nconsts'], p['body_nconsts']
  test_consts = [walk.materialise(v, 'while condition') for v in operands[:nt]]
  carry = _Carry(
    walk,
    operands[nt + nb :],
    jaxpr.invars[nb:],
    jaxpr.outvars,
    'while carry',
  )
  looked_at = compat.count_uses(test)
  seen = [
    walk.materialise(v, 'while condition')
    if var in looked_at
    else v.payload.materialise(v.view)
    for v, var, fixed in zip(
      carry.values, test.invars[nt:], carry.fixed, strict=True
    )
    if fixed
  ]
  arrays, rebuild = split(operands[nt : nt + nb] + carry.params)
  emitted: list[Emission] = []

  def is_running(loose):
    now = carry.join(seen, loose)
    (out,) = jax.core.eval_jaxpr(test, test_closed, *test_consts, *now)
    return out

  def step(loose):
    inner = rebuild(arrays)
    operands = inner[:nb] + carry.join(inner[nb:], loose)
    # A vmapped loop runs until the last of its examples is done, and those
    # that are done before keep what they have.
    running = is_running(loose)
    scope = walk.scope()
    if running.shape:
      consts = tuple(isinstance(v, (Param, Pieces)) for v in operands[:nb])
      scope = walk.scope(Running(running, test.outvars[0], jaxpr, consts))
    outs = scope.run(jaxpr, closed, operands)
    emitted[:] = scope.tape.emissions.values()
    moved = carry.moved(scope, outs)
    if running.shape:
      moved = [
        jnp.where(jnp.expand_dims(running, range(running.ndim, b.ndim)), a, b)
        for a, b in zip(moved, loose, strict=True)
      ]
    return moved, [e.value for e in emitted]

  staged, (_, sums) = compat.stage(step, carry.loose)

  def body(state):
    loose, totals = state
    loose, sums = staged(loose)
    return loose, jax.tree.map(jnp.add, totals, sums)

  loose, totals = jax.lax.while_loop(
    lambda state: jnp.any(is_running(state[0])),
    body,
    (carry.loose, compat.zeros(sums)),
  )
  _leave(walk, Loop('while'), 1, emitted, [], totals)
  return carry.join(carry.params, loose)


def _cond(walk: Any, eqn: Any, operands: list[Any]) -> list[Any]:
  index = walk.materialise(operands[0], 'cond predicate')
  arrays, rebuild = split(operands[1:])
  branches, found, shapes = [], [], []
  for branch in eqn.params['branches']:
    jaxpr, closed = compat.open_jaxpr(branch)
    emitted: list[Emission] = []

    def enter(arrays, jaxpr=jaxpr, closed=closed, emitted=emitted):
      scope = walk.scope()
      outs = scope.run(jaxpr, closed, rebuild(arrays))
      outs = [scope.materialise(v, 'cond output') for v in outs]
      emitted[:] = scope.tape.emissions.values()
      return outs, [e.value for e in emitted]

    staged, (_, values) = compat.stage(enter, arrays)
    branches.append(staged)
    found.append(emitted)
    shapes.append(values)

  def run(k):
    def branch(arrays):
      # What the other branches would have emitted is zero.
      outs, values = branches[k](arrays)
      return outs, [
        values if j == k else compat.zeros(shapes[j])
        for j in range(len(branches))
      ]

    return branch

  outs, values = jax.lax.switch(
    index, [run(k) for k in range(len(branches))], arrays
  )
  for emitted, totals in zip(found, values, strict=True):
    _leave(walk, Loop('branch'), 1, emitted, [], totals)
  return outs


def _leave(
  walk: Any,
  token: Loop,
  size: int,
  emitted: Sequence[Emission],
  stacked: Sequence[Any],
  totals: Sequence[Any],
) -> None:
  """Takes what a loop's body emitted into the scope around the loop."""
  stacks, sums = iter(stacked), iter(totals)
  for emission in emitted:
    is_stacked = token in emission.loops
    value = next(stacks if is_stacked else sums)
    for use in emission.uses:
      walk.tape.emit(
        (token, emission.key),
        lambda v=value: v,
        walk.visitor.stacked(use, token, size, is_stacked),
        emission.loops - {token},
      )


RULES: dict[str, Callable[[Any, Any, list[Any]], list[Any]]] = {
  **{
    name: _custom if name.startswith('custom_') else _call
    for name in compat.CALLS
  },
  **dict.fromkeys(compat.REMAT, _remat),
  'scan': _scan,
  'while': _while,
  'cond': _cond,
  'shard_map': shard_map.shard_map,
}

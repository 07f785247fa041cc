"""Walks a traced function and follows its parameters to their products.

The walker repeats every equation of a jaxpr. A value that is a parameter leaf,
or a leaf behind layout operations alone, travels as a `Param`; everything else
is a plain array. Where a matrix product or a convolution has exactly one
`Param` among its operands, the walker asks its *visitor* what to compute there.
What the visitor emits (sums of activations, say) is carried out of loops,
branches and remat by the walker.

Nothing is passed over in silence: a `Param` that meets a primitive which hides
its computation is an error that names both, and every other place where a leaf
stops being a leaf is recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
import dataclasses
import itertools
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from utilized_rank import compat
from utilized_rank.layout import View


class UnsupportedError(ValueError):
  """A parameter enters a computation that the walker cannot see into."""


class Payload(Protocol):
  """What stands for a leaf while its function is being walked."""

  def relayout(self, eqn: Any, view: View) -> Payload:
    """The payload of the view that `eqn`, a layout operation, makes."""
    ...

  def index(self, view: View, axis: int, at: Any) -> Payload | None:
    """The payload once one index of an axis is left, or None."""
    ...

  def unstack(
      self, view: View
  ) -> tuple[Any, Callable[[Any], Payload]] | None:
    """A pytree to loop over in place of axis 0, and how to read a slice."""
    ...

  def materialise(self, view: View) -> jax.Array:
    """The array that the view describes."""
    ...


@dataclasses.dataclass(frozen=True)
class Param:
  """A parameter leaf, or a layout of one, as a value of the walk."""

  view: View
  payload: Any


@dataclasses.dataclass(frozen=True)
class Output:
  """What a product made, while it is still only that, laid out anew.

  The view is over the *kernel's* atoms, rows being axes without atoms, so a
  bias that is added can be recognised by its place alone.
  """

  view: View
  value: Any
  use: Any


@dataclasses.dataclass(frozen=True)
class Emission:
  """One value on its way out of the walk.

  Attributes:
    key: what makes it the same value as another emission.
    value: pytree of arrays.
    uses: for each use of the value, an object of the visitor's.
    loops: tokens of the loops that stack it; other loops add it up.
  """

  key: Hashable
  value: Any
  uses: list[Any]
  loops: frozenset[Any]


class Tape:
  """Emissions of one scope, by key."""

  def __init__(self):
    self.emissions: dict[Hashable, Emission] = {}

  def emit(
      self,
      key: Hashable,
      make: Callable[[], Any],
      use: Any,
      loops: frozenset[Any],
  ) -> None:
    """Adds a use of a value, making the value where it is new."""
    if key not in self.emissions:
      self.emissions[key] = Emission(key, make(), [], loops)
    self.emissions[key].uses.append(use)


class Visitor(Protocol):
  """What to do with the products that a walk finds."""

  def product(
      self, eqn: Any, operands: Sequence[Any], which: int, walk: Walk
  ) -> Any:
    """The output of a product; `operands[which]` is the one `Param`."""
    ...

  def dropped(self, view: View, reason: str) -> None:
    """A leaf stopped being a leaf."""
    ...

  def wants(self, view: View) -> bool:
    """Whether the leaf must not vanish into an opaque computation."""
    ...

  def biased(self, output: Output, bias: Param) -> bool:
    """A parameter is added to a product; whether that makes it its bias."""
    ...

  def stacked(
      self, use: Any, loop: Any, size: int, is_stacked: bool
  ) -> Any:
    """The use, seen from outside a loop that stacked or summed it."""
    ...


class Loop:
  """Identity of one loop (or of one traced index) of the walk."""

  def __init__(self, name: str):
    self.name = name

  def __repr__(self) -> str:
    return f'<{self.name}>'


_KEEPS_LAYOUT = (
    'copy', 'copy_p', 'stop_gradient', 'sharding_constraint',
    'reduce_precision', 'name', 'pvary', 'pcast', 'reshard', 'device_put',
)
_RENAMES = ('convert_element_type', 'reshape', 'transpose', 'squeeze',
            'broadcast_in_dim', 'copy', 'name', 'stop_gradient')
_PRODUCTS = ('dot_general', 'conv_general_dilated')
# Their sub-computation combines two scalars; it holds no product.
_REDUCERS = ('scatter', 'reduce', 'select_and_', 'arg', 'cum')


class Walk:
  """One walk over a traced function."""

  def __init__(self, visitor: Visitor):
    self.visitor = visitor
    self.tape = Tape()
    self.products = 0
    self._outer: Walk | None = None
    # id of a value -> (what it is a plain renaming of, the value). The value
    # is kept so that its id stays its own.
    self._origins: dict[int, tuple[Hashable, Any]] = {}
    self._serial = itertools.count()

  def origin(self, value: Any) -> Hashable:
    """A key that two values share if one computation made both.

    Three casts of one activation, as q, k and v make, are one value.
    """
    known = self._origins.get(id(value))
    if known is None:
      known = self._origins[id(value)] = (('value', next(self._serial)), value)
    return known[0]

  def scope(self) -> Walk:
    """The walk of a body: emissions of its own, all else shared."""
    inner = Walk(self.visitor)
    inner._origins, inner._serial = self._origins, self._serial
    inner._outer = self
    return inner

  def _note_product(self) -> None:
    scope: Walk | None = self
    while scope is not None:
      scope.products += 1
      scope = scope._outer

  def run(
      self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]
  ) -> list[Any]:
    """Evaluates an open jaxpr; values in and out may be `Param`s."""
    env: dict[Any, Any] = {}
    uses = _count_uses(jaxpr)
    live = dict(uses)

    def write(var, value):
      if isinstance(value, Output) and uses.get(var, 0) != 1:
        # Only a bias that is the sole thing done to a product is its bias.
        value = value.value
      env[var] = value

    def read(atom):
      return atom.val if isinstance(atom, compat.Literal) else env[atom]

    for var, value in zip(
        [*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True
    ):
      write(var, value)
    for eqn in jaxpr.eqns:
      operands = [read(a) for a in eqn.invars]
      with compat.context_of(eqn):
        results = self._equation(eqn, operands)
      for var, value in zip(eqn.outvars, results, strict=True):
        write(var, value)
      for atom in eqn.invars:
        if not isinstance(atom, compat.Literal):
          live[atom] -= 1
          if not live[atom]:
            del env[atom]
    return [read(a) for a in jaxpr.outvars]

  def materialise(self, value: Any, reason: str) -> Any:
    """The plain array behind a value of the walk, the loss being noted."""
    if isinstance(value, Param):
      self.visitor.dropped(value.view, reason)
      return value.payload.materialise(value.view)
    return value.value if isinstance(value, Output) else value

  def _equation(self, eqn: Any, operands: list[Any]) -> list[Any]:
    name = eqn.primitive.name
    params = [i for i, v in enumerate(operands) if isinstance(v, Param)]
    if not params:
      if any(isinstance(v, Output) for v in operands):
        moved = self._move_output(eqn, operands)
        if moved is not None:
          return moved
        operands = [self.materialise(v, name) for v in operands]
      results = compat.bind(eqn, operands)
      if name in _RENAMES and len(operands) == 1:
        self._rename(eqn, operands[0], results[0])
      return results
    if len(params) == len(operands) == 1 or name == 'optimization_barrier':
      moved = self._move_params(eqn, operands)
      if moved is not None:
        return moved
    if name in _PRODUCTS and len(params) == 1:
      operands = [
          v.value if isinstance(v, Output) else v for v in operands
      ]
      self._note_product()
      return [self.visitor.product(eqn, operands, params[0], self)]
    if name == 'dynamic_slice' and params == [0]:
      taken = self._dynamic_index(eqn, operands)
      if taken is not None:
        return taken
    if name in ('add', 'add_any') and len(params) == 1:
      other, bias = operands[1 - params[0]], operands[params[0]]
      if isinstance(other, Output) and self.visitor.biased(other, bias):
        plain = [
            v.payload.materialise(v.view) if v is bias else other.value
            for v in operands
        ]
        return compat.bind(eqn, plain)
    rule = _CONTROL.get(name)
    if rule is not None:
      return rule(self, eqn, [
          v.value if isinstance(v, Output) else v for v in operands
      ])
    if name in compat.OPAQUE or (
        compat.sub_jaxprs(eqn) and not name.startswith(_REDUCERS)
    ):
      wanted = [i for i in params if self.visitor.wants(operands[i].view)]
      if wanted:
        path = operands[wanted[0]].view.path
        raise UnsupportedError(
            f'parameter {path!r} enters the primitive {name!r}, which hides '
            'what it computes with it; leave the parameter out with select='
            f"[('{path}', False), ...] or write the product outside of it"
        )
    return compat.bind(eqn, [self.materialise(v, name) for v in operands])

  # --- layout operations ---

  def _rename(self, eqn: Any, operand: Any, result: Any) -> None:
    key = (
        eqn.primitive.name, self.origin(operand),
        str(sorted(eqn.params.items(), key=lambda item: item[0])),
    )
    self._origins[id(result)] = (key, result)

  def _move_params(self, eqn: Any, operands: list[Any]) -> list[Any] | None:
    if eqn.primitive.name == 'optimization_barrier':
      # A barrier orders what is computed; a parameter is not computed.
      plain = [
          v.value if isinstance(v, Output) else v
          for v in operands if not isinstance(v, Param)
      ]
      results = iter(eqn.primitive.bind(*plain) if plain else ())
      return [v if isinstance(v, Param) else next(results) for v in operands]
    param = operands[0]
    if eqn.primitive.name == 'slice':
      return self._static_index(eqn, param)
    view = _moved(eqn, param.view)
    if view is None:
      return None
    return [Param(view, param.payload.relayout(eqn, view))]

  def _move_output(self, eqn: Any, operands: list[Any]) -> list[Any] | None:
    if len(operands) != 1:
      return None
    view = _moved(eqn, operands[0].view)
    if view is None:
      return None
    value, = compat.bind(eqn, [operands[0].value])
    return [Output(view, value, operands[0].use)]

  def _static_index(self, eqn: Any, param: Param) -> list[Any] | None:
    starts = eqn.params['start_indices']
    limits = eqn.params['limit_indices']
    lengths = [b - a for a, b in zip(starts, limits, strict=True)]
    return self._one_index(param, lengths, starts, None)

  def _dynamic_index(self, eqn: Any, operands: list[Any]) -> list[Any] | None:
    starts = [
        v.value if isinstance(v, Output) else v for v in operands[1:]
    ]
    if any(isinstance(v, Param) for v in starts):
      return None
    lengths = eqn.params['slice_sizes']
    return self._one_index(operands[0], lengths, starts, Loop('traced index'))

  def _one_index(
      self, param: Param, lengths: Any, starts: Any, token: Any
  ) -> list[Any] | None:
    cut = [
        i for i, (n, size) in enumerate(
            zip(lengths, param.view.sizes, strict=True)) if n != size
    ]
    if len(cut) != 1 or lengths[cut[0]] != 1:
      return None
    axis, = cut
    if len(param.view.axes[axis]) != 1:
      return None
    start = starts[axis]
    payload = param.payload.index(param.view, axis, start)
    if payload is None:
      return None
    by = start if token is None else (token, start)
    view = param.view.take(axis, by)
    # The axis stays, with size one and without atoms.
    sizes = list(view.sizes)
    axes = list(view.axes)
    sizes.insert(axis, 1)
    axes.insert(axis, ())
    view = dataclasses.replace(view, sizes=tuple(sizes), axes=tuple(axes))
    return [Param(view, payload)]

  # --- calls, loops and branches ---

  def _call(self, eqn: Any, operands: list[Any]) -> list[Any]:
    inner = eqn.params[compat.CALLS[eqn.primitive.name]]
    jaxpr, consts = compat.open_jaxpr(inner)
    if not eqn.primitive.name.startswith('custom_'):
      return self.run(jaxpr, consts, operands)
    # A rule for derivatives survives unless a product with a parameter is
    # inside: then what is differentiated is what is computed.
    scope = self.scope()
    results = scope.run(jaxpr, consts, operands)
    if not scope.products:
      return compat.bind(
          eqn, [self.materialise(v, eqn.primitive.name) for v in operands]
      )
    self._absorb(scope.tape)
    return results

  def _absorb(self, tape: Tape) -> None:
    for emission in tape.emissions.values():
      for use in emission.uses:
        self.tape.emit(
            emission.key, lambda e=emission: e.value, use, emission.loops
        )

  def _remat(self, eqn: Any, operands: list[Any]) -> list[Any]:
    jaxpr, consts = compat.open_jaxpr(eqn.params['jaxpr'])
    arrays, rebuild = _split(operands)
    emitted: list[Emission] = []

    def body(arrays):
      scope = self.scope()
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
        self.tape.emit(
            (token, emission.key), lambda v=value: v, use, emission.loops
        )
    return outs

  def _scan(self, eqn: Any, operands: list[Any]) -> list[Any]:
    p = eqn.params
    jaxpr, closed = compat.open_jaxpr(p['jaxpr'])
    n_consts, n_carry = compat.scan_split(p)
    token = Loop('scan')
    invars = jaxpr.invars
    consts = operands[:n_consts]
    carry = operands[n_consts:n_consts + n_carry]
    xs = operands[n_consts + n_carry:]
    # A parameter that is carried unchanged is as good as a constant.
    still = [
        isinstance(v, Param) and jaxpr.outvars[i] is invars[n_consts + i]
        for i, v in enumerate(carry)
    ]
    carry = [
        v if fixed else self.materialise(v, 'scan carry')
        for v, fixed in zip(carry, still, strict=True)
    ]
    const_arrays, rebuild_consts = _split(
        consts + [v for v, fixed in zip(carry, still) if fixed]
    )
    loose = [v for v, fixed in zip(carry, still) if not fixed]
    slices, rebuild_slices = self._slice_over(xs, token)

    def step(carry, x):
      inner = rebuild_consts(const_arrays)
      moving = iter(carry)
      kept = iter(inner[n_consts:])
      now = [next(kept) if fixed else next(moving) for fixed in still]
      scope = self.scope()
      outs = scope.run(
          jaxpr, closed, inner[:n_consts] + now + rebuild_slices(x)
      )
      new = [
          scope.materialise(v, 'scan carry')
          for v, fixed in zip(outs[:n_carry], still) if not fixed
      ]
      ys = [scope.materialise(v, 'scan output') for v in outs[n_carry:]]
      return new, ys, list(scope.tape.emissions.values())

    first = lambda tree: jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), tree
    )
    emitted = self._preview(step, loose, first(slices))
    stacks = [token in e.loops for e in emitted]

    def body(state, x):
      carry, totals = state
      new, ys, now = step(carry, x)
      values = [e.value for e in now]
      sums = [v for v, stack in zip(values, stacks) if not stack]
      return (new, jax.tree.map(jnp.add, totals, sums)), (
          ys, [v for v, stack in zip(values, stacks) if stack]
      )

    zeros = [
        _zeros(e.value) for e, stack in zip(emitted, stacks) if not stack
    ]
    (new, totals), (ys, stacked) = jax.lax.scan(
        body, (loose, zeros), slices, length=p['length'],
        reverse=p['reverse'], unroll=p['unroll'],
    )
    self._leave(token, p['length'], emitted, stacks, stacked, totals)
    moved = iter(new)
    return [
        v if fixed else next(moved)
        for v, fixed in zip(carry, still, strict=True)
    ] + ys

  def _slice_over(self, xs: list[Any], token: Loop):
    """What a scan walks over, and how its body reads one step of it."""
    slices: list[Any] = []
    readers: list[Callable[[Any], Any]] = []
    for value in xs:
      if not isinstance(value, Param):
        slices.append(value)
        readers.append(lambda x: x)
        continue
      parts = value.payload.unstack(value.view)
      if parts is None:
        slices.append(self.materialise(value, 'scan'))
        readers.append(lambda x: x)
        continue
      arrays, read = parts
      inner = value.view.take(0, token)
      slices.append(arrays)
      readers.append(lambda x, r=read, v=inner: Param(v, r(x)))
    return slices, lambda x: [r(v) for r, v in zip(readers, x, strict=True)]

  def _while(self, eqn: Any, operands: list[Any]) -> list[Any]:
    p = eqn.params
    test, test_closed = compat.open_jaxpr(p['cond_jaxpr'])
    jaxpr, closed = compat.open_jaxpr(p['body_jaxpr'])
    nt, nb = p['cond_nconsts'], p['body_nconsts']
    test_consts = [
        self.materialise(v, 'while condition') for v in operands[:nt]
    ]
    consts, state = operands[nt:nt + nb], operands[nt + nb:]
    still = [
        isinstance(v, Param) and jaxpr.outvars[i] is jaxpr.invars[nb + i]
        for i, v in enumerate(state)
    ]
    state = [
        v if fixed else self.materialise(v, 'while carry')
        for v, fixed in zip(state, still, strict=True)
    ]
    arrays, rebuild = _split(
        consts + [v for v, fixed in zip(state, still) if fixed]
    )
    loose = [v for v, fixed in zip(state, still) if not fixed]

    def whole(moving):
      moving = iter(moving)
      inner = rebuild(arrays)
      kept = iter(inner[nb:])
      return inner[:nb], [
          next(kept) if fixed else next(moving) for fixed in still
      ]

    def go_on(loop_state):
      _, now = whole(loop_state[0])
      now = [
          v.payload.materialise(v.view) if isinstance(v, Param) else v
          for v in now
      ]
      out, = jax.core.eval_jaxpr(test, test_closed, *test_consts, *now)
      return out

    def step(moving, _):
      inner, now = whole(moving)
      scope = self.scope()
      outs = scope.run(jaxpr, closed, inner + now)
      new = [
          scope.materialise(v, 'while carry')
          for v, fixed in zip(outs, still) if not fixed
      ]
      return new, [], list(scope.tape.emissions.values())

    emitted = self._preview(step, loose, ())

    def body(loop_state):
      moving, totals = loop_state
      new, _, now = step(moving, ())
      return new, jax.tree.map(jnp.add, totals, [e.value for e in now])

    new, totals = jax.lax.while_loop(
        go_on, body, (loose, [_zeros(e.value) for e in emitted])
    )
    self._leave(
        Loop('while'), 0, emitted, [False] * len(emitted), [], totals
    )
    moved = iter(new)
    return [
        v if fixed else next(moved)
        for v, fixed in zip(state, still, strict=True)
    ]

  def _cond(self, eqn: Any, operands: list[Any]) -> list[Any]:
    index = self.materialise(operands[0], 'cond predicate')
    arrays, rebuild = _split(operands[1:])

    def enter(branch, arrays):
      jaxpr, closed = compat.open_jaxpr(branch)
      scope = self.scope()
      outs = scope.run(jaxpr, closed, rebuild(arrays))
      outs = [scope.materialise(v, 'cond output') for v in outs]
      return outs, [], list(scope.tape.emissions.values())

    branches = eqn.params['branches']
    found = [
        self._preview(lambda a, _, b=b: enter(b, a), arrays, ())
        for b in branches
    ]

    def branch_fn(k):
      def run(arrays):
        outs, _, now = enter(branches[k], arrays)
        return outs, [
            [e.value for e in now] if j == k
            else [_zeros(e.value) for e in found[j]]
            for j in range(len(branches))
        ]
      return run

    outs, values = jax.lax.switch(
        index, [branch_fn(k) for k in range(len(branches))], arrays
    )
    for emitted, branch_values in zip(found, values, strict=True):
      self._leave(
          Loop('branch'), 0, emitted, [False] * len(emitted), [],
          branch_values,
      )
    return outs

  def _preview(self, step: Any, state: Any, x: Any) -> list[Emission]:
    """What `step` would emit: shapes only, nothing is computed."""
    found: list[Emission] = []

    def shapes(state, x):
      _, _, emitted = step(state, x)
      found[:] = emitted
      return [e.value for e in emitted]

    values = jax.eval_shape(shapes, state, x)
    return [
        dataclasses.replace(e, value=v)
        for e, v in zip(found, values, strict=True)
    ]

  def _leave(self, token, size, emitted, stacks, stacked, totals) -> None:
    """Takes what a loop's body emitted into the scope around the loop."""
    stacked, totals = iter(stacked), iter(totals)
    for emission, stack in zip(emitted, stacks, strict=True):
      value = next(stacked if stack else totals)
      for use in emission.uses:
        self.tape.emit(
            (token, emission.key), lambda v=value: v,
            self.visitor.stacked(use, token, size, stack),
            emission.loops - {token},
        )


_CONTROL: dict[str, Callable[[Walk, Any, list[Any]], list[Any]]] = {
    **{name: Walk._call for name in compat.CALLS},
    **{name: Walk._remat for name in compat.REMAT},
    'scan': Walk._scan,
    'while': Walk._while,
    'cond': Walk._cond,
}


def _moved(eqn: Any, view: View) -> View | None:
  """The view after a layout operation; None if the equation is not one."""
  name, p = eqn.primitive.name, eqn.params
  if name == 'convert_element_type':
    return view.cast(p['new_dtype'])
  if name in _KEEPS_LAYOUT:
    return view
  if name == 'transpose':
    return view.transpose(p['permutation'])
  if name == 'squeeze':
    return view.squeeze(p['dimensions'])
  if name == 'broadcast_in_dim' and len(eqn.invars) == 1:
    return view.broadcast(p['shape'], p['broadcast_dimensions'])
  if name == 'reshape' and p.get('dimensions') is None:
    return view.reshape(p['new_sizes'])
  return None


def _split(values: Sequence[Any]):
  """The arrays in a list of values, and how to put the list together again."""
  arrays = [v.payload if isinstance(v, Param) else v for v in values]

  def rebuild(arrays):
    return [
        Param(v.view, a) if isinstance(v, Param) else a
        for v, a in zip(values, arrays, strict=True)
    ]

  return arrays, rebuild


def _zeros(tree: Any) -> Any:
  return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), tree)


def _count_uses(jaxpr: Any) -> dict[Any, int]:
  uses: dict[Any, int] = {}
  for atoms in [*(eqn.invars for eqn in jaxpr.eqns), jaxpr.outvars]:
    for atom in atoms:
      if not isinstance(atom, compat.Literal):
        uses[atom] = uses.get(atom, 0) + 1
  return uses

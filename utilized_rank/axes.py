"""Which axes of every value of a traced function run along the examples.

Read off the jaxpr, from the batch's arrays to every product: an elementwise
operation keeps an axis where it is, a reshape cuts or joins it, a sum over it
mixes examples. Whatever is not known to keep examples apart is said to mix
them, with its name: the analysis may refuse a function that it could have
accepted, and never accepts one that mixes.

Tokens are followed too, as rows that stand for a token: attention mixes them,
and its output is still in their order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
import dataclasses
import math
from typing import Any

from utilized_rank import compat

EXAMPLE = 'example'
TOKEN = 'token'


@dataclasses.dataclass(frozen=True)
class Piece:
  """A factor of an axis.

  Attributes:
    size: its length.
    name: EXAMPLE or TOKEN; None for anything else.
    step: by how much the example's (token's) number grows along it.
  """

  size: int
  name: str | None = None
  step: int = 0


Axis = tuple[Piece, ...]


@dataclasses.dataclass(frozen=True)
class Where:
  """What is known of one value.

  Attributes:
    axes: the pieces of every axis, in row-major order; sizes of 1 have none.
    mixed: why an element may depend on several examples; None if it does not.
    token: the one token that the value is of, or why tokens were lost sight
      of; None where neither is known.
  """

  axes: tuple[Axis, ...]
  mixed: str | None = None
  token: int | str | None = None

  @property
  def pieces(self) -> list[Piece]:
    return [p for axis in self.axes for p in axis]

  def has(self, name: str) -> bool:
    return any(p.name == name for p in self.pieces)

  def is_along(self, name: str, size: int) -> bool:
    """Whether every example (token) is on it, once."""
    return _covers([p for p in self.pieces if p.name == name], size)

  def without(self, name: str) -> Where:
    """The same, `name` being forgotten."""
    forget = lambda p: Piece(p.size) if p.name == name else p
    axes = tuple(_merged(map(forget, axis)) for axis in self.axes)
    return dataclasses.replace(self, axes=axes)


def plain(shape: Sequence[int]) -> Where:
  """A value that does not depend on the batch."""
  return Where(tuple(_axis(n) for n in shape))


def batch_array(shape: Sequence[int], tokens: int | None) -> Where:
  """An array of the batch; its axis 1 runs along the tokens if it can."""
  axes = [_axis(n) for n in shape]
  axes[0] = _axis(shape[0], EXAMPLE)
  if tokens is not None and len(shape) > 1 and shape[1] == tokens:
    axes[1] = _axis(tokens, TOKEN)
  return Where(tuple(axes))


def _axis(size: int, name: str | None = None) -> Axis:
  return (Piece(size, name, 1 if name else 0),) if size != 1 else ()


def _covers(pieces: list[Piece], size: int) -> bool:
  step = 1
  for piece in sorted(pieces, key=lambda p: p.step):
    if piece.step != step:
      return False
    step *= piece.size
  return step == size


def _merged(pieces: Iterable[Piece]) -> Axis:
  """Neighbours that are one piece, joined."""
  out: list[Piece] = []
  for p in pieces:
    last = out[-1] if out else None
    if last and last.name == p.name and last.step == p.step * p.size:
      out[-1] = Piece(last.size * p.size, p.name, p.step)
    else:
      out.append(p)
  return tuple(out)


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
        where if known is None else self.join([known, where], 'two calls')
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

  def join(self, values: Sequence[Where], name: str) -> Where:
    """A value that each element of which depends on the same of each."""
    mixed = next((v.mixed for v in values if v.mixed), None)
    axes = []
    for same in zip(*(v.axes for v in values), strict=True):
      axis = _common(same)
      if axis is None:
        if any(p.name == EXAMPLE for a in same for p in a):
          mixed = mixed or f'{name} of values in which examples lie apart'
        axis = _axis(math.prod(p.size for p in same[0]))
      axes.append(axis)
    return Where(tuple(axes), mixed, _token(values))

  def _checked(self, eqn: Any, where: Where) -> Where:
    """Examples lie on a value once and whole, or it counts as mixed."""
    if where.mixed:
      return where.without(EXAMPLE)
    if where.has(EXAMPLE) and not where.is_along(EXAMPLE, self.examples):
      return _mixed(eqn.primitive.name, where)
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
    outs = None if rule is None else rule(self, eqn, ins)
    if outs is None:
      return [_mixed(name, plain(s)) for s in shapes]
    token = _token(ins)
    return [
      _mixed(name, w)
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
    lead = next((w.axes[0] for w in xs if TOKEN in _names(w.axes[0])), None)
    slices = [_without_axis(w, 'a scan over the examples') for w in xs]
    if lead is not None:
      lost = lambda w: dataclasses.replace(w, token='a scan over the tokens')
      carry, slices = [*map(lost, carry)], [*map(lost, slices)]
    outs, carry = self._repeat(jaxpr, consts, carry, slices)
    over = _axis(eqn.params['length']) if lead is None else lead
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
        self.join([a, b], 'a loop') for a, b in zip(carry, outs, strict=False)
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
      carry = [_mixed(reason, w) for w in carry]
    return carry

  def _cond(self, eqn: Any, ins: list[Where]) -> list[Where]:
    branches = [
      self.run(compat.open_jaxpr(b)[0], ins[1:]) for b in eqn.params['branches']
    ]
    outs = [self.join(same, 'cond') for same in zip(*branches, strict=True)]
    if ins[0].mixed:
      outs = [_mixed(ins[0].mixed, w) for w in outs]
    return outs

  def _opaque(self, eqn: Any, ins: list[Where]) -> list[Where]:
    outs = [plain(v.aval.shape) for v in eqn.outvars]
    if any(w.mixed or w.has(EXAMPLE) for w in ins):
      outs = [_mixed(eqn.primitive.name, w) for w in outs]
    return outs


def _token(values: Sequence[Where]) -> int | str | None:
  """The one token that a result is of, or why that is not known."""
  tokens = {v.token for v in values if v.token is not None}
  lost = [t for t in tokens if isinstance(t, str)]
  return lost[0] if lost else tokens.pop() if len(tokens) == 1 else None


def _mixed(reason: str, where: Where) -> Where:
  return dataclasses.replace(where.without(EXAMPLE), mixed=reason)


def _common(axes: Sequence[Axis]) -> Axis | None:
  """The pieces of one axis as several values have it; None: they disagree."""
  left = [list(axis) for axis in axes]
  out: list[Piece] = []
  while left[0]:
    size = min(side[0].size for side in left)
    heads = set()
    for side in left:
      head = side[0]
      if head.size % size:
        return None
      if head.size > size:
        # The outer factor comes first; what is left of it is the inner one.
        inner = head.size // size
        side[0] = Piece(inner, head.name, head.step)
        head = Piece(size, head.name, head.step * inner)
      else:
        side.pop(0)
      if head.name is not None:
        heads.add(head)
    if len(heads) > 1:
      return None
    out.append(heads.pop() if heads else Piece(size))
  return _merged(out)


def _without_axis(where: Where, reason: str) -> Where:
  """A value along whose first axis a loop walks."""
  first, *rest = where.axes
  out = dataclasses.replace(where, axes=tuple(rest))
  if any(p.name == EXAMPLE for p in first):
    return _mixed(reason, out)
  return out


# --- rules: (flow, equation, what is known of its operands) -> of its results;
# None where it does not keep examples apart ---

Rule = Callable[[Flow, Any, list[Where]], 'list[Where] | None']


def _elementwise(flow: Flow, eqn: Any, ins: list[Where]) -> list[Where]:
  shape = eqn.outvars[0].aval.shape
  full = [
    # An axis of size 1 may be repeated; a scalar always is.
    dataclasses.replace(
      w,
      axes=tuple(a or _axis(n) for a, n in zip(w.axes, shape, strict=True)),
    )
    for w in ins
    if len(w.axes) == len(shape)
  ]
  return [flow.join(full, eqn.primitive.name)] * len(eqn.outvars)


def _names(axis: Axis) -> set[str | None]:
  return {p.name for p in axis}


def _cut(where: Where, axes: Iterable[int], keep: bool) -> Where | None:
  """The value after something that mixes along some axes.

  The axes are dropped, or with `keep` lose their names.
  """
  axes = set(axes)
  if any(EXAMPLE in _names(where.axes[i]) for i in axes):
    return None
  out = []
  for i, axis in enumerate(where.axes):
    if i not in axes:
      out.append(axis)
    elif keep:
      out.append(_axis(math.prod(p.size for p in axis)))
  return dataclasses.replace(where, axes=tuple(out))


def _reduce(flow: Flow, eqn: Any, ins: list[Where]):
  axes = eqn.params['axes' if 'axes' in eqn.params else 'dimensions']
  shape = eqn.invars[0].aval.shape
  full = [w for w in ins if len(w.axes) == len(shape)]
  out = _cut(flow.join(full, eqn.primitive.name), axes, False)
  return None if out is None else [out] * len(eqn.outvars)


def _cumulative(flow: Flow, eqn: Any, ins: list[Where]):
  del flow
  axis = ins[0].axes[eqn.params['axis']]
  return None if EXAMPLE in _names(axis) else ins


def _along(name: str) -> Rule:
  """Mixes along one axis, that of the parameter `name`."""

  def rule(flow: Flow, eqn: Any, ins: list[Where]):
    axis = eqn.params.get(name, -1)
    joined = flow.join(ins, eqn.primitive.name)
    out = _cut(joined, [axis % len(joined.axes)], True)
    return None if out is None else [out] * len(eqn.outvars)

  return rule


def _resized(flow: Flow, eqn: Any, ins: list[Where]):
  """Axes that keep their size keep their meaning; others mix (top_k, pad)."""
  del flow
  outs = []
  for var in eqn.outvars:
    axes = []
    for axis, was, now in zip(
      ins[0].axes, eqn.invars[0].aval.shape, var.aval.shape, strict=True
    ):
      if was != now and EXAMPLE in _names(axis):
        return None
      axes.append(axis if was == now else _axis(now))
    outs.append(dataclasses.replace(ins[0], axes=tuple(axes)))
  return outs


def _top_k(flow: Flow, eqn: Any, ins: list[Where]):
  axis = eqn.params.get('axis', -1) % len(ins[0].axes)
  if EXAMPLE in _names(ins[0].axes[axis]):
    return None
  return _resized(flow, eqn, [_cut(ins[0], [axis], True) or ins[0]])


def _slice(flow: Flow, eqn: Any, ins: list[Where]):
  """A part of some axes; one token's value stays that token's."""
  outs = _resized(flow, eqn, ins[:1])
  if outs is None or any(w.has(EXAMPLE) for w in ins[1:]):
    return None
  starts = eqn.params.get('start_indices')
  if starts is None:
    starts = [
      int(a.val) if isinstance(a, compat.Literal) else None
      for a in eqn.invars[1:]
    ]
  shape = eqn.outvars[0].aval.shape
  for axis, start, size in zip(ins[0].axes, starts, shape, strict=True):
    if size == 1 and TOKEN in _names(axis):
      token: int | str = 'a slice of one token, which one is not known'
      if start is not None and len(axis) == 1:
        token = start * axis[0].step
      outs = [dataclasses.replace(w, token=token) for w in outs]
  return outs


def _update_slice(flow: Flow, eqn: Any, ins: list[Where]):
  if any(w.has(EXAMPLE) for w in ins[2:]):
    return None
  operand, update = ins[:2]
  axes = []
  for a, b, was, now in zip(
    operand.axes,
    update.axes,
    eqn.invars[0].aval.shape,
    eqn.invars[1].aval.shape,
    strict=True,
  ):
    if was != now and EXAMPLE in _names(a) | _names(b):
      return None
    axes.append(b if was == now else a)
  return [flow.join([operand, Where(tuple(axes))], eqn.primitive.name)]


def _reverse(flow: Flow, eqn: Any, ins: list[Where]):
  del flow
  out = _cut(ins[0], eqn.params['dimensions'], True)
  return None if out is None else [out]


def _concatenate(flow: Flow, eqn: Any, ins: list[Where]):
  at = eqn.params['dimension']
  parts = [_cut(w, [at], True) for w in ins]
  if None in parts:
    return None
  size = eqn.outvars[0].aval.shape[at]
  whole = [
    dataclasses.replace(
      w, axes=(*w.axes[:at], _axis(size), *w.axes[at + 1 :]), token=None
    )
    for w in parts
    if w is not None
  ]
  return [flow.join(whole, eqn.primitive.name)]


def _broadcast(flow: Flow, eqn: Any, ins: list[Where]):
  del flow
  axes = [_axis(n) for n in eqn.params['shape']]
  for axis, at in zip(
    ins[0].axes, eqn.params['broadcast_dimensions'], strict=True
  ):
    if axis:
      axes[at] = axis
  return [dataclasses.replace(ins[0], axes=tuple(axes))]


def _transpose(flow: Flow, eqn: Any, ins: list[Where]):
  del flow
  axes = tuple(ins[0].axes[i] for i in eqn.params['permutation'])
  return [dataclasses.replace(ins[0], axes=axes)]


def _squeeze(flow: Flow, eqn: Any, ins: list[Where]):
  del flow
  out = _cut(ins[0], eqn.params['dimensions'], False)
  return None if out is None else [out]


def _reshape(flow: Flow, eqn: Any, ins: list[Where]):
  del flow
  (where, *_) = ins
  if eqn.params.get('dimensions') is not None:
    axes = tuple(where.axes[i] for i in eqn.params['dimensions'])
    where = dataclasses.replace(where, axes=axes)
  for attempt in (where, where.without(TOKEN)):
    out = regrouped(attempt.pieces, eqn.params['new_sizes'])
    if out is not None:
      return [dataclasses.replace(attempt, axes=out)]
  return None


def regrouped(
  pieces: Sequence[Piece], sizes: Sequence[int]
) -> tuple[Axis, ...] | None:
  """Pieces in row-major order as axes of other sizes, if they can be."""
  left = list(_merged(pieces))
  out: list[Axis] = []
  for size in sizes:
    axis: list[Piece] = []
    need = size
    while need > 1:
      head = left.pop(0)
      share = math.gcd(head.size, need)
      if share == head.size:
        axis.append(head)
      elif share == need:
        inner = head.size // share
        axis.append(Piece(share, head.name, head.step * inner))
        left.insert(0, Piece(inner, head.name, head.step))
      else:
        return None
      need //= share
    out.append(_merged(axis))
  return tuple(out)


def _dot(flow: Flow, eqn: Any, ins: list[Where]):
  (contract, batch) = eqn.params['dimension_numbers']
  for where, axes in zip(ins, contract, strict=True):
    if any(EXAMPLE in _names(where.axes[i]) for i in axes):
      return None
  shared = [
    flow.join([Where((ins[0].axes[i],)), Where((ins[1].axes[j],))], 'dot')
    for i, j in zip(*batch, strict=True)
  ]
  if any(w.mixed for w in shared):
    return None
  free = [
    w.axes[i]
    for w, c, b in zip(ins, contract, batch, strict=True)
    for i in range(len(w.axes))
    if i not in c and i not in b
  ]
  return [Where(tuple([w.axes[0] for w in shared] + free))]


def _conv(flow: Flow, eqn: Any, ins: list[Where]):
  del flow
  numbers = eqn.params['dimension_numbers']
  x, kernel = ins
  batch, feature, *space = numbers.lhs_spec
  o_batch, _, *o_space = numbers.out_spec
  if kernel.has(EXAMPLE) or eqn.params['batch_group_count'] != 1:
    return None
  if any(EXAMPLE in _names(x.axes[i]) for i in (feature, *space)):
    return None
  shape = eqn.outvars[0].aval.shape
  axes = [_axis(n) for n in shape]
  axes[o_batch] = x.axes[batch]
  strides = eqn.params['window_strides']
  for i, o, stride in zip(space, o_space, strides, strict=True):
    if stride == 1 and shape[o] == eqn.invars[0].aval.shape[i]:
      axes[o] = x.axes[i]
  return [Where(tuple(axes), token=x.token)]


def _window(flow: Flow, eqn: Any, ins: list[Where]):
  sizes = eqn.params['window_dimensions']
  mixes = [i for i, n in enumerate(sizes) if n > 1]
  out = _cut(ins[0], mixes, True)
  return None if out is None else _resized(flow, eqn, [out])


def _unstack(flow: Flow, eqn: Any, ins: list[Where]):
  del flow
  at = eqn.params['axis']
  out = _cut(ins[0], [at], False)
  if out is None or TOKEN not in _names(ins[0].axes[at]):
    return None if out is None else [out] * len(eqn.outvars)
  return [dataclasses.replace(out, token=i) for i in range(len(eqn.outvars))]


def _gather(flow: Flow, eqn: Any, ins: list[Where]):
  """A lookup: what it reads is where its indices are, whole slices aside."""
  operand, indices = ins
  d = eqn.params['dimension_numbers']
  sizes = eqn.params['slice_sizes']
  shape = eqn.outvars[0].aval.shape
  batching = dict(
    zip(d.start_indices_batching_dims, d.operand_batching_dims, strict=True)
  )
  axes = [_axis(n) for n in shape]
  places = [i for i in range(len(shape)) if i not in d.offset_dims]
  for at, axis in enumerate(indices.axes[:-1]):
    axes[places[at]] = axis
    if at in batching:
      both = _common([axis, operand.axes[batching[at]]])
      if both is None:
        return None
      axes[places[at]] = both
  kept = [
    i
    for i in range(len(sizes))
    if i not in d.collapsed_slice_dims and i not in batching.values()
  ]
  token: int | str | None = None
  for i, axis in enumerate(operand.axes):
    if i in batching.values():
      continue
    is_whole = sizes[i] == eqn.invars[0].aval.shape[i]
    if is_whole and i in kept:
      axes[d.offset_dims[kept.index(i)]] = axis
    elif EXAMPLE in _names(axis):
      return None
    elif TOKEN in _names(axis) and not indices.has(EXAMPLE):
      token = 'a lookup of tokens by position'
  return [Where(tuple(axes), token=token)]


def _scatter(flow: Flow, eqn: Any, ins: list[Where]):
  """Updates of whole slices, at places that do not depend on the batch."""
  operand, indices, updates = ins
  d = eqn.params['dimension_numbers']
  if indices.has(EXAMPLE):
    return None
  gone = {*d.inserted_window_dims, *d.operand_batching_dims}
  kept = [i for i in range(len(operand.axes)) if i not in gone]
  axes = [_axis(n) for n in eqn.invars[0].aval.shape]
  for i, u in zip(kept, d.update_window_dims, strict=True):
    sizes = eqn.invars[0].aval.shape[i], eqn.invars[2].aval.shape[u]
    if sizes[0] == sizes[1]:
      axes[i] = updates.axes[u]
    elif EXAMPLE in _names(operand.axes[i]) | _names(updates.axes[u]):
      return None
  others = set(range(len(updates.axes))) - {*d.update_window_dims}
  if any(EXAMPLE in _names(operand.axes[i]) for i in gone) or any(
    EXAMPLE in _names(updates.axes[u]) for u in others
  ):
    return None
  return [flow.join([operand, Where(tuple(axes))], eqn.primitive.name)]


def _each_of(names: str, rule: Rule) -> dict[str, Rule]:
  return dict.fromkeys(names.split(), rule)


RULES: dict[str, Rule] = {
  **_each_of(
    'abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e '
    'bessel_i1e cbrt ceil clamp clz complex conj convert_element_type copy '
    'copy_p cos cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge '
    'gt igamma igammac imag integer_pow is_finite le lgamma log log1p logistic '
    'lt max min mul name ne neg nextafter not or population_count pow real '
    'reduce_precision regularized_incomplete_beta rem round rsqrt select_n '
    'shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt '
    'square stop_gradient sub tan tanh xor pvary pcast sharding_constraint '
    'reshard device_put mul_add',
    _elementwise,
  ),
  **_each_of(
    'reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or '
    'reduce_xor reduce argmax argmin',
    _reduce,
  ),
  **_each_of('cumsum cumprod cummax cummin cumlogsumexp', _cumulative),
  **_each_of('reduce_window reduce_window_max reduce_window_sum', _window),
  'reduce_window_min': _window,
  'sort': _along('dimension'),
  'top_k': _top_k,
  'slice': _slice,
  'dynamic_slice': _slice,
  'dynamic_update_slice': _update_slice,
  'rev': _reverse,
  'concatenate': _concatenate,
  'pad': _resized,
  'split': _resized,
  'unstack': _unstack,
  'broadcast_in_dim': _broadcast,
  'transpose': _transpose,
  'squeeze': _squeeze,
  'reshape': _reshape,
  'dot_general': _dot,
  'conv_general_dilated': _conv,
  'gather': _gather,
  **_each_of('scatter scatter-add scatter_add scatter_mul', _scatter),
}
_INNER: dict[str, Callable[[Flow, Any, list[Where]], list[Where]]] = {
  **dict.fromkeys(compat.CALLS, Flow._call),
  **dict.fromkeys(compat.REMAT, Flow._call),
  'scan': Flow._scan,
  'while': Flow._while,
  'cond': Flow._cond,
  'optimization_barrier': Flow._barrier,
  'shard_map': Flow._opaque,
}

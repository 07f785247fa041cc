"""What each primitive does to axes that run along examples and tokens.

An elementwise operation keeps an axis where it is, a reshape cuts or joins it,
a sum over it mixes examples. A primitive that has no rule mixes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
import dataclasses
import math
from typing import Any

from utilized_rank.axes.where import EXAMPLE
from utilized_rank.axes.where import TOKEN
from utilized_rank.axes.where import Where
from utilized_rank.axes.where import common
from utilized_rank.axes.where import join
from utilized_rank.axes.where import names
from utilized_rank.axes.where import regrouped
from utilized_rank.axes.where import whole
from utilized_rank.walk import compat

# (equation, what is known of its operands) -> of its results; None where it
# does not keep examples apart.
Rule = Callable[[Any, list[Where]], 'list[Where] | None']


def _elementwise(eqn: Any, ins: list[Where]) -> list[Where]:
  shape = eqn.outvars[0].aval.shape
  full = [
    # An axis of size 1 may be repeated; a scalar always is.
    dataclasses.replace(
      w,
      axes=tuple(a or whole(n) for a, n in zip(w.axes, shape, strict=True)),
    )
    for w in ins
    if len(w.axes) == len(shape)
  ]
  return [join(full, eqn.primitive.name)] * len(eqn.outvars)


def _cut(where: Where, axes: Iterable[int], keep: bool) -> Where | None:
  """The value after something that mixes along some axes.

  The axes are dropped, or with `keep` lose their names.
  """
  axes = set(axes)
  if any(EXAMPLE in names(where.axes[i]) for i in axes):
    return None
  out = []
  for i, axis in enumerate(where.axes):
    if i not in axes:
      out.append(axis)
    elif keep:
      out.append(whole(math.prod(p.size for p in axis)))
  return dataclasses.replace(where, axes=tuple(out))


def _reduce(eqn: Any, ins: list[Where]):
  axes = eqn.params['axes' if 'axes' in eqn.params else 'dimensions']
  shape = eqn.invars[0].aval.shape
  full = [w for w in ins if len(w.axes) == len(shape)]
  out = _cut(join(full, eqn.primitive.name), axes, False)
  return None if out is None else [out] * len(eqn.outvars)


def _cumulative(eqn: Any, ins: list[Where]):
  axis = ins[0].axes[eqn.params['axis']]
  return None if EXAMPLE in names(axis) else ins


def _along(name: str) -> Rule:
  """Mixes along one axis, that of the parameter `name`."""

  def rule(eqn: Any, ins: list[Where]):
    axis = eqn.params.get(name, -1)
    joined = join(ins, eqn.primitive.name)
    out = _cut(joined, [axis % len(joined.axes)], True)
    return None if out is None else [out] * len(eqn.outvars)

  return rule


def _resized(eqn: Any, ins: list[Where]):
  """Axes that keep their size keep their meaning; others mix (top_k, pad)."""
  outs = []
  for var in eqn.outvars:
    axes = []
    for axis, was, now in zip(
      ins[0].axes, eqn.invars[0].aval.shape, var.aval.shape, strict=True
    ):
      if was != now and EXAMPLE in names(axis):
        return None
      axes.append(axis if was == now else whole(now))
    outs.append(dataclasses.replace(ins[0], axes=tuple(axes)))
  return outs


def _top_k(eqn: Any, ins: list[Where]):
  axis = eqn.params.get('axis', -1) % len(ins[0].axes)
  if EXAMPLE in names(ins[0].axes[axis]):
    return None
  return _resized(eqn, [_cut(ins[0], [axis], True) or ins[0]])


def _slice(eqn: Any, ins: list[Where]):
  """A part of some axes; one token's value stays that token's."""
  outs = _resized(eqn, ins[:1])
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
    if size == 1 and TOKEN in names(axis):
      token: int | str = 'a slice of one token, which one is not known'
      if start is not None and len(axis) == 1:
        token = start * axis[0].step
      outs = [dataclasses.replace(w, token=token) for w in outs]
  return outs


def _update_slice(eqn: Any, ins: list[Where]):
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
    if was != now and EXAMPLE in names(a) | names(b):
      return None
    axes.append(b if was == now else a)
  return [join([operand, Where(tuple(axes))], eqn.primitive.name)]


def _reverse(eqn: Any, ins: list[Where]):
  out = _cut(ins[0], eqn.params['dimensions'], True)
  return None if out is None else [out]


def _concatenate(eqn: Any, ins: list[Where]):
  at = eqn.params['dimension']
  parts = [_cut(w, [at], True) for w in ins]
  if None in parts:
    return None
  size = eqn.outvars[0].aval.shape[at]
  parted = [
    dataclasses.replace(
      w, axes=(*w.axes[:at], whole(size), *w.axes[at + 1 :]), token=None
    )
    for w in parts
    if w is not None
  ]
  return [join(parted, eqn.primitive.name)]


def _broadcast(eqn: Any, ins: list[Where]):
  axes = [whole(n) for n in eqn.params['shape']]
  for axis, at in zip(
    ins[0].axes, eqn.params['broadcast_dimensions'], strict=True
  ):
    if axis:
      axes[at] = axis
  return [dataclasses.replace(ins[0], axes=tuple(axes))]


def _transpose(eqn: Any, ins: list[Where]):
  axes = tuple(ins[0].axes[i] for i in eqn.params['permutation'])
  return [dataclasses.replace(ins[0], axes=axes)]


def _squeeze(eqn: Any, ins: list[Where]):
  out = _cut(ins[0], eqn.params['dimensions'], False)
  return None if out is None else [out]


def _reshape(eqn: Any, ins: list[Where]):
  (where, *_) = ins
  if eqn.params.get('dimensions') is not None:
    axes = tuple(where.axes[i] for i in eqn.params['dimensions'])
    where = dataclasses.replace(where, axes=axes)
  for attempt in (where, where.without(TOKEN)):
    out = regrouped(attempt.pieces, eqn.params['new_sizes'])
    if out is not None:
      return [dataclasses.replace(attempt, axes=out)]
  return None


def _dot(eqn: Any, ins: list[Where]):
  (contract, batch) = eqn.params['dimension_numbers']
  for where, axes in zip(ins, contract, strict=True):
    if any(EXAMPLE in names(where.axes[i]) for i in axes):
      return None
  shared = [
    join([Where((ins[0].axes[i],)), Where((ins[1].axes[j],))], 'dot')
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


def _ragged_dot(eqn: Any, ins: list[Where]):
  """Rows keep their place; how many each kernel has may differ along axes
  outside of the ragged one, and along the same examples."""
  numbers = eqn.params['ragged_dot_dimension_numbers']
  if not numbers.rhs_group_dimensions:
    return None
  (contract, _), (batch, _) = numbers.dot_dimension_numbers
  x, kernel, sizes = ins
  (at,) = numbers.lhs_ragged_dimensions
  if kernel.has(EXAMPLE) or EXAMPLE in names(sizes.axes[-1]):
    return None
  if any(EXAMPLE in names(x.axes[i]) for i in contract):
    return None
  kept = [i for i in range(len(x.axes)) if i not in (*contract, *batch)]
  rows = [*batch, *kept]
  axes = [x.axes[i] for i in rows]
  outer = [*batch, *kept[: kept.index(at)]]
  if len(sizes.axes) > 1:
    prefix = tuple(axes[: len(outer)])
    both = join([Where(prefix), Where(sizes.axes[:-1])], eqn.primitive.name)
    if both.mixed:
      return None
    axes[: len(outer)] = both.axes
  rest = eqn.outvars[0].aval.shape[len(rows) :]
  return [Where((*axes, *map(whole, rest)))]


def _conv(eqn: Any, ins: list[Where]):
  numbers = eqn.params['dimension_numbers']
  x, kernel = ins
  batch, feature, *space = numbers.lhs_spec
  o_batch, _, *o_space = numbers.out_spec
  if kernel.has(EXAMPLE) or eqn.params['batch_group_count'] != 1:
    return None
  if any(EXAMPLE in names(x.axes[i]) for i in (feature, *space)):
    return None
  shape = eqn.outvars[0].aval.shape
  axes = [whole(n) for n in shape]
  axes[o_batch] = x.axes[batch]
  strides = eqn.params['window_strides']
  for i, o, stride in zip(space, o_space, strides, strict=True):
    if stride == 1 and shape[o] == eqn.invars[0].aval.shape[i]:
      axes[o] = x.axes[i]
  return [Where(tuple(axes), token=x.token)]


def _window(eqn: Any, ins: list[Where]):
  sizes = eqn.params['window_dimensions']
  mixes = [i for i, n in enumerate(sizes) if n > 1]
  out = _cut(ins[0], mixes, True)
  return None if out is None else _resized(eqn, [out])


def _unstack(eqn: Any, ins: list[Where]):
  at = eqn.params['axis']
  out = _cut(ins[0], [at], False)
  if out is None or TOKEN not in names(ins[0].axes[at]):
    return None if out is None else [out] * len(eqn.outvars)
  return [dataclasses.replace(out, token=i) for i in range(len(eqn.outvars))]


def _gather(eqn: Any, ins: list[Where]):
  """A lookup: what it reads is where its indices are, whole slices aside."""
  operand, indices = ins
  d = eqn.params['dimension_numbers']
  sizes = eqn.params['slice_sizes']
  shape = eqn.outvars[0].aval.shape
  batching = dict(
    zip(d.start_indices_batching_dims, d.operand_batching_dims, strict=True)
  )
  axes = [whole(n) for n in shape]
  places = [i for i in range(len(shape)) if i not in d.offset_dims]
  for at, axis in enumerate(indices.axes[:-1]):
    axes[places[at]] = axis
    if at in batching:
      both = common([axis, operand.axes[batching[at]]])
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
    elif EXAMPLE in names(axis):
      return None
    elif TOKEN in names(axis) and not indices.has(EXAMPLE):
      token = 'a lookup of tokens by position'
  return [Where(tuple(axes), token=token)]


def _scatter(eqn: Any, ins: list[Where]):
  """Updates of whole slices, at places that do not depend on the batch."""
  operand, indices, updates = ins
  d = eqn.params['dimension_numbers']
  if indices.has(EXAMPLE):
    return None
  gone = {*d.inserted_window_dims, *d.operand_batching_dims}
  kept = [i for i in range(len(operand.axes)) if i not in gone]
  axes = [whole(n) for n in eqn.invars[0].aval.shape]
  for i, u in zip(kept, d.update_window_dims, strict=True):
    sizes = eqn.invars[0].aval.shape[i], eqn.invars[2].aval.shape[u]
    if sizes[0] == sizes[1]:
      axes[i] = updates.axes[u]
    elif EXAMPLE in names(operand.axes[i]) | names(updates.axes[u]):
      return None
  others = set(range(len(updates.axes))) - {*d.update_window_dims}
  if any(EXAMPLE in names(operand.axes[i]) for i in gone) or any(
    EXAMPLE in names(updates.axes[u]) for u in others
  ):
    return None
  return [join([operand, Where(tuple(axes))], eqn.primitive.name)]


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
  'ragged_dot_general': _ragged_dot,
  'gather': _gather,
  **_each_of('scatter scatter-add scatter_add scatter_mul', _scatter),
}

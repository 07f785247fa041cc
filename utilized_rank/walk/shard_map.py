"""`shard_map`, rebuilt around what a walk does inside it.

Inside, a kernel that is spread over a mesh axis is a group of kernels, one per
device along that axis, each with its own moments. What a device emits is
summed over the other mesh axes along which the activations differ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import math
from typing import Any

import jax
from jax.sharding import PartitionSpec

from utilized_rank.tree.layout import View
from utilized_rank.walk import compat
from utilized_rank.walk.values import Emission
from utilized_rank.walk.values import Loop
from utilized_rank.walk.values import Param
from utilized_rank.walk.values import UnsupportedError

_Names = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class _Operand:
  arrays: Any
  specs: Any
  read: Callable[[Any], Any]


def shard_map(walk: Any, eqn: Any, operands: list[Any]) -> list[Any]:
  p = eqn.params
  mesh = p['mesh']
  jaxpr, consts = compat.open_jaxpr(p['jaxpr'])
  tokens: dict[_Names, Loop] = {}
  inputs = [
    _operand(walk, v, spec, mesh, tokens)
    for v, spec in zip(operands, p['in_specs'], strict=True)
  ]
  emitted: list[Emission] = []
  kept: list[list[_Names]] = []

  def body(*arrays):
    scope = walk.scope()
    outs = scope.run(
      jaxpr,
      consts,
      [o.read(a) for o, a in zip(inputs, arrays, strict=True)],
    )
    outs = [scope.materialise(v, 'shard_map output') for v in outs]
    emitted[:] = scope.tape.emissions.values()
    if emitted and not p['check_vma']:
      raise _unchecked(emitted[0].uses[0].path, jaxpr, p)
    kept[:] = [
      [n for n, token in tokens.items() if token in e.loops] for e in emitted
    ]
    return outs, [
      _gather(e.value, names, mesh)
      for e, names in zip(emitted, kept, strict=True)
    ]

  specs = tuple(o.specs for o in inputs)
  arrays = [o.arrays for o in inputs]

  def rebuilt(out_specs, fn):
    return jax.shard_map(
      fn,
      mesh=mesh,
      in_specs=specs,
      out_specs=out_specs,
      check_vma=p['check_vma'],
      axis_names=set(p['newly_manual_axes']),
    )

  outs_specs = list(p['out_specs'])
  # What is emitted, and over which mesh axes, is known once it was walked.
  jax.eval_shape(rebuilt(outs_specs, lambda *a: body(*a)[0]), *arrays)
  lead = [PartitionSpec(*reversed(names)) for names in kept]
  outs, values = rebuilt((outs_specs, lead), body)(*arrays)
  for emission, names, value in zip(emitted, kept, values, strict=True):
    for use in emission.uses:
      for name in names:
        use = walk.visitor.stacked(use, tokens[name], _size(mesh, name), True)
      walk.tape.emit(
        (tuple(tokens[n] for n in names), emission.key),
        lambda v=value: v,
        use,
        emission.loops - {tokens[n] for n in names},
      )
  return outs


def _unchecked(path: str, jaxpr: Any, p: dict[str, Any]) -> UnsupportedError:
  """The error for a product where axes are not checked: `pmap`, or not."""
  without = f"leave the parameter out with select=[('{path}', False), ...]"
  if _is_pmap(jaxpr, p):
    (name,) = p['mesh'].axis_names
    if not name.isidentifier() or name.startswith('_'):
      name = 'axis'  # it had none
    return UnsupportedError(
      f'parameter {path!r} meets a product inside jax.pmap: collect over the '
      f"function that it maps, with collect(..., pmap_axis='{name}') and "
      'parameters and batches that lead with an axis of devices; or '
      f'{without}'
    )
  return UnsupportedError(
    f'parameter {path!r} meets a product inside a shard_map with '
    'check_vma=False, where JAX does not say along which mesh axes the '
    f"product's input differs; use check_vma=True, or {without}"
  )


def _is_pmap(jaxpr: Any, p: dict[str, Any]) -> bool:
  """Whether it is what `jax.pmap` makes: on one axis, over the first axis of
  arrays, which every device takes off its own."""
  names = p['mesh'].axis_names
  specs = [tuple(spec) for spec in p['in_specs']]
  if len(names) != 1 or not set(specs) <= {names, ()}:
    return False
  spread = {v for v, spec in zip(jaxpr.invars, specs, strict=True) if spec}
  squeezed = {
    eqn.invars[0]
    for eqn in jaxpr.eqns
    if eqn.primitive.name == 'squeeze' and eqn.params['dimensions'] == (0,)
  }
  return bool(spread) and spread <= squeezed


def _operand(
  walk: Any, value: Any, spec: Any, mesh: Any, tokens: dict[_Names, Loop]
) -> _Operand:
  plain = lambda v: _Operand(v, spec, lambda a: a)
  if not isinstance(value, Param):
    return plain(walk.materialise(value, 'shard_map'))
  cut, parts = _spread(value.view, spec, mesh)
  if cut is None:
    return plain(walk.materialise(value, 'shard_map'))
  moved = value.payload.shard(cut, spec, parts)
  if moved is None:
    return plain(walk.materialise(value, 'shard_map'))
  inner = cut
  for axis, names in sorted(parts.items(), reverse=True):
    inner = inner.take(axis, tokens.setdefault(names, Loop('mesh axis')))
  arrays, specs, read = moved
  return _Operand(arrays, specs, lambda a: Param(inner, read(a)))


def _spread(
  view: View, spec: Sequence[Any], mesh: Any
) -> tuple[View | None, dict[int, _Names]]:
  """The view, axes that are spread over devices being cut into (devices, -1);
  and the mesh axes that each of the new axes is spread over."""
  sizes: list[int] = []
  parts: dict[int, _Names] = {}
  entries = [*spec] + [None] * (len(view.sizes) - len(spec))
  for size, entry in zip(view.sizes, entries, strict=True):
    names = (entry,) if isinstance(entry, str) else tuple(entry or ())
    if _size(mesh, names) > 1:
      parts[len(sizes)] = names
      sizes += [_size(mesh, names), size // _size(mesh, names)]
    else:
      sizes.append(size)
  return view.reshape(sizes), parts


def _size(mesh: Any, names: _Names) -> int:
  return math.prod(mesh.shape[n] for n in names)


def _gather(value: Any, names: Sequence[_Names], mesh: Any) -> Any:
  """Sums over mesh axes along which a value differs, but for `names`.

  Those get a leading axis each, the last outermost. Along other axes every
  device holds the same sums.
  """
  differs: set[str] = set()
  for leaf in jax.tree.leaves(value):
    differs |= compat.varying_axes(leaf)
  over = tuple(sorted(differs - {n for group in names for n in group}))

  def one(leaf):
    leaf = compat.vary(leaf, over)
    if over:
      leaf = jax.lax.psum(leaf, over)
    return leaf.reshape(*[1] * len(names), *leaf.shape)

  return jax.tree.map(one, value)

"""Finds hidden layers, whose units are each by itself, by the flow of data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import dataclasses
from typing import Any

from utilized_rank.hidden.flow import PLAIN
from utilized_rank.hidden.flow import Flow
from utilized_rank.hidden.flow import Found
from utilized_rank.hidden.flow import Made
from utilized_rank.hidden.flow import Value
from utilized_rank.hidden.layers import Hidden
from utilized_rank.hidden.layers import HiddenLayer
from utilized_rank.hidden.resizing import resizes
from utilized_rank.moments.capture import eval_shape
from utilized_rank.tree.layout import View
from utilized_rank.walk import compat
from utilized_rank.walk import tracing


def find_hidden(
  fn: Callable[..., Any], params: Any, *args: Any, **kwargs: Any
) -> Hidden:
  """Finds units between two kernels of which some could go, from shapes alone.

  A hidden layer is found by what the traced function does, never by names:
  outputs of a kernel (of two, where layers are gated) that meet nothing but
  functions of one number, leaves with one number a unit (biases, and a norm's
  scale, shift and running statistics), numbers that are the same for all
  units, layout, and sums along other axes (a mean over positions, say); all of
  them are then summed over by one second kernel. Where a unit meets others (a
  layer norm, a softmax), another value (a residual), or is used once more,
  there is none.

  Args:
    fn: `fn(params, *args, **kwargs)`.
    params: dense parameters, or their `ShapeDtypeStruct`s.
    *args: the other arguments (arrays or shapes).
    **kwargs: keyword arguments.

  Returns:
    The layers by the path of their first kernel, for `narrow_hidden`; `print`
    it to see, for every kernel, what it is or why it makes no hidden layer.

  >>> import jax, jax.numpy as jnp
  >>> def fn(p, x):
  ...   return jax.nn.gelu(x @ p['up'] + p['bias']) @ p['down']
  >>> params = {'up': jnp.ones((2, 8)), 'bias': jnp.ones(8)}
  >>> params['down'] = jnp.ones((8, 3))
  >>> print(find_hidden(fn, params, jnp.ones((4, 2))))
  kernel  shape  units  notes
  up        2×8      8  makes units for down; with bias; narrower
  down      8×3      8  reads those of up
  down                  - its output ends in the function's output
  1 hidden layers
  """
  found: list[Hidden] = []

  def shapes(params, args, kwargs):
    traced = tracing.trace(fn, params, args, kwargs)
    flow = Flow()
    values = [
      Value(view=View.of_leaf(path, leaf.shape, leaf.dtype))
      for path, leaf in traced.params.items()
    ]
    outs = flow.run(traced.jaxpr, [*values, *[PLAIN] * len(traced.args)])
    flow.end(outs, "ends in the function's output")
    found.append(_finish(flow.found, traced.params))
    return ()

  eval_shape(shapes, params, args, kwargs)
  known = resizes(fn, params, found[-1], args, kwargs)
  layers = {
    name: dataclasses.replace(layer, resizes=name in known)
    for name, layer in found[-1].items()
  }
  return Hidden(layers, found[-1].unseen)


def _finish(found: Found, params: dict[str, Any]) -> Hidden:
  layers: dict[str, HiddenLayer] = {}
  unseen = dict(found.plain)
  for numbers in _components(found):
    firsts = [found.made[i] for i in numbers]
    try:
      layer = _layer(found, numbers, params)
    except _NoLayer as why:
      for made in firsts:
        unseen.setdefault(made.kernel.path, str(why))
      continue
    layers[layer.name] = layer
  for path, others in found.other.items():
    if sum(size > 1 for size in params[path].shape) > 1:
      unseen.setdefault(path, f'is not used whole: {", ".join(others)}')
  mine = {k.path for layer in layers.values() for k in layer.firsts}
  return Hidden(layers, {p: why for p, why in unseen.items() if p not in mine})


class _NoLayer(Exception):
  """Units are no hidden layer; says why."""


def _components(found: Found) -> Iterator[list[int]]:
  """Numbers of products whose units meet, in order."""
  of = {i: {i} for i in range(len(found.made))}
  for met in found.met:
    together = set().union(*(of[i] for i in met))
    for i in together:
      of[i] = together
  seen: set[int] = set()
  for i, together in of.items():
    if i not in seen:
      seen |= together
      yield sorted(together)


def _layer(
  found: Found, numbers: list[int], params: dict[str, Any]
) -> HiddenLayer:
  mine = set(numbers)
  firsts = [found.made[i] for i in numbers]
  for i in numbers:
    if i in found.ends:
      raise _NoLayer(found.ends[i])
  readers = [made for units, made in found.read if units & mine]
  if len(readers) != 1:
    raise _NoLayer(
      f'{len(readers)} products read its output' if readers else 'is not read'
    )
  second = readers[0]
  for made in (*firsts, second):
    _check(found, made, second, params)
  vectors: dict[Any, None] = {}
  for vector, units in found.owned:
    if units & mine:
      vectors[vector] = None
  for vector in vectors:
    path = vector.at.path
    elsewhere = any(v.at.path == path and not u & mine for v, u in found.owned)
    if path in found.uses or path in found.other or elsewhere:
      raise _NoLayer(f'its vector {path!r} is used elsewhere too')
    if vector.loops != second.loops:
      raise _NoLayer(f'its vector {path!r} is of other loops than its kernels')
  return HiddenLayer(
    tuple(made.kernel for made in firsts),
    second.kernel,
    tuple(v.at for v in vectors),
  )


def _check(
  found: Found, made: Made, second: Made, params: dict[str, Any]
) -> None:
  path = made.kernel.path
  if found.uses[path] > 1:
    raise _NoLayer(f'{path!r} is the kernel of {found.uses[path]} products')
  if path in found.other:
    others = ', '.join(found.other[path])
    raise _NoLayer(f'{path!r} is also used otherwise: {others}')
  if made.loops != second.loops:
    raise _NoLayer(f'{path!r} is in another loop than the kernel that reads it')
  if not compat.is_floating(params[path].dtype):
    raise _NoLayer(f'{path!r} is {params[path].dtype}')
  if any(path == v.at.path for v, _ in found.owned):
    raise _NoLayer(f'{path!r} is a vector as well')

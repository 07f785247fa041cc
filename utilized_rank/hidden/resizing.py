"""Whether a function takes the width of a hidden layer from its leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from utilized_rank.hidden.layers import Hidden
from utilized_rank.hidden.layers import HiddenLayer
from utilized_rank.moments.capture import eval_shape
from utilized_rank.tree import paths
from utilized_rank.walk import compat
from utilized_rank.walk import tracing


def resizes(
  fn: Callable[..., Any],
  params: Any,
  hidden: Hidden,
  args: Any,
  kwargs: dict[str, Any],
) -> set[str]:
  """Names of the layers whose leaves the function takes as narrow as they come.

  It is traced with narrower shapes: the outputs must be of the same shapes,
  and the program the same, number by number, but for the shapes in it (one that
  divides by the square root of the width, say, would be another function).

  Args:
    fn: the function.
    params: dense parameters, or their shapes.
    hidden: its hidden layers.
    args: its other arguments.
    kwargs: its keyword arguments.
  """
  named, treedef = paths.flatten(params)
  shapes = {
    path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    if tracing.is_array(leaf)
    else leaf
    for path, leaf in named.items()
  }
  before = _program(fn, paths.unflatten(treedef, shapes), args, kwargs)

  def accepts(layers: Iterable[HiddenLayer]) -> bool:
    small = narrower(shapes, {layer: layer.width // 2 for layer in layers})
    try:
      after = _program(fn, paths.unflatten(treedef, small), args, kwargs)
    except Exception:  # each framework raises another
      return False
    return after == before

  wide = {name: v for name, v in hidden.items() if v.width > 1}
  if not wide or accepts(wide.values()):
    return set(wide)
  if len(wide) == 1:
    return set()
  return {name for name, layer in wide.items() if accepts([layer])}


def narrower(
  shapes: dict[str, Any], widths: dict[HiddenLayer, int]
) -> dict[str, Any]:
  """Shapes of the leaves with as many units as are given."""
  small = dict(shapes)
  for layer, width in widths.items():
    for at in (*layer.kernels, *layer.vectors):
      leaf = small[at.path]
      sizes = list(leaf.shape)
      sizes[at.axis] = width
      small[at.path] = jax.ShapeDtypeStruct(tuple(sizes), leaf.dtype)
  return small


def _program(
  fn: Callable[..., Any], params: Any, args: Any, kwargs: dict[str, Any]
) -> Any:
  """What a function computes, without the shapes of what is between."""
  traced: list[Any] = []

  def shapes(params, args, kwargs):
    found = tracing.trace(fn, params, args, kwargs)
    outs = [(a.aval.shape, a.aval.dtype) for a in found.jaxpr.outvars]
    consts = [_number(c) for c in found.consts]
    traced.append((found.out_tree, outs, consts, _equations(found.jaxpr)))
    return ()

  eval_shape(shapes, params, args, kwargs)
  return traced[-1]


def _equations(jaxpr: Any) -> list[Any]:
  out: list[Any] = []
  for eqn in jaxpr.eqns:
    numbers = [
      _number(a.val) for a in eqn.invars if isinstance(a, compat.Literal)
    ]
    inner = [_equations(j) for j in compat.sub_jaxprs(eqn)]
    out.append((eqn.primitive.name, numbers, inner))
  return out


def _number(value: Any) -> Any:
  """A constant that does not depend on shapes, unless it is one number."""
  if not isinstance(value, jax.core.Tracer) and np.size(value) == 1:
    return np.asarray(value).item()
  return None

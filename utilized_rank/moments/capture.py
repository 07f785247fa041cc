"""Runs a function and returns, beside its outputs, what its kernels read."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
from typing import Any

import jax

from utilized_rank.moments.collector import Collector
from utilized_rank.moments.counting import EVERY
from utilized_rank.moments.counting import Counting
from utilized_rank.moments.moments import Entry
from utilized_rank.moments.moments import Moments
from utilized_rank.moments.rows import Rows
from utilized_rank.moments.sides import INPUTS
from utilized_rank.moments.sides import Columns
from utilized_rank.moments.sides import Sides
from utilized_rank.moments.sites import Sites
from utilized_rank.moments.sites import no_arrays
from utilized_rank.tree import paths
from utilized_rank.tree.layout import View
from utilized_rank.walk import tracing
from utilized_rank.walk.interpret import Walk
from utilized_rank.walk.values import Dense
from utilized_rank.walk.values import Param


def capture(
  fn: Callable[..., Any],
  *,
  select: paths.Rules | None = None,
  on_opaque: str = 'error',
  from_outputs: paths.Rules | None = None,
  sketch: Columns | None = None,
) -> Callable[..., tuple[Any, Moments]]:
  """Makes `fn` return the moments of its kernels' inputs beside its outputs.

  A pure transform: use it inside your own `jit`, `pmap` or `shard_map`, and
  reduce the moments over devices with `jax.lax.psum`. Jit it, or what calls
  it: otherwise it re-reads the trace of `fn` at every call and holds on to the
  activations until it returns.

  Every row that a product reads counts, padding too: the empty slots of a
  mixture of experts add nothing to the sums and one each to `count`. Scales
  that are common to a kernel's moments do not change its spectrum.

  Args:
    fn: `fn(params, *args, **kwargs) -> outputs`, any JAX function. Forward
      functions only: a gradient inside contracts kernels over other axes.
      Python scalars and other leaves that are no arrays stay as they are.
    select: ordered `(regex, bool)` rules over leaf paths (full match, first
      match wins); default every leaf that is a kernel. Where two parameters
      are multiplied with each other, the selected one is the kernel.
    on_opaque: 'error', or 'report' to pass over parameters that enter a
      primitive which hides its computation (a Pallas or foreign call, a
      callback); `find_sites(...).holes` names them.
    from_outputs: ordered `(regex, bool)` rules over leaf paths: kernels that
      are measured from the output side, by T (m, m) in place of S (d, d),
      for inputs much wider than outputs. 'output' factors need no more;
      what needs S (k_S, the other methods) raises an error.
    sketch: ordered `(regex, columns)` rules over leaf paths: kernels of which
      the product of S with so many random vectors is summed, in place of S
      (d, d), for inputs that are very wide. Everything can be made of it, with
      a bound on what it does not see: `Moment.unseen`. Kernels whose S is no
      larger are measured whole.

  Returns:
    `captured(params, *args, **kwargs) -> (outputs, Moments)`.

  Raises (when called):
    ValueError: a selected leaf is no kernel, or is contracted in two ways, or
      `on_opaque` is neither of the two.
    UnsupportedError: a selected leaf enters a primitive that hides what it
      computes.
    TypeError: a kernel or what it multiplies is integer or complex.

  >>> fn = lambda params, x: jnp.tanh(x @ params['w'])
  >>> out, moments = capture(fn)({'w': jnp.eye(2)}, jnp.ones((5, 2)))
  >>> int(moments['w'].count), moments['w'].mean.tolist()
  (5, [1.0, 1.0])
  """

  def captured(params, *args, **kwargs):
    outputs, moments, _ = _capture(
      fn, params, args, kwargs, select, on_opaque, Sides(from_outputs, sketch)
    )
    return outputs, moments

  return captured


def find_sites(
  fn: Callable[..., Any],
  params: Any,
  *args: Any,
  select: paths.Rules | None = None,
  on_opaque: str = 'error',
  from_outputs: paths.Rules | None = None,
  sketch: Columns | None = None,
  **kwargs: Any,
) -> Sites:
  """Finds every kernel of a function, from shapes alone.

  Args:
    fn: `fn(params, *args, **kwargs)`.
    params: parameters, or their `ShapeDtypeStruct`s.
    *args: the other arguments (arrays or shapes).
    select: as in `capture`.
    on_opaque: as in `capture`.
    from_outputs: as in `capture`.
    sketch: as in `capture`.
    **kwargs: keyword arguments.

  Returns:
    A mapping from leaf path to `Site`; `print` it to see, for every leaf,
    what it is or why it is none.

  Raises:
    As `capture`.

  >>> fn = lambda params, x: x @ params['w'] + params['b']
  >>> params = {'w': jnp.zeros((4, 3)), 'b': jnp.zeros(3)}
  >>> print(find_sites(fn, params, jnp.zeros((2, 4))))
  leaf  shape  groups  matrix  input  notes
  b         3                         - bias of w
  w       4×3             4×3     #0  dot; bias b
  1 kernels of 2 leaves, 1 distinct inputs (one number, one value)
  kernels hold 80.0% of the 15 parameters
  """
  found = []

  def shapes(params, args, kwargs):
    outputs, moments, sites = _capture(
      fn, params, args, kwargs, select, on_opaque, Sides(from_outputs, sketch)
    )
    found.append(sites)
    return outputs, moments

  eval_shape(shapes, params, args, kwargs)
  return found[-1]


def eval_shape(fn, *args):
  """`jax.eval_shape` that leaves Python scalars and functions alone."""
  arrays, join = tracing.split(args)
  return jax.eval_shape(lambda arrays: fn(*join(arrays)), arrays)


def count(
  fn: Callable[..., Any],
  counting: Counting,
  params: Any,
  batch: Any,
  select: paths.Rules | None = None,
  on_opaque: str = 'error',
  sides: Sides = INPUTS,
) -> Moments:
  """The moments of `fn(params, batch)` over the rows that count.

  With parts, they are an axis of every sum, in front of the features.
  """
  rules = select, on_opaque, sides
  return _capture(fn, params, (batch,), {}, *rules, counting)[1]


def _capture(fn, params, args, kwargs, rules, on_opaque, sides, counting=EVERY):
  if on_opaque not in ('error', 'report'):
    raise ValueError(
      f"on_opaque must be 'error' or 'report', got {on_opaque!r}"
    )
  traced = tracing.trace(fn, params, args, kwargs)
  selected = None if rules is None else paths.select(traced.params, rules)
  rows = Rows(counting, traced)
  is_lenient = on_opaque == 'report'
  chosen = sides.among(traced.params)
  collector = Collector(traced.params, selected, is_lenient, rows, chosen)
  walk = Walk(collector, traced.rescaling)
  values = [
    Param(View.of_leaf(path, leaf.shape, leaf.dtype), Dense(leaf))
    for path, leaf in traced.params.items()
  ]
  outs = walk.run(traced.jaxpr, traced.consts, [*values, *traced.args])
  outs = [walk.materialise(v, 'output') for v in outs]
  outputs = jax.tree.unflatten(traced.out_tree, outs)
  sites, sums = collector.finish(list(walk.tape.emissions.values()))
  sites.others = no_arrays(params)
  table = tuple(
    Entry(**{f.name: getattr(s, f.name) for f in dataclasses.fields(Entry)})
    for s in sites.values()
  )
  return outputs, Moments(table, sums, coverage=sites.coverage), sites

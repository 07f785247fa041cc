"""Every contact with JAX internals, in one place.

What is used, and since when it looks like this:

* `jax.extend.core`: `Literal`, `jaxprs_in_params` (0.4.36 and later).
* `jax.extend.source_info_util`: `user_context`, `current_name_stack`.
* `jax.interpreters.partial_eval.dce_jaxpr`; it is not in `jax.extend`.
* `Primitive.get_bind_params` returns a plain dict (0.9.2 and later).
* `jax.make_jaxpr` and the parameters of `jit`, `scan`, `while`, `cond` hold a
  `ClosedJaxpr` up to 0.10 and a `Jaxpr` that carries its constants from 0.11;
  `remat2` and `shard_map` hold an open `Jaxpr` up to 0.10.
* `scan` has `num_consts` and `num_carry` up to 0.10, `ft_in` from 0.11.
* `JaxprEqn.ctx.manager` and `source_info`, to re-bind an equation where the
  user's code created it.
* `jax.core.eval_jaxpr`, public, takes either kind of jaxpr.
* `shard_map` names its axes `newly_manual_axes` (0.10.2 and later; in
  `sharded.py`); the axes along which a value varies are
  `aval.manual_axis_type.varying` (0.10.2 and later).
* `jax._src.config.trace_context`, the key of JAX's own caches (0.5 and later).
* `jax.lax.pcast` (0.10 and later); arrays are taken apart by `unstack` from
  0.11, by slices before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import contextlib
import functools
from typing import Any, ParamSpec, TypeVar

import jax
from jax._src import config
from jax.extend import source_info_util
import jax.extend.core as jex_core
from jax.interpreters import partial_eval
import jax.numpy as jnp
import numpy as np

Literal = jex_core.Literal
_P = ParamSpec('_P')
_R = TypeVar('_R')

# Primitives that run a sub-computation once, in place.
CALLS = {
  'jit': 'jaxpr',
  'closed_call': 'call_jaxpr',
  'core_call': 'call_jaxpr',
  'custom_jvp_call': 'call_jaxpr',
  'custom_vjp_call': 'call_jaxpr',
}
# Primitives that change what a type says of mesh axes, not the value.
VARY = ('pvary', 'pcast')
REMAT = ('remat2', 'checkpoint')
# Primitives that hide what they compute and own no sub-computation to enter.
OPAQUE = (
  'pallas_call',
  'ffi_call',
  'custom_call',
  'pure_callback',
  'io_callback',
  'call_hi_primitive',
  'custom_partitioning',
  'mosaic_gpu',
  'tpu_custom_call',
  'triton_kernel_call',
)


def open_jaxpr(jaxpr: Any) -> tuple[Any, list[Any]]:
  """Splits any flavour of jaxpr into equations and constants."""
  return getattr(jaxpr, 'jaxpr', jaxpr), list(getattr(jaxpr, 'consts', ()))


def trace(
  fn: Callable[..., Any], args: Sequence[Any]
) -> tuple[Any, list[Any], Any]:
  """Traces `fn(*args)` and drops what its outputs do not need.

  Args:
    fn: function of pytrees of arrays.
    args: arrays, tracers or `ShapeDtypeStruct`s.

  Returns:
    An open jaxpr, the values of its constants, and the pytree of the
    outputs' shapes.
  """
  closed, out_shape = jax.make_jaxpr(fn, return_shape=True)(*args)
  jaxpr, consts = open_jaxpr(closed)
  jaxpr, _ = partial_eval.dce_jaxpr(
    jaxpr, [True] * len(jaxpr.outvars), instantiate=True
  )
  return jaxpr, consts, out_shape


def type_of(array: Any) -> Any:
  """What a trace knows of an array, a tracer or a shape."""
  if isinstance(array, jax.ShapeDtypeStruct):
    return array.shape, array.dtype, array.sharding, array.weak_type
  return jax.typeof(array)


def trace_context() -> Any:
  """What a trace depends on beside its arguments: meshes, axes, settings."""
  return config.trace_context()


def sub_jaxprs(eqn: Any) -> list[Any]:
  """The sub-computations that an equation owns."""
  return list(jex_core.jaxprs_in_params(eqn.params))


def meshes_of(jaxpr: Any) -> list[Any]:
  """Meshes of devices that an open jaxpr's equations name, without repeats."""
  found: dict[Any, None] = {}
  for eqn in jaxpr.eqns:
    for value in eqn.params.values():
      for item in value if isinstance(value, tuple) else (value,):
        mesh = getattr(item, 'mesh', item)
        if isinstance(mesh, jax.sharding.Mesh) and not mesh.empty:
          found[mesh] = None
    for sub in sub_jaxprs(eqn):
      found.update(dict.fromkeys(meshes_of(open_jaxpr(sub)[0])))
  return list(found)


def bind(eqn: Any, args: Sequence[Any]) -> list[Any]:
  """Repeats an equation on new operands, as its author wrote it."""
  params = eqn.primitive.get_bind_params(eqn.params)
  out = eqn.primitive.bind(*args, **params)
  return list(out) if eqn.primitive.multiple_results else [out]


@contextlib.contextmanager
def context_of(eqn: Any):
  """Puts an equation's settings and source position in force."""
  info = eqn.source_info
  stack = source_info_util.current_name_stack() + info.name_stack
  with (
    source_info_util.user_context(info.traceback, name_stack=stack),
    eqn.ctx.manager,
  ):
    yield


def scan_split(params: dict[str, Any]) -> tuple[int, int]:
  """How many operands of a `scan` are constants, and how many are carried."""
  if 'num_consts' in params:
    return params['num_consts'], params['num_carry']
  consts, carry, _ = params['ft_in'].unpack()
  return len(consts), len(carry)


def count_uses(jaxpr: Any) -> dict[Any, int]:
  """How often each variable of an open jaxpr is read."""
  uses: dict[Any, int] = {}
  for atoms in [*(eqn.invars for eqn in jaxpr.eqns), jaxpr.outvars]:
    for atom in atoms:
      if not isinstance(atom, Literal):
        uses[atom] = uses.get(atom, 0) + 1
  return uses


def params_key(eqn: Any) -> Any:
  """An equation's parameters as something to compare and to hash."""
  key = tuple(sorted(eqn.params.items()))
  try:
    hash(key)
  except TypeError:
    return str(key)
  return key


def is_floating(dtype: Any) -> bool:
  return jnp.issubdtype(dtype, jnp.floating)


def is_integer(dtype: Any) -> bool:
  return jnp.issubdtype(dtype, jnp.integer)


def is_complex(dtype: Any) -> bool:
  return jnp.issubdtype(dtype, jnp.complexfloating)


def is_key(dtype: Any) -> bool:
  """Random keys: numpy does not have them."""
  return jnp.issubdtype(dtype, jax.dtypes.prng_key)


def is_known(dtype: Any) -> bool:
  """Whether JAX has such arrays: not of objects, texts, times or records."""
  if not isinstance(dtype, np.dtype):  # of random keys
    return True
  return dtype.kind not in 'OSUMm' and dtype.type is not np.void


def moves_data(fn: Callable[_P, _R]) -> Callable[_P, _R]:
  """Lets a function that works on the host move data under a transfer guard.

  A guard is to find moves that nobody meant; these are what `fn` is for.
  """

  @functools.wraps(fn)
  def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> _R:
    with jax.transfer_guard('allow'):
      return fn(*args, **kwargs)

  return wrapped


def surely(holds: Callable[[], Any]) -> bool:
  """Whether a comparison of sizes holds, whatever symbolic ones stand for."""
  try:
    return bool(holds())
  except jax.errors.InconclusiveDimensionOperation:
    return False


def stage(fn: Callable[..., Any], *args: Any) -> tuple[Callable[..., Any], Any]:
  """Traces `fn` once, so that it can be run again without its Python code.

  Args:
    fn: function of pytrees of arrays; it may close over tracers.
    *args: arrays, tracers or shapes.

  Returns:
    The function, of the same pytrees, and the pytree of its outputs' types.
  """
  closed, shape = jax.make_jaxpr(fn, return_shape=True)(*args)
  jaxpr, consts = open_jaxpr(closed)
  treedef = jax.tree.structure(shape)

  def staged(*args):
    flat = jax.core.eval_jaxpr(jaxpr, consts, *jax.tree.leaves(args))
    return jax.tree.unflatten(treedef, flat)

  types = [atom.aval for atom in jaxpr.outvars]
  return staged, jax.tree.unflatten(treedef, types)


def varying_axes(value: Any) -> frozenset[str]:
  """Axes of a `shard_map` along which an array, or a type, may differ."""
  aval: Any = value
  if not isinstance(value, jax.core.AbstractValue):
    aval = jax.typeof(value)
  return frozenset(aval.manual_axis_type.varying)


def vary(array: Any, axes: Sequence[str]) -> Any:
  """The array, typed as one that differs along these axes as well."""
  more = tuple(a for a in axes if a not in varying_axes(array))
  return jax.lax.pcast(array, more, to='varying') if more else array


def zeros(types: Any) -> Any:
  """Zeros of a pytree of types, differing along the same mesh axes."""
  return jax.tree.map(
    lambda t: vary(jnp.zeros(t.shape, t.dtype), sorted(varying_axes(t))),
    types,
  )


def has_explicit_axes(array: Any) -> bool:
  """Whether the array's type says how it is sharded (`AxisType.Explicit`)."""
  sharding = getattr(jax.typeof(array), 'sharding', None)
  mesh = getattr(sharding, 'mesh', None)
  kinds = getattr(mesh, 'axis_types', None) or ()
  return any(k == jax.sharding.AxisType.Explicit for k in kinds)

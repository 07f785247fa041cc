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
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import contextlib
import inspect
from typing import Any

import jax
import jax.extend.core as jex_core
from jax.extend import source_info_util
from jax.interpreters import partial_eval

Literal = jex_core.Literal

# Primitives that run a sub-computation once, in place.
CALLS = {
    'jit': 'jaxpr',
    'closed_call': 'call_jaxpr',
    'core_call': 'call_jaxpr',
    'custom_jvp_call': 'call_jaxpr',
    'custom_vjp_call': 'call_jaxpr',
}
REMAT = ('remat2', 'checkpoint')
# Primitives that hide what they compute and own no sub-computation to enter.
OPAQUE = (
    'pallas_call', 'ffi_call', 'custom_call', 'pure_callback', 'io_callback',
    'debug_callback', 'call_hi_primitive', 'custom_partitioning',
    'mosaic_gpu', 'tpu_custom_call', 'triton_kernel_call',
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


def sub_jaxprs(eqn: Any) -> list[Any]:
  """The sub-computations that an equation owns."""
  return list(jex_core.jaxprs_in_params(eqn.params))


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

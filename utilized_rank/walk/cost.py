"""What a traced and what a compiled program costs."""

from __future__ import annotations

from collections.abc import Callable
import math
from typing import Any

from utilized_rank.walk import compat
from utilized_rank.walk import tracing


def forward_flops(fn: Callable[..., Any], params: Any, *args: Any) -> int:
  """Multiplications and additions of matrix products and convolutions.

  A scan counts as often as it runs, a `while_loop` once, a branch as its most
  expensive one. Rows of a `ragged_dot` count once each, whichever kernel they
  meet. Everything else (norms, activations) is left out.

  >>> import jax.numpy as jnp
  >>> forward_flops(lambda w, x: x @ w, jnp.zeros((4, 3)), jnp.zeros((5, 4)))
  120
  """
  return _count(tracing.trace(fn, params, args, {}).jaxpr)


def _count(jaxpr: Any) -> int:
  total = 0
  for eqn in jaxpr.eqns:
    out = eqn.outvars[0].aval.shape if eqn.outvars else ()
    if eqn.primitive.name == 'dot_general':
      (contracted, _), _ = eqn.params['dimension_numbers']
      shape = eqn.invars[0].aval.shape
      total += 2 * math.prod(out) * math.prod(shape[i] for i in contracted)
    elif eqn.primitive.name == 'ragged_dot_general':
      numbers = eqn.params['ragged_dot_dimension_numbers']
      (contracted, _), _ = numbers.dot_dimension_numbers
      shape = eqn.invars[0].aval.shape
      flops = 2 * math.prod(out) * math.prod(shape[i] for i in contracted)
      if set(numbers.lhs_ragged_dimensions) <= set(contracted):
        flops //= eqn.invars[2].aval.shape[
          -1
        ]  # each row is contracted for the one group it is of
      total += flops
    elif eqn.primitive.name == 'conv_general_dilated':
      kernel = eqn.invars[1].aval.shape
      outputs = kernel[eqn.params['dimension_numbers'].rhs_spec[0]]
      total += 2 * math.prod(out) * math.prod(kernel) // outputs
    inside = [_count(compat.open_jaxpr(j)[0]) for j in compat.sub_jaxprs(eqn)]
    if eqn.primitive.name == 'cond':
      total += max(inside)
    else:
      total += eqn.params.get('length', 1) * sum(inside) if inside else 0
  return total


def peak_bytes(compiled: Any) -> int:
  """What it takes on one device: arguments, outputs and temporaries."""
  memory = compiled.memory_analysis()
  return (
    memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    + memory.temp_size_in_bytes
    - memory.alias_size_in_bytes
  )


def arguments_bytes(compiled: Any) -> int:
  """What the arguments that it uses take on one device."""
  return compiled.memory_analysis().argument_size_in_bytes

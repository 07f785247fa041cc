"""Functions with a derivative rule of their own, the rule kept."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from utilized_rank.walk import compat
from utilized_rank.walk.values import split


def keep_rule(
  walk: Any, eqn: Any, jaxpr: Any, consts: Sequence[Any], operands: list[Any]
) -> list[Any]:
  """A `custom_vjp` call whose forward is the walk's, its rule its author's.

  Going backwards the call runs as it was written, on kernels multiplied out,
  and what the rule says of a kernel goes on to what stands for it. A tap at a
  product inside, of which no rule knows, gets the cotangent that the forward
  code has there.
  """
  arrays, rebuild = split(operands)
  # A rule may index what is an array of numpy's in the trace by a tracer.
  arrays = jax.tree.map(jnp.asarray, arrays)
  name = eqn.primitive.name
  closed = eqn.params.get('num_consts', 0)  # values that have no cotangents

  def walked(arrays, consts):
    scope = walk.scope()
    outs = scope.run(jaxpr, consts, rebuild(arrays))
    return [scope.materialise(v, name) for v in outs]

  def written(arrays):
    values = rebuild(arrays)
    return compat.bind(
      eqn,
      [
        v.payload.materialise(v.view) if hasattr(v, 'payload') else v
        for v in values
      ],
    )

  @jax.custom_vjp
  def ruled(arrays, consts):
    return walked(arrays, consts)

  def forward(arrays, consts):
    return walked(arrays, consts), (arrays, consts)

  def backward(kept, cotangents):
    arrays, consts = kept
    fixed, free = arrays[:closed], arrays[closed:]
    (found,) = jax.vjp(lambda a: written([*fixed, *a]), free)[1](cotangents)
    found = [None] * closed + found
    if any(hasattr(a, 'tap') for a in arrays):
      _, back = jax.vjp(lambda a: walked(a, consts), arrays)
      (inside,) = back(cotangents)
      found = [
        dataclasses.replace(a, tap=b.tap) if hasattr(a, 'tap') else a
        for a, b in zip(found, inside, strict=True)
      ]
    return found, None

  ruled.defvjp(forward, backward)
  return ruled(arrays, list(consts))

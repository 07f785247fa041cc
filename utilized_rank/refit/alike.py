"""One compiled program for all steps that are the same computation.

The layers of a network differ in their parameters' names, and compute the same:
what their steps are lowered to is the same text, which is compiled once.
"""

from __future__ import annotations

from collections.abc import Callable
import hashlib
from typing import Any

import jax

from utilized_rank.walk import compat

# From a digest of what is lowered to what was compiled of it.
Compiled = dict[Any, Any]


def compiled(
  step: Callable[..., Any], args: Any, known: Compiled
) -> Callable[..., Any]:
  """A step, compiled for arguments like these.

  Args:
    step: a function of pytrees of arrays, in which equal computations have
      their arguments in one order.
    args: its arguments; what its outputs do not need is no part of the program.
    known: what was compiled before, and from now on this too.

  Returns:
    `run(*args)`, of arguments of the same shapes, dtypes and places.

  >>> known: Compiled = {}
  >>> steps = [lambda x, y, i=i: 2 * (x, y)[i] for i in (0, 1)]
  >>> runs = [compiled(s, (jnp.ones(2), jnp.zeros(2)), known) for s in steps]
  >>> [run(jnp.ones(2), jnp.zeros(2)).tolist() for run in runs], len(known)
  ([[2.0, 2.0], [0.0, 0.0]], 1)
  """
  leaves, treedef = jax.tree.flatten(args)
  flat = lambda *leaves: step(*jax.tree.unflatten(treedef, leaves))
  jaxpr, consts, out_shape = compat.trace(flat, leaves)
  read = {
    v
    for atoms in (*(eqn.invars for eqn in jaxpr.eqns), jaxpr.outvars)
    for v in atoms
    if not isinstance(v, compat.Literal)
  }
  used = [i for i, v in enumerate(jaxpr.invars) if v in read]
  out_tree = jax.tree.structure(out_shape)

  def program(own):
    given = [None] * len(leaves)
    for i, value in zip(used, own, strict=True):
      given[i] = value
    return jax.core.eval_jaxpr(jaxpr, consts, *given)

  own = [leaves[i] for i in used]
  lowered = jax.jit(program).lower(own)
  places = tuple(str(getattr(v, 'sharding', None)) for v in own)
  key = hashlib.sha256(lowered.as_text().encode()).digest(), places
  if key not in known:
    known[key] = lowered.compile()
  run = known[key]

  def call(*args):
    leaves = jax.tree.leaves(args)
    outs = run([leaves[i] for i in used])
    return jax.tree.unflatten(out_tree, outs)

  return call

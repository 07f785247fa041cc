"""Functions of batches together with their masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from utilized_rank import tracing
from utilized_rank.rows import Counting
from utilized_rank.rows import Rows

# A batch and its mask, (B,) or (B, T), as `masks.Masked` gives them.
Pair = tuple[Any, Any]


def hidden(fn: Callable[[Any, Any], Any]) -> Callable[[Any, Pair], Any]:
  """`fn` with zeros in place of what its outputs say of padding.

  Whatever compares such outputs, or is a loss of them, leaves padding out.

  Args:
    fn: `fn(params, batch) -> outputs`.

  Returns:
    `masked(params, (batch, mask)) -> outputs`.

  >>> fn = lambda params, x: x @ params['w']
  >>> batch, mask = jnp.ones((2, 3, 1)), jnp.array([[1, 1, 0], [1, 0, 0]]) > 0
  >>> hidden(fn)({'w': jnp.eye(1)}, (batch, mask))[..., 0].tolist()
  [[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]]
  """

  def masked(params: Any, pair: Pair) -> Any:
    batch, mask = pair
    traced = tracing.trace(fn, params, (batch,), {})
    outs = jax.core.eval_jaxpr(
      traced.jaxpr, traced.consts, *traced.params.values(), *traced.args
    )
    outs = Rows(Counting(mask), traced).real(traced.jaxpr.outvars, outs)
    return jax.tree.unflatten(traced.out_tree, outs)

  return masked


def of_batch(of: Callable[..., Any]) -> Callable[..., Any]:
  """A loss or divergence, whose last argument is the batch, of pairs."""
  return lambda *args: of(*args[:-1], args[-1][0])


def mask_of(pair: Pair) -> Any:
  """The mask of a pair."""
  return pair[1]

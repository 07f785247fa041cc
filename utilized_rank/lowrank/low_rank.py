"""Functions that run on trees with `LowRank` leaves."""

from __future__ import annotations

from collections.abc import Callable
import functools
from typing import Any

import jax

from utilized_rank.host.warning import warn
from utilized_rank.lowrank.leaf import is_low_rank
from utilized_rank.lowrank.leaf import with_left
from utilized_rank.lowrank.restored import explained
from utilized_rank.products import describe
from utilized_rank.products.factored import Factored
from utilized_rank.tree.layout import View
from utilized_rank.walk import compat
from utilized_rank.walk import tracing
from utilized_rank.walk.interpret import Walk
from utilized_rank.walk.rescaling import RESCALES
from utilized_rank.walk.values import Loop
from utilized_rank.walk.values import Output
from utilized_rank.walk.values import Param


def low_rank(fn: Callable[..., Any]) -> Callable[..., Any]:
  """Makes `fn` run on a tree with `LowRank` leaves, never multiplying out.

  At every product of an activation x with such a kernel, x W becomes
  (x A) B (+ c); a convolution becomes one with r outputs and a 1x1. Where
  kernels share A, x A is computed once. An identity block is multiplied with
  where that takes less time than to put outputs in order: where rows are many
  and the rank is low (`gauge.pays_written_out`; on meshes of explicit axes
  such a block is an error). Works under and over `jit`, `grad`, `vmap`, `remat`
  and `scan`. A leaf that meets anything but a product (an embedding's lookup,
  say) is multiplied out there, and a warning says so once per place.

  Args:
    fn: `fn(params, *args, **kwargs)`, the dense model's own function.

  Returns:
    A function of the same signature. It re-reads the model's trace at every
    call: jit it, or what calls it.

  >>> from utilized_rank.tree.layout import Layout
  >>> from utilized_rank.lowrank.leaf import LowRank
  >>> layout = Layout.of((4, 3), inputs=(0,), outputs=(1,))
  >>> w = LowRank(jnp.ones((4, 1)), jnp.ones((1, 3)), None, layout)
  >>> low_rank(lambda params, x: x @ params['w'])({'w': w}, jnp.ones((2, 4)))
  Array([[4., 4., 4.],
         [4., 4., 4.]], dtype=float32)
  """

  @functools.wraps(fn)
  def factored(params, *args, **kwargs):
    with explained(params):
      traced = tracing.trace(fn, params, args, kwargs, is_low_rank, _shape_of)
    params = with_left(traced.params)
    values = [
      Param(
        View.of_leaf(p, leaf.shape, leaf.dtype, leaf.layout.atoms),
        leaf.payload(),
      )
      if is_low_rank(leaf)
      else leaf
      for p, leaf in params.items()
    ]
    lefts = {
      p: leaf.left
      for p, leaf in params.items()
      if is_low_rank(leaf) and leaf.left is not None
    }
    lefts |= {p: p for p in lefts.values()}
    walk = Walk(_Substitution(lefts), traced.rescaling)
    outs = walk.run(traced.jaxpr, traced.consts, [*values, *traced.args])
    return jax.tree.unflatten(
      traced.out_tree, [walk.materialise(v, 'output') for v in outs]
    )

  return factored


def _shape_of(leaf: Any) -> Any:
  if not is_low_rank(leaf):
    return leaf
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _token(by: Any) -> Any:
  """What took an atom, without the traced value of an index."""
  return by[0] if isinstance(by, tuple) else by


class _Substitution:
  """Visitor that runs products with factors.

  `lefts` maps the paths of kernels that share an A to the one that holds it.
  """

  is_differentiated = True  # rules of `custom_vjp` are kept

  def __init__(self, lefts: dict[str, str]):
    self._lefts = lefts

  def wants(self, view: View) -> bool:
    return True

  def opaque(self, view: View, primitive: str) -> None:
    pass  # it gets the dense kernel, and `dropped` says so

  def dropped(self, view: View, reason: str) -> None:
    if reason == RESCALES:
      return  # of A B, without c: as many rows as there are vectors
    warn(
      f'{view.path!r} is low-rank but meets {reason!r}, which is no product '
      'with an activation: it is multiplied out there'
    )

  def product(self, eqn, operands, which, walk):
    param = operands[which]
    found = describe.describe(eqn, param.view, which)
    payload = param.payload
    if isinstance(found, str):
      reason = found
    elif not isinstance(payload, Factored):  # it runs its products itself
      out = payload.multiply(eqn, which, found, operands[1 - which])
      if not isinstance(out, str):
        return out
      reason = out
    elif not describe.fits(payload.factors, found):
      reason = f'{eqn.primitive.name} over other axes than it was factored for'
    else:
      x, factors = operands[1 - which], payload.factors
      if compat.has_explicit_axes(x):
        factors = factors.plain()  # no lookup among x's outputs
      left = self._lefts.get(param.view.path)
      others = operands[2:]
      if left is None or factors.scaled:
        return found.factored(x, factors, lambda make: make(), *others)
      key = (
        left,
        tuple(_token(by) for a, by in sorted(param.view.taken)),
        walk.origin(x),
        found.key,
        param.view.dtype,
        which,
        compat.params_key(eqn),
        *map(walk.origin, others),
      )
      return found.factored(
        x, factors, lambda make: walk.once(key, make), *others
      )
    plain = list(operands)
    plain[which] = walk.materialise(param, reason)
    return compat.bind(eqn, plain)[0]

  def biased(self, output: Output, bias: Param) -> bool:
    raise AssertionError('no outputs are followed when factors run')

  def stacked(self, use: Any, loop: Loop, size: int, is_stacked: bool) -> Any:
    raise AssertionError('nothing is emitted when factors run')

"""Second moments of the loss's gradient at every kernel's output.

With `coupled` also those of its inputs and gradients weighed by each other.

An identity with a derivative rule of its own sits at the output of each
product. Going backwards it turns the cotangent g into the sum of g g^T over
rows and returns that as the gradient of a dummy argument, so that nothing is
stored beyond what the backward pass stores anyway, through scan and remat.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from utilized_rank.linalg import gram
from utilized_rank.moments.counting import EVERY
from utilized_rank.moments.counting import Counting
from utilized_rank.moments.moments import Coupled
from utilized_rank.moments.rows import Rows
from utilized_rank.products import describe
from utilized_rank.products.factored import Factored
from utilized_rank.products.factors import Factors
from utilized_rank.products.product import one_block
from utilized_rank.tree.layout import Layout
from utilized_rank.tree.layout import View
from utilized_rank.walk import tracing
from utilized_rank.walk.interpret import Walk
from utilized_rank.walk.values import Dense
from utilized_rank.walk.values import Output
from utilized_rank.walk.values import Param

LossFn = Callable[[Any, Any], jax.Array]


def gradient_sums(
  fn: Callable[[Any, Any], Any],
  loss: LossFn,
  layouts: dict[str, Layout],
  counting: Counting = EVERY,
  coupled: bool = False,
) -> Callable[[Any, Any], tuple[dict[str, gram.Panels], jax.Array, Any]]:
  """Makes a function that sums g g^T at every kernel's output.

  Args:
    fn: `fn(params, batch) -> outputs`; examples must not mix.
    loss: `loss(outputs, batch) -> (B,)`, one number of nats per example; it
      sees zeros in place of outputs that do not count.
    layouts: kernels by path, as `find_sites` or `capture` found them.
    counting: which examples and rows count; default all.
    coupled: add the sums of inputs and gradients of one row each.

  Returns:
    `sums(params, batch) -> (sums, examples, coupled)`: per path the sum over
    examples and rows of g g^T, float32 panels of (*groups, m, m), where g is
    the gradient of the example's loss with respect to the row of outputs; B;
    and per path `Coupled`, or None where that was not asked for.

  Raises (when called):
    ValueError: the loss is not one number per example, or there is no
      reverse derivative.
  """

  def sums(params, batch):
    examples = _examples(batch)
    traced = tracing.trace(fn, params, (batch,), {})
    rows = Rows(counting, traced)
    taps = {
      path: tuple(
        rows.zeros(y.group_shape, shape) for shape in _shapes(y, coupled)
      )
      for path, y in layouts.items()
    }

    def total(taps):
      outputs = _tapped(traced, layouts, taps, rows, coupled)
      losses = loss(outputs, batch)
      if losses.shape != (examples,):
        raise ValueError(
          f'loss(outputs, batch) must return one number per example, shape '
          f'({examples},), got {losses.shape}'
        )
      return jnp.sum(rows.losses(losses))

    found, examples = _gradient(total, taps), rows.examples(examples)
    if not coupled:
      return found, examples, None
    parts = {p: _parts(layouts[p], sums) for p, sums in found.items()}
    return (
      {path: grads for path, (grads, _) in parts.items()},
      examples,
      {path: together for path, (_, together) in parts.items()},
    )

  return sums


def _shapes(layout: Layout, coupled: bool) -> list[tuple[int, int]]:
  """Of all that is summed at one kernel's output, over its groups."""
  d, m = layout.matrix_shape
  grads = gram.panel_shapes(m)
  return grads + coupled * [(1, d), *gram.panel_shapes(d), *grads]


def _parts(
  layout: Layout, sums: tuple[Any, ...]
) -> tuple[gram.Panels, Coupled]:
  """What of the sums is what, as `_shapes` has them."""
  d, m = (len(gram.panel_shapes(size)) for size in layout.matrix_shape)
  grads, total, rest = sums[:m], sums[m], sums[m + 1 :]
  return grads, Coupled(total, rest[:d], rest[d:])


def _gradient(total: Callable[[Any], jax.Array], taps: Any) -> Any:
  try:
    return jax.grad(total)(taps)
  except Exception as error:
    jax.eval_shape(total, taps)  # fails as well unless it is the derivative
    raise ValueError(
      'loss= needs the reverse derivative of the function, which has none: '
      f'{first_line(error)}. Collect without a loss (compress: give '
      'divergence= in its place), or give the function a jax.custom_vjp rule'
    ) from error


def first_line(error: Exception) -> str:
  """What an error says first, or its type where it says nothing.

  >>> first_line(ValueError('\\none\\ntwo')), first_line(AssertionError())
  ('one', 'AssertionError')
  """
  said = str(error).strip().splitlines() or [type(error).__name__]
  return said[0].rstrip('.')


def _examples(batch: Any) -> int:
  return jax.tree.leaves(batch)[0].shape[0]


def _tapped(traced, layouts, taps, rows, coupled):
  values = []
  for path, leaf in traced.params.items():
    if path not in layouts:
      values.append(leaf)
      continue
    layout = layouts[path]
    view = View.of_leaf(path, leaf.shape, leaf.dtype, layout.atoms)
    grouped = Factored(Factors(taps[path], None, None, layout, layout.groups))
    values.append(Param(view, _Tapped(Dense(leaf), grouped)))
  tapper = _Tapper(rows, coupled)
  walk = Walk(tapper, traced.rescaling)
  outs = walk.run(traced.jaxpr, traced.consts, [*values, *traced.args])
  # Of what no tap was put to, the gradients would be zeros without a word.
  unmet = sorted(set(layouts) - tapper.met)
  assert not unmet, f'no product of {unmet} was met where gradients are taken'
  outs = [walk.materialise(v, 'output') for v in outs]
  return jax.tree.unflatten(
    traced.out_tree, rows.real(traced.jaxpr.outvars, outs)
  )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Tapped:
  """A leaf, and the dummy whose gradient its products' outputs add to."""

  dense: Dense
  tap: Factored

  def relayout(self, eqn: Any, view: View) -> _Tapped:
    return _Tapped(self.dense.relayout(eqn, view), self.tap.relayout(eqn, view))

  def scaled(
    self, view: View, make: Callable[[Any], Any], factor: Any
  ) -> _Tapped | None:
    # What is multiplied is c x W; gradients with respect to x W are c g.
    tap = self.tap.scaled(view, make, jax.lax.stop_gradient(factor) ** 2)
    dense = self.dense.scaled(view, make, factor)
    return None if tap is None else _Tapped(dense, tap)

  def squeeze(self, axis: int) -> _Tapped:
    return _Tapped(self.dense.squeeze(axis), self.tap)

  def index(self, cut: View, axis: int, at: Any) -> _Tapped | None:
    tap = self.tap.index(cut, axis, at)
    return (
      None if tap is None else _Tapped(self.dense.index(cut, axis, at), tap)
    )

  def unstack(self, view: View):
    tapped = self.tap.unstack(view)
    if tapped is None:
      return None
    (array, read), (arrays, read_tap) = self.dense.unstack(view), tapped
    return (array, arrays), lambda x: _Tapped(read(x[0]), read_tap(x[1]))

  def shard(self, cut: View, spec: Any, parts: dict[int, Any]):
    tapped = self.tap.shard(cut, spec, parts)
    if tapped is None:
      return None
    array, array_spec, read = self.dense.shard(cut, spec, parts)
    arrays, specs, read_tap = tapped
    return (
      (array, arrays),
      (array_spec, specs),
      lambda x: _Tapped(read(x[0]), read_tap(x[1])),
    )

  def materialise(self, view: View) -> Any:
    return self.dense.materialise(view)


class _Tapper:
  """Visitor that puts a tap at the output of every product."""

  is_differentiated = True  # rules of `custom_vjp` are kept

  def __init__(self, rows: Rows, coupled: bool):
    self.rows = rows
    self.coupled = coupled
    self.met: set[str] = set()

  def wants(self, view: View) -> bool:
    del view
    return True

  def dropped(self, view: View, reason: str) -> None:
    """What capture has told already."""

  def opaque(self, view: View, primitive: str) -> None:
    """What capture has told already."""

  def product(self, eqn, operands, which, walk):
    del walk
    param = operands[which]
    out, found = describe.dense(eqn, operands, which)
    if isinstance(found, str):
      return out
    where, keep = self.rows.responses(found, eqn)
    tiles = None
    if operands[2:]:
      tiles = found.output_blocks(out.shape, *operands[2:])

    def panels(g, kept):
      keep, tiles, x = kept
      blocks = one_block if tiles is None else lambda shape: tiles
      present = len(found.present)
      sums = self.rows.sums(found.responses, g, where, keep, present, blocks)
      if x is None:
        return sums[1]
      blocks = found.blocks(x.shape) if tiles is None else tiles
      total, of_x, of_g = self.rows.coupled(found, x, g, keep, blocks)
      return *sums[1], total, *of_x, *of_g

    groups = found.layout.sizes(found.present)
    tap = param.payload.tap.factors
    dummy = jax.tree.map(
      lambda a: found.in_leaf_order(
        a.reshape(*groups, *a.shape[len(tap.present) :])
      ),
      tap.a,
    )
    x = operands[1 - which] if self.coupled else None
    self.met.add(param.view.path)
    return _tap(panels, out, dummy, (keep, tiles, x))

  def biased(self, output: Output, bias: Param) -> bool:
    raise AssertionError('no outputs are followed when taps are set')

  def stacked(self, use: Any, loop: Any, size: int, is_stacked: bool) -> Any:
    raise AssertionError('nothing is emitted when taps are set')


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tap(
  panels: Callable[[Any, Any], gram.Panels],
  out: jax.Array,
  dummy: gram.Panels,
  kept: Any,
):
  del panels, dummy, kept
  return out


def _tap_forward(panels, out, dummy, kept):
  del panels, dummy
  return out, kept


def _tap_backward(panels, kept, cotangent):
  second = panels(cotangent, kept)
  return cotangent, tuple(p.astype(jnp.float32) for p in second), None


_tap.defvjp(_tap_forward, _tap_backward)

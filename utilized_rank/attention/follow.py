"""Follows the outputs of kernels to where two kernels meet.

A kernel's output is followed through layout operations, its bias, casts and
factors that are one number for all features of a head (a scale, or one over the
sum of attention's weights), as long as nothing else reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from utilized_rank.attention import pairing
from utilized_rank.attention import repeats
from utilized_rank.moments.collector import is_bias
from utilized_rank.products import describe
from utilized_rank.tree.layout import View
from utilized_rank.walk import compat
from utilized_rank.walk.interpret import Walk
from utilized_rank.walk.interpret import moved
from utilized_rank.walk.rescaling import NOTHING
from utilized_rank.walk.rescaling import Rescaling
from utilized_rank.walk.values import Output
from utilized_rank.walk.values import Param


class Recorder:
  """Visitor that gives every kernel's output to be followed."""

  def __init__(self, paths: Sequence[str]):
    # path -> reasons, in order of appearance (dicts keep it).
    self.drops: dict[str, dict[str, None]] = {p: {} for p in paths}
    self.projections: list[pairing.Projection] = []
    self.candidates: list[pairing.Candidate] = []

  def wants(self, view: View) -> bool:
    del view
    return True

  def dropped(self, view: View, reason: str) -> None:
    self.drops[view.path][reason] = None

  def opaque(self, view: View, primitive: str) -> None:
    """`dropped` tells it as well."""

  def product(self, eqn, operands, which, walk):
    del walk
    view = operands[which].view
    out, product = describe.dense(eqn, operands, which)
    if not isinstance(product, str) and (view.flipped or view.scale != 1):
      product = 'a product of it read backwards, or scaled'
    if operands[2:]:
      product = f'{eqn.primitive.name}, in which rows meet different kernels'
    if isinstance(product, str):
      self.dropped(view, product)
      return out
    projection = pairing.Projection(product)
    self.projections.append(projection)
    return Output(product.output, out, projection)

  def biased(self, output: Output, bias: Param) -> bool:
    use = output.use
    if isinstance(use, pairing.Mixed) or use.bias is not None or use.scaled:
      return False
    view = repeats.as_rows(output.view, use.leaf)
    if view is None or not is_bias(use.product, view, bias.view):
      return False
    if bias.view.scale != 1:
      return False
    use.bias = bias.view.path
    return True

  def stacked(self, use: Any, loop: Any, size: int, is_stacked: bool) -> Any:
    raise AssertionError('nothing is emitted when outputs are followed')


def _stop(output: Output, reason: str) -> None:
  use, where = output.use, ''
  if isinstance(use, pairing.Mixed):
    use, where = use.projection, ', summed over rows,'
  if use.end is None:
    use.end = f'its output{where} {reason}'


def _moved(eqn: Any, output: Output) -> View | None:
  if isinstance(output.use, pairing.Mixed):
    return moved(eqn, output.view)
  return repeats.moved(eqn, output.view, output.use.leaf)


class Follower(Walk):
  """A walk that follows outputs; for shapes alone, it inlines every call."""

  visitor: Recorder

  def __init__(self, visitor: Recorder, rescaling: Rescaling = NOTHING):
    super().__init__(visitor, rescaling)
    # id of a value -> (axes along which it repeats itself, the value). The
    # value is kept so that its id stays its own.
    self._repeats: dict[int, tuple[set[int], Any]] = {}

  def shared(self, output: Output) -> Any:
    _stop(output, 'is used more than once')
    return output.value

  def materialise(self, value: Any, reason: str) -> Any:
    if isinstance(value, Output):
      _stop(value, f'ends in {reason}')
    return super().materialise(value, reason)

  def _plain(self, eqn: Any, operands: list[Any]) -> list[Any]:
    results = super()._plain(eqn, operands)
    if eqn.primitive.name == 'broadcast_in_dim':
      kept = zip(
        eqn.params['broadcast_dimensions'],
        eqn.invars[0].aval.shape,  # a literal's value has none
        strict=True,
      )
      sizes = eqn.params['shape']
      varies = {axis for axis, size in kept if size == sizes[axis]}
      repeats = set(range(len(sizes))) - varies
      self._repeats[id(results[0])] = (repeats, results[0])
    return results

  def _equation(self, eqn: Any, operands: list[Any]) -> list[Any]:
    name = eqn.primitive.name
    outputs = [v for v in operands if isinstance(v, Output)]
    params = [v for v in operands if isinstance(v, Param)]
    if name in compat.CALLS or name in compat.REMAT:
      inner = eqn.params[compat.CALLS.get(name, 'jaxpr')]
      jaxpr, consts = compat.open_jaxpr(inner)
      return self.run(jaxpr, consts, operands)
    if not outputs:
      return super()._equation(eqn, operands)
    plain = [v.value if isinstance(v, Output) else v for v in operands]
    if name == 'dot_general':
      return self._meet(eqn, operands, plain)
    (first, *others) = outputs
    view = None
    if len(operands) == 1:
      view = _moved(eqn, first)
      view = None if view is None or view.flipped else view
    elif not others and self._keeps(eqn, operands, first, params):
      view = first.view
      plain = [
        v.payload.materialise(v.view) if isinstance(v, Param) else v
        for v in plain
      ]
    if view is not None:
      (value,) = compat.bind(eqn, plain)
      return [Output(view, value, first.use)]
    for output in outputs:
      what = name
      if len(operands) == 1 and name == 'reshape':
        what = 'a reshape that mixes its features with rows'
      _stop(output, f'meets {what}')
    return super()._equation(eqn, plain)

  def _keeps(self, eqn, operands, output: Output, params) -> bool:
    """Whether a bias is added, or all features get one factor."""
    name = eqn.primitive.name
    if name in ('add', 'add_any') and params:
      return self.visitor.biased(output, params[0])
    if name != 'mul' and (name != 'div' or operands[0] is not output):
      return False
    ((atom, other),) = (
      (a, v) for a, v in zip(eqn.invars, operands) if v is not output
    )
    if eqn.outvars[0].aval.shape != output.view.sizes:
      return False
    if atom.aval.size != 1:
      repeats, _ = self._repeats.get(id(other), (set(), None))
      if not pairing.feature_axes(output) <= repeats:
        return False
    if isinstance(output.use, pairing.Projection):
      output.use.scaled = True
    return True

  def _meet(self, eqn: Any, operands: list[Any], plain: list[Any]) -> list[Any]:
    """A product of a followed output with anything."""
    one, two = operands
    try:
      if isinstance(one, Output) and isinstance(two, Output):
        self.visitor.candidates.append(pairing.logits(eqn, one, two))
        return compat.bind(eqn, plain)
      which = 0 if isinstance(one, Output) else 1
      output, other = operands[which], operands[1 - which]
      if not isinstance(other, Param):
        return pairing.summed(eqn, plain, output, which)
      if not isinstance(output.use, pairing.Mixed):
        raise pairing.NoPair(f'meets the kernel {other.view.path!r} at once')
      values = pairing.contracted(eqn, output, other, which)
    except pairing.NoPair as why:
      for value in operands:
        if isinstance(value, Output):
          _stop(value, str(why))
      return super()._equation(eqn, plain)
    results = super()._equation(eqn, plain)
    if isinstance(results[0], Output):
      self.visitor.candidates.append(values(results[0].use))
    return results

"""Products' outputs, followed through sums and numbers.

A constant at a product's output can be moved to any leaf that is added later:
addition is associative, so what else is in the sum (a residual stream, another
product) does not matter, nor does a number that all of it is multiplied with.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import math
from typing import Any

from utilized_rank.walk import compat
from utilized_rank.walk.scale import number
from utilized_rank.walk.values import Bias
from utilized_rank.walk.values import Output
from utilized_rank.walk.values import Param

_SUMS = {'add': 1.0, 'add_any': 1.0, 'sub': -1.0}


def followed(walk: Any, eqn: Any, operands: Sequence[Any]) -> list[Any] | None:
  """The results of an equation, an `Output` if it is a sum or a multiple.

  Leaves that are added are shown to the visitor, with every product that is in
  the sum; one that is no product's bias is noted as lost.

  Args:
    walk: the walk.
    eqn: the equation.
    operands: its operands, an `Output` among them.

  Returns:
    None where the outputs stop being followed.
  """
  name = eqn.primitive.name
  if name in _SUMS:
    return _sum(walk, eqn, operands, (1.0, _SUMS[name]))
  factor = _factor(name, operands)
  if factor is None:
    return None
  output, times = factor
  plain = [v.value if v is output else v for v in operands]
  (value,) = compat.bind(eqn, plain)
  terms = [_times(t, times) for t in output.terms]
  biases = [_times(b, times) for b in output.biases]
  return [_output(terms, value, biases)]


def _sum(
  walk: Any, eqn: Any, operands: Sequence[Any], signs: Sequence[float]
) -> list[Any] | None:
  shape = eqn.outvars[0].aval.shape
  terms: list[Output] = []
  biases: list[Bias] = []
  taken: set[int] = set()
  for i, (value, sign) in enumerate(zip(operands, signs, strict=True)):
    its_terms, its_biases = [], []
    if isinstance(value, Output):
      # One that is repeated along an axis is not laid out as its view says.
      its_terms = [
        _times(t, sign) for t in value.terms if t.view.sizes == shape
      ]
      its_biases = [_times(b, sign) for b in value.biases]
    elif isinstance(value, Param):
      its_biases = [Bias(value.view, value.payload, (object(), i), sign)]
    pairs = [(t, b) for t in terms for b in its_biases]
    pairs += [(t, b) for t in its_terms for b in biases]
    for term, bias in pairs:
      if walk.visitor.biased(term, bias):
        taken.add(id(bias.payload))
    terms += its_terms
    biases += its_biases
  plain = []
  for value in operands:
    if isinstance(value, Param) and id(value.payload) in taken:
      plain.append(value.payload.materialise(value.view))
      continue
    plain.append(walk.materialise(value, eqn.primitive.name))
    leaf = walk.multiples.get(id(value), (value, value))[0]
    if isinstance(leaf, Param) and terms:
      walk.visitor.dropped(leaf.view, f'as no bias of {terms[0].view.path}')
  (result,) = compat.bind(eqn, plain)
  return [_output(terms, result, biases) if terms else result]


def _factor(name: str, operands: Sequence[Any]) -> tuple[Output, float] | None:
  """An output, and the number that an equation multiplies it with."""
  if name == 'neg':
    return operands[0], -1.0
  if name not in ('mul', 'div'):
    return None
  one, two = operands
  if name == 'mul' and isinstance(two, Output):
    one, two = two, one
  times = number(two)
  if not isinstance(one, Output) or not times or not math.isfinite(times):
    return None
  return one, 1 / times if name == 'div' else times


def _times(value: Any, factor: float) -> Any:
  return dataclasses.replace(value, scale=factor * value.scale)


def _output(
  terms: Sequence[Output], value: Any, biases: Sequence[Bias]
) -> Output:
  bare = [
    dataclasses.replace(t, value=value, others=(), biases=()) for t in terms
  ]
  return dataclasses.replace(
    bare[0], others=tuple(bare[1:]), biases=tuple(biases)
  )

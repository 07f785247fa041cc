"""The products that a kernel takes part in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from utilized_rank.products import convolution
from utilized_rank.products import dot_general
from utilized_rank.products import ragged_dot
from utilized_rank.products.factors import Factors
from utilized_rank.products.product import Product
from utilized_rank.tree.layout import View
from utilized_rank.tree.layout import pieces_of
from utilized_rank.walk import compat

_SCALE = (
  'a scale, or one feature for each group: matrices of rank one, nothing to '
  'factor'
)
_NO_RANK = {
  'dot': _SCALE,
  'ragged_dot': _SCALE,
  'conv': 'a depthwise convolution: matrices of rank one, nothing to factor',
}


def describe(eqn: Any, view: View, which: int) -> Product | str:
  """Reads a product's equation; a string says why it is none.

  Args:
    eqn: a `dot_general`, `conv_general_dilated` or `ragged_dot_general`
      equation.
    view: the operand that is a parameter.
    which: its position among the operands.
  """
  if 0 in eqn.invars[which].aval.shape:
    return 'a product of nothing: it has an axis of size 0'
  of = convolution.convolution
  if eqn.primitive.name == 'dot_general':
    of = dot_general.dot
  elif eqn.primitive.name == 'ragged_dot_general':
    of = ragged_dot.ragged_dot
  product = of(eqn, view, which)
  if isinstance(product, str):
    return product
  if not product.view.scaled_along.issubset(product.layout.groups):
    return 'a multiplication with more than one number'
  if product.has_no_rank:
    return _NO_RANK[product.kind]
  return product


def dense(
  eqn: Any, operands: Sequence[Any], which: int
) -> tuple[Any, Product | str]:
  """A product's output by the kernel itself, and what `describe` says of it.

  Args:
    eqn: the product.
    operands: arrays, and in place of the kernel a `walk.values.Param`.
    which: the kernel's position.
  """
  kernel = operands[which]
  plain = list(operands)
  plain[which] = kernel.payload.materialise(kernel.view)
  (out,) = compat.bind(eqn, plain)
  return out, describe(eqn, kernel.view, which)


def fits(factors: Factors, product: Product) -> bool:
  """Whether the factors can stand for the kernel in this product."""
  if len(product.layout.atoms) < len(factors.layout.atoms):
    return False
  fine = factors.layout.refine(product.layout.atoms)
  pieces = pieces_of(factors.layout.atoms, product.layout.atoms)
  present = tuple(p for a in factors.present for p in pieces[a])
  if present != product.present:
    return False
  mine = (product.layout.inputs, product.layout.outputs)
  if (fine.inputs, fine.outputs) == mine:
    return True
  if (fine.outputs, fine.inputs) != mine or factors.c is not None:
    return False
  # An identity block stands among a convolution's outputs, not in its window.
  return factors.order is None or product.kind != 'conv'

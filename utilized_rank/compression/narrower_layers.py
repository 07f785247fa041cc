"""Narrower hidden layers, and pairs of factors within what they leave."""

from __future__ import annotations

from utilized_rank.attention.heads import Attention
from utilized_rank.compression.candidates import Beginning
from utilized_rank.compression.narrowed import narrow_first
from utilized_rank.compression.narrowed import narrowed
from utilized_rank.compression.problem import Problem

_NAME = 'narrower layers'
_BOTH = 'narrower layers and heads'
_FIRST = 'pairs of narrower layers'


def narrower_layers(problem: Problem, heads: bool = True) -> list[Beginning]:
  """Layers as narrow as one budget asks for; pairs at the other kernels.

  Where the function takes widths from its leaves, less narrow layers with
  pairs of their own kernels are tried too.

  Args:
    problem: the problem.
    heads: try it with narrower heads in the same budget as well.

  Returns:
    None of a kind where there is no share of parameters or no gradient
    (damages of layers and of pairs have the loss alone in common), and where
    no layer would be narrower.
  """
  layers = problem.hidden
  if not layers:
    return []
  found = narrowed(problem, _NAME, Attention({}, {}), layers)
  if heads and problem.attention:
    found += narrowed(problem, _BOTH, problem.attention, layers)
  return found + narrow_first(problem, _FIRST, layers)

"""Narrower hidden layers, and pairs of factors within what they leave."""

from __future__ import annotations

from utilized_rank.attention.heads import Attention
from utilized_rank.compression.candidates import Tried
from utilized_rank.compression.candidates import nearest
from utilized_rank.compression.narrowed import attention
from utilized_rank.compression.narrowed import hidden
from utilized_rank.compression.narrowed import narrow_first
from utilized_rank.compression.narrowed import narrowed
from utilized_rank.compression.problem import Problem

_NAME = 'narrower layers'
_BOTH = 'narrower layers and heads'
_FIRST = 'pairs of narrower layers'


def narrower_layers(problem: Problem, heads: bool = True) -> Tried | None:
  """Layers as narrow as one budget asks for; pairs at the other kernels.

  Where the function takes widths from its leaves, less narrow layers with
  pairs of their own kernels are tried too.

  Args:
    problem: the problem.
    heads: try it with narrower heads in the same budget as well.

  Returns:
    None where rows are few, where there is no share of parameters or no loss
    (damages of layers and of pairs have nats alone in common), and where no
    layer would be narrower.
  """
  layers = hidden(problem)
  if not layers:
    return None
  pairs = attention(problem) if heads else None
  tried = [narrowed(problem, _NAME, Attention({}, {}), layers)]
  if pairs:
    tried.append(narrowed(problem, _BOTH, pairs, layers))
  tried.append(narrow_first(problem, _FIRST, layers))
  found = [one for one in tried if one is not None]
  return nearest(found[0], found[1:], problem.journal) if found else None

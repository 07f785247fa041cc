"""Narrower attention heads, and pairs of factors within what they leave."""

from __future__ import annotations

from utilized_rank.compression.candidates import Beginning
from utilized_rank.compression.narrowed import narrowed
from utilized_rank.compression.problem import Problem
from utilized_rank.hidden.layers import Hidden

_NAME = 'narrower heads'


def narrower_heads(problem: Problem) -> list[Beginning]:
  """Heads as narrow as one budget asks for; pairs at the other kernels.

  Returns:
    None of a kind where there is no share of parameters or no gradient
    (damages of heads and of pairs have the loss alone in common), and where no
    head would be narrower.
  """
  return narrowed(problem, _NAME, problem.attention, Hidden({}, {}))

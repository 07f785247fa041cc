"""What ranks should cost, by second moments of gradients."""

from __future__ import annotations

from typing import Any

from utilized_rank.factorization import methods
from utilized_rank.factorization import shared_left
from utilized_rank.factorization.decompose import Families
from utilized_rank.factorization.decompose import known
from utilized_rank.factorization.shared_left import Ranks
from utilized_rank.factorization.shared_left import check_ranks
from utilized_rank.factorization.shared_left import per_member
from utilized_rank.moments.moments import Moments


def predict_loss(
  params: Any,
  moments: Moments,
  ranks: Ranks,
  *,
  method: str = 'loss',
  compensate_mean: bool = True,
  damping: float = methods.DAMPING,
  families: Families | None = None,
) -> float:
  """Predicted increase of the loss for a set of ranks, in nats per example.

  The sum over kernels of 1/2 tr(D^T S D G), times the rows of an example,
  with D = W - W': a quadratic approximation with a Kronecker-factored Fisher
  for each kernel, and no interaction between kernels.

  Args:
    params: dense parameters.
    moments: moments that were collected with a loss.
    ranks: path to rank.
    method: how the kernels are factorized.
    compensate_mean: as for `factorize`.
    damping: as for `factorize`.
    families: as for `budget_ranks`.
  """
  check_ranks(ranks, moments)
  families = known(
    families, params, moments, ranks, method, compensate_mean, damping, False
  )
  total = 0.0
  for key, given in ranks.items():
    names = shared_left.names_of(key)
    each = per_member(key, given, moments[names[0]].layout)
    for family, rank in zip(families[key], each, strict=True):
      total += methods.damages(names[0], family, 'loss')[rank]
  return float(total)

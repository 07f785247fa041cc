"""One budget for narrower attention heads and for pairs of factors."""

from __future__ import annotations

from typing import Any, NamedTuple

from utilized_rank.attention import heads
from utilized_rank.attention.factorize_heads import factorize_heads
from utilized_rank.attention.factorize_heads import head_damages
from utilized_rank.attention.factorize_heads import head_offers
from utilized_rank.factorization.decompose import decompose
from utilized_rank.lowrank import leaf
from utilized_rank.moments.moments import Moments
from utilized_rank.ranks import offers
from utilized_rank.tree import paths


class Narrowed(NamedTuple):
  """Parameters with narrower heads, and what is left to spend.

  Attributes:
    tree: with `NarrowHeads` leaves.
    ranks: of the narrowed kernels, by path.
    rest: moments of the kernels that are in no pair.
    rest_ranks: the ranks that the budget gives them.
    params_fraction: share of their parameters that the budget leaves.
  """

  tree: Any
  ranks: dict[str, int]
  rest: Moments
  rest_ranks: dict[Any, int]
  params_fraction: float


def narrow(
  params: Any,
  moments: Moments,
  pairs: heads.Attention,
  *,
  params_fraction: float,
  multiple_of: int,
  gauge: str | None,
  compensate_mean: bool,
) -> Narrowed | None:
  """Narrows heads as far as a joint budget asks for.

  Every pair of attention's kernels offers its ranks, every other kernel pairs
  of factors; damages of both are nats per example, and what is taken is the
  optimum (`offers.spend`).

  Args:
    params: dense parameters.
    moments: of the kernels, with gradients.
    pairs: as `find_attention` found them; those count whose kernels both have
      moments of their inputs.
    params_fraction: share of all kernels' parameters to keep.
    multiple_of: ranks are multiples of this.
    gauge: of the pairs of factors.
    compensate_mean: as for `factorize`.

  Returns:
    None where no head would be narrower.
  """
  found = heads.Attention(
    {
      name: pair
      for name, pair in pairs.items()
      if all(
        side.path in moments and moments[side.path].entry.side == 'input'
        for side in (pair.left, pair.right)
      )
    },
    pairs.unseen,
  )
  if not found:
    return None
  paired = {s.path for p in found.values() for s in (p.left, p.right)}
  rest = moments.only([path for path in moments if path not in paired])
  damages = head_damages(
    params, moments, found, compensate_mean=compensate_mean
  )
  families = decompose(
    params,
    rest,
    method='loss',
    compensate_mean=compensate_mean,
    keep_factors=False,
    progress=False,
  )
  terms = offers.Terms(
    rest, 'loss', gauge, False, None, compensate_mean, multiple_of, limits={}
  )
  of_heads = head_offers(found, damages, multiple_of)
  of_rest = [offers.offer(terms, path, families) for path in rest]
  whole = sum(terms.dense_cost(path) for path in rest)
  total = whole + sum(pair.cost * pair.width for pair in found.values())
  spent = offers.spend([*of_heads, *of_rest], int(params_fraction * total))
  ranks: dict[Any, int] = {}
  for taken, _ in spent[: len(of_heads)]:
    ranks |= taken
  if not ranks:
    return None
  rest_ranks: dict[Any, int] = {}
  for taken, _ in spent[len(of_heads) :]:
    rest_ranks |= taken
  left = sum(cost for _, cost in spent[len(of_heads) :])
  return Narrowed(
    factorize_heads(
      params,
      moments,
      found,
      ranks,
      method='loss',
      compensate_mean=compensate_mean,
    ),
    {
      side.path: rank
      for name, rank in ranks.items()
      for side in (found[name].left, found[name].right)
    },
    rest,
    rest_ranks,
    # Half a number more, so that rounding does not lose one.
    min(1.0, (left + 0.5) / whole) if whole else 1.0,
  )


def put_back(tree: Any, narrowed: Narrowed) -> Any:
  """A tree that `merge` padded, its narrow leaves narrow again."""
  named, treedef = paths.flatten(tree, leaf.is_low_rank)
  small, _ = paths.flatten(narrowed.tree, leaf.is_low_rank)
  named |= {path: small[path] for path in narrowed.ranks}
  return paths.unflatten(treedef, named)

"""One budget for narrower layers, narrower heads and pairs of factors."""

from __future__ import annotations

from typing import Any, NamedTuple

from utilized_rank.attention import heads
from utilized_rank.attention.factorize_heads import factorize_heads
from utilized_rank.attention.factorize_heads import head_damages
from utilized_rank.attention.factorize_heads import head_offers
from utilized_rank.factorization import methods
from utilized_rank.factorization.decompose import decompose
from utilized_rank.hidden.budget_widths import width_offers
from utilized_rank.hidden.layers import Hidden
from utilized_rank.hidden.narrow_hidden import Cut
from utilized_rank.hidden.narrow_hidden import cut_hidden
from utilized_rank.hidden.narrow_hidden import hidden_damages
from utilized_rank.hidden.narrow_hidden import shrunk
from utilized_rank.lowrank import leaf
from utilized_rank.moments.moments import Moments
from utilized_rank.ranks import offers
from utilized_rank.tree import paths


class Narrowed(NamedTuple):
  """Parameters with narrower heads and layers, and what is left to spend.

  Attributes:
    tree: with `NarrowHeads` leaves, those of all layers among them.
    rest: moments of the kernels that are in no pair and no layer.
    rest_ranks: what the budget gives them.
    params_fraction: share of their parameters that the budget leaves.
    cuts: layers that are narrower, and which units stay.
    damages: predicted nats per example, by the path of each pair's left and
      each layer's first kernel.
    units: paths of the kernels of all narrower layers.
  """

  tree: Any
  rest: Moments
  rest_ranks: dict[Any, int]
  params_fraction: float
  cuts: tuple[Cut, ...]
  damages: dict[str, float]
  units: frozenset[str]


def narrow(
  params: Any,
  moments: Moments,
  pairs: heads.Attention,
  hidden: Hidden,
  *,
  params_fraction: float,
  multiple_of: int,
  gauge: str | None,
  compensate_mean: bool,
) -> Narrowed | None:
  """Narrows heads and hidden layers as far as a joint budget asks for.

  Every pair of attention's kernels offers its ranks, every hidden layer its
  widths, every other kernel pairs of factors; damages of all are nats per
  example, and what is taken is the optimum (`offers.spend`).

  Args:
    params: dense parameters.
    moments: of the kernels, with gradients.
    pairs: as `find_attention` found them; those count whose kernels both have
      moments of their inputs.
    hidden: as `find_hidden` found them; the same, and of layers that share a
      kernel one.
    params_fraction: share of all kernels' parameters to keep.
    multiple_of: ranks and widths are multiples of this.
    gauge: of the pairs of factors.
    compensate_mean: as for `factorize`.

  Returns:
    None where no head and no layer would be narrower.
  """
  found = heads.Attention(
    {
      name: pair
      for name, pair in pairs.items()
      if _measured(moments, pair.left, pair.right)
    },
    pairs.unseen,
  )
  of_head = {s.path for p in found.values() for s in (p.left, p.right)}
  layers = hidden.only(
    name
    for name, layer in hidden.items()
    if _measured(moments, *layer.kernels)
    and not of_head & {kernel.path for kernel in layer.kernels}
  ).apart()
  if not found and not layers:
    return None
  taken = of_head | {k.path for v in layers.values() for k in v.kernels}
  rest = moments.only([path for path in moments if path not in taken])
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
  options: Any = dict(method='loss', compensate_mean=compensate_mean)
  head_losses = head_damages(params, moments, found, **options)
  layer_losses = hidden_damages(params, moments, layers, **options)
  of_heads = head_offers(found, head_losses, multiple_of)
  of_layers = width_offers(layers, layer_losses, multiple_of)
  of_rest = [offers.offer(terms, path, families) for path in rest]
  whole = sum(terms.dense_cost(path) for path in rest)
  total = whole + sum(pair.cost * pair.width for pair in found.values())
  total += sum(layer.cost * layer.width for layer in layers.values())
  spent = offers.spend(
    [*of_heads, *of_layers, *of_rest], int(params_fraction * total)
  )
  first, second = len(of_heads), len(of_heads) + len(of_layers)
  narrow_heads = offers.together(spent[:first])
  widths = offers.together(spent[first:second])
  if not narrow_heads and not widths:
    return None
  # Of one shape all the way, so that the rest is fitted to dense outputs.
  tree, cuts = cut_hidden(
    params,
    moments,
    layers.fixed(),
    widths,
    damping=methods.DAMPING,
    **options,
  )
  tree = factorize_heads(tree, moments, found, narrow_heads, **options)
  left = sum(cost for _, cost in spent[second:])
  return Narrowed(
    tree,
    rest,
    offers.together(spent[second:]),
    # Half a number more, so that rounding does not lose one.
    min(1.0, (left + 0.5) / whole) if whole else 1.0,
    tuple(Cut(layers[cut.layer.name], cut.units) for cut in cuts),
    {
      found[name].left.path: float(head_losses[name][rank])
      for name, rank in narrow_heads.items()
    }
    | {
      layers[name].kernels[0].path: float(layer_losses[name][width])
      for name, width in widths.items()
    },
    frozenset(k.path for name in widths for k in layers[name].kernels),
  )


def _measured(moments: Moments, *kernels: Any) -> bool:
  """Whether there are moments of the inputs of all of them."""
  return all(
    kernel.path in moments and moments[kernel.path].entry.side == 'input'
    for kernel in kernels
  )


def put_back(tree: Any, narrowed: Narrowed) -> Any:
  """A tree that `merge` padded, what was narrow narrow again.

  Args:
    tree: the padded tree, other kernels being compressed or not.
    narrowed: what is narrow in it.
  """
  named, treedef = paths.flatten(tree, leaf.is_low_rank)
  small, _ = paths.flatten(narrowed.tree, leaf.is_low_rank)
  of_rest = set(narrowed.rest)
  named |= {
    path: its
    for path, its in small.items()
    if leaf.is_low_rank(its) and path not in of_rest
  }
  for cut in narrowed.cuts:
    if cut.layer.resizes:
      named |= shrunk(cut.layer, named)
  return paths.unflatten(treedef, named)


def ranks(tree: Any) -> dict[str, int]:
  """Path to rank of every factored or narrow leaf."""
  named, _ = paths.flatten(tree, leaf.is_low_rank)
  return {p: v.rank for p, v in named.items() if leaf.is_low_rank(v)}

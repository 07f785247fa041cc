"""From pairs of attention's kernels to narrower heads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
import dataclasses
from typing import Any

import numpy as np

from utilized_rank.attention import heads
from utilized_rank.attention import joint
from utilized_rank.factorization import certify
from utilized_rank.factorization import methods
from utilized_rank.factorization.kernels import kernels
from utilized_rank.linalg import best_pairs
from utilized_rank.lowrank.leaf import is_low_rank
from utilized_rank.lowrank.narrow_heads import NarrowHeads
from utilized_rank.lowrank.place import place
from utilized_rank.lowrank.place import place_like
from utilized_rank.moments.moments import Moments
from utilized_rank.ranks import offers
from utilized_rank.ranks.uniform import check_params_fraction
from utilized_rank.tree import paths
from utilized_rank.walk import compat


def uniform_head_ranks(
  pairs: heads.Attention, *, params_fraction: float, multiple_of: int = 1
) -> dict[str, int]:
  """Every pair's heads keep the same share of their features.

  Args:
    pairs: as `find_attention` found them.
    params_fraction: share of the kernels' parameters to keep, in (0, 1]; a
      pair of rank r has r / e of what it had, e the width of its heads.
    multiple_of: ranks are multiples of this.

  Returns:
    Name of the pair to the largest rank within the share; empty for 1.

  Raises:
    ValueError: the fraction is outside (0, 1], or leaves a pair no rank.
  """
  check_params_fraction(params_fraction)
  ranks = {}
  for name, pair in pairs.items():
    most = int(params_fraction * pair.width + 1e-9)
    rank = most // multiple_of * multiple_of
    if not rank:
      raise ValueError(
        f'params_fraction={params_fraction} leaves heads of {pair.width} '
        f'features in {name!r} {most}: no multiple of {multiple_of}'
      )
    if rank < pair.full_rank:
      ranks[name] = rank
  return ranks


def head_damages(
  params: Any,
  moments: Moments,
  pairs: heads.Attention,
  *,
  method: str = 'loss',
  compensate_mean: bool = True,
  damping: float = methods.DAMPING,
) -> dict[str, np.ndarray]:
  """What every rank of every pair is predicted to cost, for allocations.

  Args:
    params: dense parameters.
    moments: moments of the pairs' kernels.
    pairs: as `find_attention` found them.
    method: as for `factorize_heads`, and with it the unit: 'loss' is in nats
      per example, as `predict_loss` is; 'output' is the mean square error of
      logits or of outputs, which have no unit in common.
    compensate_mean: as for `factorize_heads`.
    damping: as for `factorize_heads`.

  Returns:
    Name of the pair to (e + 1,): entry r is the damage of rank r.
  """
  methods.check_method(method, joint.METHODS)
  return {
    name: problem.damages()
    for name, _, problem in _problems(
      params, moments, pairs, pairs, method, compensate_mean, damping
    )
  }


def budget_head_ranks(
  params: Any,
  moments: Moments,
  pairs: heads.Attention,
  *,
  params_fraction: float,
  multiple_of: int = 1,
  compensate_mean: bool = True,
  damping: float = methods.DAMPING,
) -> dict[str, int]:
  """The ranks of least predicted loss within a budget: the optimum.

  Logits and outputs of attention have no unit in common but the loss, so the
  moments must have been collected with one.

  Args:
    params: dense parameters.
    moments: moments of the pairs' kernels, collected with a loss.
    pairs: as `find_attention` found them.
    params_fraction: share of the pairs' parameters to keep, in (0, 1].
    multiple_of: ranks are multiples of this.
    compensate_mean: as for `factorize_heads`.
    damping: as for `factorize_heads`.

  Returns:
    Name of the pair to rank; pairs that stay as they are, are absent.

  Raises:
    ValueError: the fraction is outside (0, 1] or below what the lowest ranks
      cost, or the moments lack a kernel or the gradients.
  """
  check_params_fraction(params_fraction)
  damages = head_damages(
    params,
    moments,
    pairs,
    method='loss',
    compensate_mean=compensate_mean,
    damping=damping,
  )
  found = head_offers(pairs, damages, multiple_of)
  total = sum(pair.cost * pair.width for pair in pairs.values())
  return offers.together(offers.spend(found, int(params_fraction * total)))


def head_offers(
  pairs: heads.Attention,
  damages: Mapping[str, np.ndarray],
  multiple_of: int,
) -> list[offers.Offer]:
  """What each pair offers a budget: its ranks, or to stay as it is.

  Args:
    pairs: as `find_attention` found them.
    damages: as `head_damages` found them.
    multiple_of: ranks are multiples of this.
  """
  return [
    offers.by_size(
      name,
      (pair.left.path, pair.right.path),
      pair.cost,
      np.arange(multiple_of, pair.full_rank, multiple_of),
      pair.width,
      damages[name],
    )
    for name, pair in pairs.items()
  ]


@compat.moves_data
def factorize_heads(
  params: Any,
  moments: Moments,
  pairs: heads.Attention,
  ranks: Mapping[str, int],
  *,
  method: str = 'output',
  compensate_mean: bool = True,
  damping: float = methods.DAMPING,
) -> Any:
  """Puts `NarrowHeads` in place of attention's kernels, a pair at a time.

  Of rank r, W_q W_k^T and W_v W_o of a head are made by r features in place of
  the head's e: both kernels keep r / e of their parameters. The logits are
  scaled as before, since the scale is the function's own.

  Args:
    params: dense parameters; leaves of no pair in `ranks` may be `LowRank`.
    moments: moments of the query, key and output kernels.
    pairs: as `find_attention` found them.
    ranks: name of the pair (the path of its left kernel) to rank; other pairs
      stay as they are.
    method: which factors of that rank.
      'output': the least error of the logits between rows drawn
        independently; the least error at the output kernel's outputs.
      'loss': the least loss, by the second moments of its gradient at the
        queries and at the output kernel's outputs; needs moments that were
        collected with a loss.
    compensate_mean: give the mean of what output kernels lose to their bias,
      where the function adds one and uses it for nothing else.
    damping: for 'loss', the share that is added to the moments of gradients:
      of the mean of their diagonal, or of the logits' own metric.

  Returns:
    The tree with `NarrowHeads` leaves, for `low_rank(fn)`; `merge` pads them
    with zeros, which computes the same function. The singular values of the
    product are divided evenly between both kernels. Biases of queries, keys
    and values keep their shapes and are zero beyond r.

  Raises:
    ValueError: an unknown method or pair, a rank that it cannot have, or
      moments that lack a kernel, or the gradients.
    FloatingPointError: heads do not leave the error that was predicted for
      them; names the pair and the head.

  >>> import jax, utilized_rank as ur
  >>> def fn(p, x):
  ...   weights = jax.nn.softmax((x @ p['q']) @ (x @ p['k']).T / 2)
  ...   return weights @ (x @ p['v']) @ p['o']
  >>> names = ('q', 'k', 'v', 'o')
  >>> params = {n: jnp.eye(4).at[3].set(0) for n in names}
  >>> x = jax.random.normal(jax.random.key(0), (16, 4))
  >>> pairs = ur.find_attention(fn, params, x)
  >>> moments = ur.capture(fn)(params, x)[1]
  >>> small = factorize_heads(params, moments, pairs, {'q': 3, 'v': 3})
  >>> small['o'].a.shape
  (3, 4)
  >>> bool(jnp.allclose(ur.low_rank(fn)(small, x), fn(params, x), atol=1e-5))
  True
  """
  methods.check_method(method, joint.METHODS)
  for name, rank in ranks.items():
    if name not in pairs:
      raise ValueError('a rank is given for ' + paths.unknown(name, pairs))
    full = pairs[name].full_rank
    if not 1 <= rank <= full or rank != int(rank):
      raise ValueError(
        f'rank {rank!r} for {name!r}: its heads of {pairs[name].width} '
        f'features have ranks from 1 to {full}'
      )
  named, treedef = paths.flatten(params, is_low_rank)
  out = dict(named)
  for name, pair, problem in _problems(
    params, moments, pairs, ranks, method, compensate_mean, damping
  ):
    rank = int(ranks[name])
    dtype = named[pair.left.path].dtype
    left, right, lost = _truncated(problem, rank, name, dtype)
    for side, array in ((pair.left, left), (pair.right, right)):
      leaf = named[side.path]
      a, bias = joint.leaves(side, array)
      narrow = NarrowHeads(
        a.astype(leaf.dtype), None, None, side.layout, head=side.head
      )
      out[side.path] = place(narrow, leaf)
      path = joint.head_bias(side)
      if path is not None:
        old = named[path]
        out[path] = place_like(bias.reshape(old.shape), old)
    path = pair.right.bias
    if compensate_mean and pair.kind == heads.VALUES and path is not None:
      old = named[path]
      new = np.asarray(old, np.float64) + lost.reshape(old.shape)
      out[path] = place_like(new, old)
  return paths.unflatten(treedef, out)


def _problems(
  params: Any,
  moments: Moments,
  pairs: heads.Attention,
  names: Any,
  method: str,
  compensate_mean: bool,
  damping: float,
) -> Iterator[tuple[str, heads.HeadPair, joint.Problem]]:
  """The pairs with their problems; a pair's sides may come swapped."""
  named, _ = paths.flatten(params, is_low_rank)
  pairs_of = {name: pairs[name] for name in pairs if name in names}
  for pair in pairs_of.values():
    for side in (pair.left, pair.right):
      _check_leaf(side.path, side.layout.shape, named)
      if side.bias is not None and side.bias not in named:
        raise ValueError('no bias ' + paths.unknown(side.bias, named))
  wanted = {
    side.path
    for pair in pairs_of.values()
    for side in (pair.left, pair.right)
    if not (pair.kind == heads.VALUES and side is pair.left)
  }
  members = {p: list(m) for p, m in kernels(params, moments, only=wanted)}
  for name, pair in pairs_of.items():
    if pair.kind == heads.VALUES:
      centered = compensate_mean and pair.right.bias is not None
      yield (
        name,
        pair,
        joint.values(named, members, pair, method, damping, centered),
      )
      continue
    if pair.left.many and not pair.right.many:
      # The gradient is looked at where each head is met once.
      pair = dataclasses.replace(pair, left=pair.right, right=pair.left)
    yield name, pair, joint.logits(named, members, pair, method, damping)


def _check_leaf(path: str, shape: Any, named: dict[str, Any]) -> None:
  if path not in named:
    raise ValueError('no parameter ' + paths.unknown(path, named))
  leaf = named[path]
  if is_low_rank(leaf):
    raise ValueError(f'{path!r} is low-rank already; give the dense parameters')
  if tuple(leaf.shape) != tuple(shape):
    raise ValueError(
      f'{path!r} has shape {tuple(leaf.shape)}, its pair was found for '
      f'{tuple(shape)}'
    )


def _truncated(
  problem: joint.Problem, rank: int, name: str, dtype: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Both kernels of rank r, and the mean output that is lost per loop.

  Raises:
    FloatingPointError: they do not leave the error that was predicted.
  """
  left, right = problem.left, problem.right
  new = [np.empty((*w.shape[:-1], rank)) for w in (left, right)]
  lost = np.zeros((left.shape[0], right.shape[3]))
  for head in np.ndindex(*problem.sigma.shape[:2]):
    full, tails = problem.family(head)
    p = best_pairs.Pair(full.a[:, :rank], full.b[:rank])
    flat = [w[head].reshape(-1, w.shape[-1]) for w in (left, right)]
    product = best_pairs.Pair(flat[0] @ p.a, (flat[1] @ p.b.T).T)
    pair = best_pairs.balanced(product)
    place = f'{name} head {",".join(map(str, head))}'
    certify.check_in(
      place,
      certify.Metric(
        np.eye(len(p.a)), problem.sigma[head], problem.judged[head]
      ),
      p,
      float(tails[rank]),
      np.float64,
      float(tails[0]),
    )
    certify.check_product(place, product, pair, dtype)
    for array, factor in zip(new, (pair.a, pair.b.T), strict=True):
      array[head] = factor.reshape(array[head].shape)
    if problem.mean is not None:
      z = problem.mean[head]
      lost[head[0]] += np.einsum('ne,nme->m', z - (z @ p.a) @ p.b, right[head])
  return new[0], new[1], lost

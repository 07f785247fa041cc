"""Pairs of equal Gram matrices to train, and identity blocks put back."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from utilized_rank.linalg.best_pairs import Pair
from utilized_rank.lowrank.leaf import LowRank
from utilized_rank.lowrank.leaf import is_low_rank
from utilized_rank.lowrank.place import place_like
from utilized_rank.lowrank.store import assemble
from utilized_rank.lowrank.store import store
from utilized_rank.lowrank.store import stored_pairs
from utilized_rank.products.gauge import IDENTITY
from utilized_rank.tree import paths
from utilized_rank.walk import compat


@compat.moves_data
def balanced(tree: Any) -> Any:
  """The same function in plain pairs A B with A^T A = B B^T.

  A pair with an identity block gets its r^2 numbers. Pairs that share a left
  factor, and narrower heads, stay as they are.

  >>> from utilized_rank.tree.layout import Layout
  >>> layout = Layout.of((4, 3), inputs=(0,), outputs=(1,))
  >>> w = LowRank(jnp.full((4, 1), 3.0), jnp.ones((1, 3)), None, layout)
  >>> new = balanced({'w': w})['w']
  >>> float(jnp.sum(new.a**2) - jnp.sum(new.b**2)) < 1e-5
  True
  """
  return _changed(tree, tree, lambda leaf: None, _equal)


@compat.moves_data
def reblocked(tree: Any, like: Any) -> Any:
  """Identity blocks again where `like`, which was balanced, has them."""
  gauge = lambda leaf: None if leaf.order is None else IDENTITY
  return _changed(tree, like, gauge, lambda pair: pair)


def _changed(
  tree: Any,
  like: Any,
  gauge: Callable[[LowRank], str | None],
  change: Callable[[Pair], Pair],
) -> Any:
  named, structure = paths.flatten(tree, is_low_rank)
  before, _ = paths.flatten(like, is_low_rank)
  shared = {leaf.left for leaf in before.values() if is_low_rank(leaf)}
  for path, leaf in named.items():
    # Exactly LowRank: narrower heads have no pair.
    if type(leaf) is not LowRank or leaf.a is None or path in shared:
      continue
    form = gauge(before[path])
    if change is not _equal and form is None:
      continue
    made = assemble(
      [
        store(change(pair), leaf.layout, leaf.rank, leaf.dtype, form)
        for pair in stored_pairs(leaf)
      ],
      leaf.layout,
    )
    a, b = (
      _where(new, old) for new, old in ((made.a, leaf.a), (made.b, leaf.b))
    )
    named[path] = dataclasses.replace(leaf, a=a, b=b, order=made.order)
  return paths.unflatten(structure, named)


def _equal(pair: Pair) -> Pair:
  """U sqrt(s), sqrt(s) V^T of A B = U s V^T."""
  (q, right), (p, left) = np.linalg.qr(pair.a), np.linalg.qr(pair.b.T)
  u, s, v = np.linalg.svd(right @ left.T)
  root = np.sqrt(s)
  return Pair(q @ (u * root), (root[:, None] * v) @ p.T)


def _where(new: np.ndarray, old: Any) -> jax.Array:
  """A factor where the old one is, if its axes are as long."""
  return place_like(new, old) if new.shape == old.shape else jnp.asarray(new)

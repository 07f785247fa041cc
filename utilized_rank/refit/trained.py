"""A compressed tree as what is trained in it and what is not."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from utilized_rank.lowrank.leaf import is_low_rank
from utilized_rank.moments.capture import find_sites
from utilized_rank.refit import descent
from utilized_rank.tree import paths
from utilized_rank.walk import compat
from utilized_rank.walk import tracing
from utilized_rank.walk.interpret import UnsupportedError

Leaves = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Trained:
  """A tree as what is trained and what is not.

  Attributes:
    treedef: its structure.
    named: all leaves by path.
    trained: those that are trained.
    positive: paths of those whose logarithm is.
  """

  treedef: Any
  named: Leaves
  trained: Leaves
  positive: frozenset[str]

  @classmethod
  def of(cls, fn: Any, params: Any, small: Any, batch: Any) -> Trained:
    named, treedef = paths.flatten(small, is_low_rank)
    leaves, _ = paths.flatten(params)
    try:
      kernels = set(find_sites(fn, params, batch))
    except UnsupportedError:  # who knows what is one
      kernels = set(leaves)
    trained = {
      path: leaf
      for path, leaf in named.items()
      if is_low_rank(leaf)
      or (
        tracing.is_array(leaf)
        and compat.is_floating(leaf.dtype)
        and (path not in kernels or _differs(leaf, leaves.get(path)))
      )
    }
    positive = frozenset(
      path
      for path, leaf in trained.items()
      if not is_low_rank(leaf) and bool(np.all(np.asarray(leaf) > 0))
    )
    return cls(treedef, named, trained, positive)

  def rest(self) -> Leaves:
    """The arrays that are not trained, on the device."""
    return {
      path: jnp.asarray(leaf)
      for path, leaf in self.named.items()
      if path not in self.trained and tracing.is_array(leaf)
    }

  def start(self) -> descent.State:
    """The trained leaves in float32, before the first update."""
    wide = {
      path: jax.tree.map(
        lambda v: jnp.array(v, jnp.promote_types(v.dtype, jnp.float32)), leaf
      )
      for path, leaf in self.trained.items()
    }
    size = lambda v: jnp.sqrt(jnp.mean(jnp.square(v)))
    sizes = {path: jax.tree.map(size, leaf) for path, leaf in wide.items()}
    for path in self.positive:
      wide[path] = jnp.log(wide[path])
      sizes[path] = jnp.ones((), wide[path].dtype)
    return descent.start(wide, sizes)

  def _narrow(self, values: Leaves) -> Leaves:
    """Trained values as leaves, in the leaves' own dtypes."""
    return {
      path: jax.tree.map(
        lambda v, old: v.astype(old.dtype),
        jnp.exp(values[path]) if path in self.positive else values[path],
        leaf,
      )
      for path, leaf in self.trained.items()
    }

  def joined(self, values: Leaves, rest: Leaves) -> Any:
    """The tree of trained values and the other arrays."""
    return paths.unflatten(
      self.treedef, self.named | rest | self._narrow(values)
    )

  def stored(self, values: Leaves) -> Any:
    """The tree of trained values, its other leaves being what they were."""
    return self.joined(values, {})


def _differs(leaf: Any, old: Any) -> bool:
  """Whether a leaf is not the dense tree's."""
  return leaf is not old and (
    np.shape(leaf) != np.shape(old)
    or not np.array_equal(np.asarray(leaf), np.asarray(old))
  )

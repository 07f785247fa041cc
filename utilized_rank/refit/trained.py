"""A compressed tree as what is trained in it and what is not."""

from __future__ import annotations

import dataclasses
import functools
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
from utilized_rank.walk.tracing import Form

Leaves = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Kind:
  """All but the arrays of a tree in training: a static argument of `jax.jit`.

  Attributes:
    form: of the tree.
    dtypes: of the trained leaves' arrays, by path.
    positive: paths of those whose logarithm is trained.
  """

  form: Form
  dtypes: tuple[tuple[str, tuple[Any, ...]], ...]
  positive: frozenset[str]

  def narrow(self, values: Leaves) -> Leaves:
    """Trained values as leaves, in the leaves' own dtypes."""
    found = {}
    for path, dtypes in self.dtypes:
      value = values[path]
      arrays, treedef = jax.tree.flatten(
        jnp.exp(value) if path in self.positive else value
      )
      found[path] = jax.tree.unflatten(
        treedef, [v.astype(d) for v, d in zip(arrays, dtypes, strict=True)]
      )
    return found

  def joined(self, values: Leaves, rest: Leaves) -> Any:
    """The tree of trained values and the other arrays."""
    return self.form.filled(rest | self.narrow(values))


@dataclasses.dataclass(frozen=True)
class Trained:
  """A tree as what is trained and what is not.

  Attributes:
    treedef: its structure.
    named: all leaves by path.
    trained: those that are trained.
    kind: what it is beside its arrays.
  """

  treedef: Any
  named: Leaves
  trained: Leaves
  kind: Kind

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
    dtypes = tuple(
      (path, tuple(v.dtype for v in jax.tree.leaves(leaf)))
      for path, leaf in trained.items()
    )
    kind = Kind(Form(small, is_low_rank), dtypes, positive)
    return cls(treedef, named, trained, kind)

  def rest(self) -> Leaves:
    """The arrays that are not trained, on the device."""
    return tracing.on_device(
      {p: v for p, v in self.named.items() if p not in self.trained}
    )

  def start(self) -> descent.State:
    """The trained leaves in float32, before the first update."""
    return _start(self.kind.positive, self.trained)

  def stored(self, values: Leaves) -> Any:
    """The tree of trained values, its other leaves being what they were."""
    return paths.unflatten(self.treedef, self.named | self.kind.narrow(values))


# One program: single operations take longer to compile than to run.
@functools.partial(jax.jit, static_argnums=0)
def _start(positive: frozenset[str], trained: Leaves) -> descent.State:
  wide = {
    path: jax.tree.map(
      lambda v: v.astype(jnp.promote_types(v.dtype, jnp.float32)), leaf
    )
    for path, leaf in trained.items()
  }
  size = lambda v: jnp.sqrt(jnp.mean(jnp.square(v)))
  sizes = {path: jax.tree.map(size, leaf) for path, leaf in wide.items()}
  for path in positive:
    wide[path] = jnp.log(wide[path])
    sizes[path] = jnp.ones((), wide[path].dtype)
  return descent.start(wide, sizes)


def _differs(leaf: Any, old: Any) -> bool:
  """Whether a leaf is not the dense tree's."""
  return leaf is not old and (
    np.shape(leaf) != np.shape(old)
    or not np.array_equal(np.asarray(leaf), np.asarray(old))
  )

"""A tree's arrays by name, those that are trained apart from the others."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import re
import sys
from typing import Any

import jax
import jax.numpy as jnp

from utilized_rank.lowrank.leaf import LowRank
from utilized_rank.lowrank.leaf import is_low_rank
from utilized_rank.tree import paths
from utilized_rank.tree.structure import Structure
from utilized_rank.walk import tracing

# Linen's collection of running statistics, wherever it stands in a tree.
_STATISTICS = re.compile(r'(.*/)?batch_stats/.*')

Arrays = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Parts:
  """A tree without its arrays, and their names.

  Attributes:
    named: leaves by path, as the tree had them.
    structure: the tree without them.
    arrays: name of every array: the leaf's path, and `/a`, `/b` and `/c` behind
      it in a `LowRank` (`/b_...` with an identity block).
    trained: names of those that gradients move.
  """

  named: dict[str, Any]
  structure: Structure
  arrays: Arrays
  trained: tuple[str, ...]

  @property
  def pairs(self) -> dict[str, LowRank]:
    """The `LowRank` leaves by path."""
    return {k: v for k, v in self.named.items() if is_low_rank(v)}

  @property
  def moving(self) -> Arrays:
    """Floating arrays that no gradient moves: running statistics, mostly."""
    return {
      name: value
      for name, value in self.arrays.items()
      if name in self.named
      and name not in self.trained
      and jnp.issubdtype(value.dtype, jnp.floating)
    }

  def split(self) -> tuple[Arrays, Arrays]:
    """Arrays that are trained, and the others."""
    trained = {name: self.arrays[name] for name in self.trained}
    return trained, {k: v for k, v in self.arrays.items() if k not in trained}

  def join(self, arrays: Mapping[str, Any]) -> Any:
    """The tree of these arrays."""
    named = {}
    for path, leaf in self.named.items():
      if is_low_rank(leaf):
        names = list(_inside(path, leaf))
        treedef = jax.tree.structure(leaf)
        named[path] = jax.tree.unflatten(treedef, [arrays[n] for n in names])
      else:
        named[path] = arrays.get(path, leaf)
    return paths.unflatten(self.structure, named)


def take_apart(tree: Any, trainable: paths.Rules = ()) -> Parts:
  """Names a tree's arrays and says which of them are trained.

  That are all floating ones but running statistics: Linen's `batch_stats`, and
  variables of NNX that are no `nnx.Param`.

  Args:
    tree: any pytree; kernels may be `LowRank`, which are one leaf to rules.
    trainable: ordered `(regex, bool)` rules over leaf paths; a leaf that none
      matches is trained or not as without rules.

  Raises:
    ValueError: a rule matches no leaf, or nothing is left to train.

  >>> parts = take_apart({'w': np.ones(2), 'batch_stats': {'mean': np.ones(2)}})
  >>> parts.trained
  ('w',)
  """
  named, structure = paths.flatten(tree, is_low_rank)
  wanted = _wanted(named, structure, trainable)
  arrays: Arrays = {}
  trained = []
  for path, leaf in named.items():
    if is_low_rank(leaf):
      inside = _inside(path, leaf)
    else:
      inside = {path: leaf} if tracing.is_array(leaf) else {}
    arrays |= inside
    trained += [
      name
      for name, value in inside.items()
      if wanted[path] and jnp.issubdtype(value.dtype, jnp.floating)
    ]
  if not trained:
    raise ValueError(
      f'no floating leaf is to be trained under trainable={trainable!r}; '
      f'leaves are {list(named)[:6]}'
    )
  return Parts(named, structure, arrays, tuple(trained))


def _inside(path: str, leaf: LowRank) -> Arrays:
  """The arrays of a pair by name."""
  found, _ = jax.tree_util.tree_flatten_with_path(leaf)
  at = lambda keys: jax.tree_util.keystr(keys, simple=True, separator='/')
  return {f'{path}/{at(keys)}': value for keys, value in found}


def _wanted(
  named: Mapping[str, Any], structure: Structure, rules: paths.Rules
) -> dict[str, bool]:
  states = _states(structure)
  usual = {
    path: path not in states and not _STATISTICS.fullmatch(path)
    for path in named
  }
  # What a rule decides is the same whatever is said of the rest.
  yes, no = (
    paths.choose(named, rules, 'trainable', bool, rest)
    for rest in (True, False)
  )
  return {p: yes[p] if yes[p] == no[p] else usual[p] for p in named}


def _states(structure: Structure) -> set[str]:
  """Paths of NNX variables that are no parameters."""
  nnx = sys.modules.get('flax.nnx')
  if nnx is None:
    return set()
  slots = [
    slot
    for part in (structure.root, *structure.shared)
    for slot in part.places
    if not isinstance(slot, int) and slot.box is not None
  ]
  is_param = lambda box: isinstance(jax.tree.unflatten(box, [0]), nnx.Param)
  return {slot.path for slot in slots if not is_param(slot.box)}

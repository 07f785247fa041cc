"""What of a tree is not its leaves: containers, ties, and variables of NNX.

One object at two places of a tree is one: a layer, a variable, or an array of
two or more axes. It has the path of the first place, counts once, and is one
object at all of its places afterwards. Only identity counts, not equal values.
Vectors and scalars are tied by what holds them alone: one array of zeros may
have been given to many biases, and shapes describe many arrays.

An `nnx.Variable` is a box around its array. What takes an array's place and has
several arrays (`boxed`) gets a box around each of them, as Flax expects: its
optimizer looks for variables of arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import sys
from typing import Any, NamedTuple

import jax
import numpy as np

IsLeaf = Callable[[Any], bool]


class Slot(NamedTuple):
  """A leaf's place.

  Attributes:
    path: the leaf's; that of the first place if there are several.
    box: None, or the structure of a variable around the leaf.
  """

  path: str
  box: Any


class Part(NamedTuple):
  """A tree between its root and leaves, or nodes that stand elsewhere too.

  Attributes:
    treedef: the pytree's structure.
    places: for each of its leaves a slot, or the number of a shared part.
  """

  treedef: Any
  places: tuple[Slot | int, ...]


class Structure(NamedTuple):
  """A tree without its leaves.

  Attributes:
    root: where it begins.
    shared: containers that stand at several places.
  """

  root: Part
  shared: tuple[Part, ...]

  def filled(self, named: Mapping[str, Any]) -> Any:
    """The tree of these leaves by path."""
    made: dict[str | int, Any] = {}

    def build(part: Part) -> Any:
      return jax.tree.unflatten(part.treedef, map(one, part.places))

    def one(place: Slot | int) -> Any:
      if isinstance(place, int):
        if place not in made:
          made[place] = build(self.shared[place])
        return made[place]
      if place.path not in made:
        made[place.path] = _boxed(named[place.path], place.box)
      return made[place.path]

    return build(self.root)


def flatten(
  tree: Any, is_leaf: IsLeaf | None
) -> tuple[list[tuple[str, Any]], Structure]:
  """Takes a tree apart: (path, leaf) in its own order, and the rest.

  >>> w = np.ones((2, 2))
  >>> leaves, structure = flatten({'a': w, 'b': [w, 'x']}, None)
  >>> [path for path, _ in leaves]
  ['a', 'b/1']
  >>> again = structure.filled({'a': np.zeros((2, 2)), 'b/1': 'x'})
  >>> again['a'] is again['b'][0]
  True

  Raises:
    ValueError: a dictionary has keys that JAX cannot sort.
  """
  try:
    walk = _Flattening(tree, is_leaf)
  except ValueError as error:
    if why := _unsortable(tree):
      raise ValueError(why) from error
    raise
  root = walk.part(tree, ())
  return walk.leaves, Structure(root, tuple(walk.parts))


def _unsortable(node: Any, path: str = '') -> str | None:
  """Which dictionary's keys cannot be sorted: JAX says that one's cannot."""
  if isinstance(node, Mapping):
    try:
      below = {f'{path}/{key}': node[key] for key in sorted(node)}
    except TypeError:
      keys = ', '.join(map(repr, list(node)[:6]))
      return (
        f'the dictionary at {path[1:]!r} has keys that cannot be sorted '
        f'({keys}): JAX takes those of one kind'
      )
  elif isinstance(node, (list, tuple)):
    below = {f'{path}/{i}': child for i, child in enumerate(node)}
  else:
    return None
  found = (_unsortable(child, at) for at, child in below.items())
  return next(filter(None, found), None)


class _Flattening:
  """One tree being taken apart."""

  def __init__(self, tree: Any, is_leaf: IsLeaf | None):
    self.leaves: list[tuple[str, Any]] = []
    self.parts: list[Any] = []
    self._is_leaf = is_leaf
    # Flax is not imported for it: without flax there are no variables.
    self._variable = getattr(sys.modules.get('flax.nnx'), 'Variable', ())
    self._places: dict[Any, Slot | int] = {}  # of what is tied
    # Kept, so that nodes which custom containers make anew get other ids.
    self._seen: dict[Any, Any] = {}
    self._ties = self._find_ties(tree)

  def part(self, node: Any, keys: tuple[Any, ...]) -> Part:
    """The structure of a container below a place."""
    ends = lambda v: (
      self._ends(v) or (v is not node and self._identity(v) in self._ties)
    )
    leaves, treedef = jax.tree_util.tree_flatten_with_path(node, ends)
    return Part(
      treedef, tuple(self._place((*keys, *k), leaf) for k, leaf in leaves)
    )

  def _place(self, keys: tuple[Any, ...], node: Any) -> Slot | int:
    key = self._identity(node)
    if key in self._places:
      return self._places[key]
    if key not in self._ties:
      return self._slot(keys, node)
    if self._ends(node) or _is_bare(node):
      place: Slot | int = self._slot(keys, node)
    else:
      place = len(self.parts)
      self.parts.append(None)
      self.parts[place] = self.part(node, keys)
    self._places[key] = place
    return place

  def _slot(self, keys: tuple[Any, ...], leaf: Any) -> Slot:
    box = getattr(leaf, 'box', None) if self._ends(leaf) else None
    if box is not None:
      around = jax.tree.unflatten(box, [0])
      keys += jax.tree_util.tree_flatten_with_path(around)[0][0][0]
      leaf = leaf.opened()
    elif self._is_box(leaf):
      inside = jax.tree_util.tree_flatten_with_path(
        leaf, lambda v: v is not leaf
      )
      ((key, leaf),), box = inside
      keys += key
    path = jax.tree_util.keystr(keys, simple=True, separator='/')
    self.leaves.append((path, leaf))
    return Slot(path, box)

  def _find_ties(self, tree: Any) -> set[Any]:
    again: dict[Any, Any] = {}

    def look(node):
      if node is None:
        return False
      key = self._identity(node)
      if key in self._seen:
        again[key] = node
        return True
      self._seen[key] = node
      return self._ends(node)

    jax.tree.flatten(tree, look)
    return {i for i, node in again.items() if self._is_one(node)}

  def _identity(self, node: Any) -> Any:
    """What two places have in common that hold one object.

    Flax makes containers anew around the same variables: a leaf of several
    arrays is the one whose arrays are these.
    """
    if self._is_leaf is None or not self._is_leaf(node) or _is_bare(node):
      return id(node)
    inside, treedef = jax.tree.flatten(node, is_leaf=lambda v: v is not node)
    held = [v for v in inside if v is not None]
    kinds = (jax.Array, np.ndarray, self._variable)
    if not held or not all(isinstance(v, kinds) for v in held):
      return id(node)
    return (treedef, *map(id, inside))

  def _is_one(self, node: Any) -> bool:
    """Whether a node at several places is meant to be one."""
    if self._ends(node):
      return True
    if _is_bare(node):
      return isinstance(node, (jax.Array, np.ndarray)) and node.ndim > 1
    return any(hasattr(leaf, 'shape') for leaf in jax.tree.leaves(node))

  def _ends(self, node: Any) -> bool:
    if self._is_leaf is not None and self._is_leaf(node):
      return True
    return self._is_box(node)

  def _is_box(self, node: Any) -> bool:
    """Whether a node is a variable of one leaf."""
    if not isinstance(node, self._variable):
      return False
    (value,) = jax.tree.leaves(node, is_leaf=lambda v: v is not node)
    is_leaf = self._is_leaf
    return _is_bare(value) or (is_leaf is not None and is_leaf(value))


def _is_bare(node: Any) -> bool:
  """Whether a node is a leaf and no container, nor None."""
  return jax.tree_util.all_leaves([node])


def _boxed(leaf: Any, box: Any) -> Any:
  if box is None:
    return leaf
  if hasattr(leaf, 'boxed'):
    return leaf.boxed(box)
  return jax.tree.unflatten(box, [leaf])

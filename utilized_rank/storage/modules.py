"""Modules of NNX and Equinox, and other containers, as dictionaries by path."""

from __future__ import annotations

from typing import Any

import jax

from utilized_rank.lowrank.leaf import is_low_rank
from utilized_rank.tree import paths
from utilized_rank.walk import compat


def is_container(node: Any) -> bool:
  """Whether a node is of a class that is no dictionary, list or tuple."""
  return not jax.tree_util.all_leaves([node])


def as_dictionaries(module: Any) -> dict[str, Any]:
  """The arrays and numbers of a module, by the parts of their paths.

  Functions and random keys are left out: they are the program's.

  >>> as_dictionaries(jax.tree_util.Partial(print, np.ones(2), n=3))
  {'0': {'0': array([1., 1.])}, '1': {'n': 3}}
  """
  nested: dict[str, Any] = {}
  for path, leaf in paths.flatten(module, is_low_rank)[0].items():
    if _is_kept(leaf):
      *where, name = path.split('/')
      place = nested
      for key in where:
        place = place.setdefault(key, {})
      place[name] = leaf
  return nested


def filled(like: Any, tree: Any) -> Any:
  """A module of this structure with the arrays of a tree that was written.

  Args:
    like: a module or tree, dense or compressed, or its shapes; what
      `as_dictionaries` leaves out is taken from it.
    tree: what is put into it, by path; pairs go where kernels are.

  Raises:
    ValueError: the two have different leaves, or one of another shape.

  >>> filled([np.zeros(2), max], {'0': np.ones(2)})
  [array([1., 1.]), <built-in function max>]
  """
  named, treedef = paths.flatten(like, is_low_rank)
  found = paths.flatten(tree, is_low_rank)[0]
  wanted = {path for path, leaf in named.items() if _is_kept(leaf)}
  if wanted != set(found):
    path = min(wanted ^ set(found))
    where = 'the checkpoint' if path in found else 'like='
    raise ValueError(f'{path!r} is in {where} alone: another model was saved')
  for path, leaf in found.items():
    was, now = (tuple(getattr(x, 'shape', ())) for x in (leaf, named[path]))
    if was != now:
      raise ValueError(
        f'{path!r} is of shape {was} in the checkpoint and {now} in like=; '
        'where layers got narrower, their shapes are in the recipe: '
        'like=recipe.abstract(module)'
      )
  return paths.unflatten(treedef, {**named, **found})


def _is_kept(leaf: Any) -> bool:
  if is_low_rank(leaf) or isinstance(leaf, (bool, int, float, str)):
    return True
  if not hasattr(leaf, 'shape'):
    return False
  return not compat.is_key(leaf.dtype)

"""Trees whose layers are stacked for a scan, taken apart and put together.

A stack has one rank: its factors are arrays with a leading layer axis. Layers
of different ranks share one by padding the smaller pairs with zeros, which
computes the same function; `unstack` gives every layer a leaf of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from utilized_rank.lowrank.leaf import LowRank
from utilized_rank.lowrank.leaf import is_low_rank
from utilized_rank.lowrank.narrow_heads import NarrowHeads
from utilized_rank.products.gauge import Order
from utilized_rank.products.gauge import widen
from utilized_rank.tree.layout import Layout
from utilized_rank.tree.layout import pieces_of
from utilized_rank.walk import tracing


def pad_factors(
  pairs: Sequence[tuple[Any, Any]],
) -> tuple[np.ndarray, np.ndarray]:
  """Stacks pairs of factors, smaller ranks padded with zeros.

  Args:
    pairs: for each matrix, A of shape (d, r_i) and B of shape (r_i, m).

  Returns:
    A of shape (n, d, r) and B of shape (n, r, m), r the largest rank. Column
    j of A_i and row j of B_i are zero for j >= r_i, so the products are the
    pairs' own.

  Raises:
    ValueError: there is no pair, or a pair's ranks differ.

  >>> one, two = (np.ones((4, 1)), np.ones((1, 3))), (np.ones((4, 2)),
  ...                                                 np.ones((2, 3)))
  >>> a, b = pad_factors([one, two])
  >>> a.shape, b.shape, (a @ b)[:, 0, 0].tolist()
  ((2, 4, 2), (2, 2, 3), [1.0, 2.0])
  """
  for a, b in pairs:
    if a.shape[1] != b.shape[0]:
      raise ValueError(f'factors of shapes {a.shape} and {b.shape} do not meet')
  rank = max((a.shape[1] for a, _ in pairs), default=0)
  if not rank:
    raise ValueError('no factors to stack')
  pad = lambda v, axis: np.pad(
    v, [(0, rank - v.shape[i] if i == axis else 0) for i in range(v.ndim)]
  )
  return (
    np.stack([pad(np.asarray(a), 1) for a, _ in pairs]),
    np.stack([pad(np.asarray(b), 0) for _, b in pairs]),
  )


def unstack(tree: Any, path: str, name: str) -> Any:
  """Gives every layer of a stacked part of a tree a part of its own.

  Args:
    tree: nested dictionaries; `LowRank` leaves may be among the leaves.
    path: where the stacked part is; each of its arrays leads with the layers,
      leaves that are no arrays are every layer's.
    name: key of a layer, `{}` standing for its number from zero.

  Returns:
    The tree with the layers' keys in place of the last key of `path`.

  Raises:
    KeyError: there is nothing at `path`.
    ValueError: its leaves do not lead with one number of layers, or a layer's
      key is taken.

  >>> tree = {'blocks': {'w': np.zeros((2, 4, 3))}, 'head': np.zeros(3)}
  >>> out = unstack(tree, 'blocks', 'block_{}')
  >>> list(out), out['block_1']['w'].shape
  (['block_0', 'block_1', 'head'], (4, 3))
  """
  *parents, last = path.split('/')

  def edit(node):
    part = _child(node, last, path)
    leaves = jax.tree.leaves(part, is_leaf=is_low_rank)
    sizes = {v.shape[:1] for v in leaves if _has_layers(v)}
    if len(sizes) != 1 or () in sizes:
      raise ValueError(
        f'the leaves at {path!r} must lead with the same number of layers, '
        f'got {sorted(sizes)}'
      )
    ((count,),) = sizes
    layers = {
      name.format(i): jax.tree.map(
        lambda v, i=i: _moved(
          _layer(v, i), path, '/'.join([*parents, name.format(i)])
        ),
        part,
        is_leaf=is_low_rank,
      )
      for i in range(count)
    }
    others = {k: v for k, v in node.items() if k != last}
    taken = sorted(layers.keys() & others.keys())
    if len(layers) != count or taken:
      raise ValueError(
        f'{name!r} does not name {count} new layers at {path!r}'
        + (f': {taken} are taken' if taken else '')
      )
    return layers | others

  return _at(tree, parents, path, edit)


def stack(tree: Any, path: str, name: str) -> Any:
  """Undoes `unstack`: layers become one part whose leaves lead with them.

  `LowRank` leaves of different ranks are padded with zeros; those with an
  identity block are given further pivots.

  Args:
    tree: nested dictionaries.
    path: where the stacked part goes.
    name: key of a layer, `{}` standing for its number from zero.

  Raises:
    KeyError: the tree has no layer of that name.
    ValueError: the layers differ in structure, in a leaf's shape, or in a leaf
      that is no array.

  >>> tree = {'block_0': {'w': np.zeros((4, 3))},
  ...         'block_1': {'w': np.ones((4, 3))}}
  >>> stack(tree, 'blocks', 'block_{}')['blocks']['w'].shape
  (2, 4, 3)
  """
  *parents, last = path.split('/')

  def edit(node):
    keys: list[str] = []
    for i in range(len(node)):
      if name.format(i) not in node or name.format(i) in keys:
        break
      keys.append(name.format(i))
    if not keys:
      raise KeyError(f'no layers named {name!r} at {path!r}: {list(node)[:6]}')
    layers = [
      jax.tree.map(
        lambda v, k=k: _moved(v, '/'.join([*parents, k]), path),
        node[k],
        is_leaf=is_low_rank,
      )
      for k in keys
    ]
    shapes = [
      jax.tree.map(
        lambda v: v.shape if _has_layers(v) else v, layer, is_leaf=is_low_rank
      )
      for layer in layers
    ]
    for key, shape in zip(keys, shapes):
      if shape != shapes[0]:
        raise ValueError(
          f'layer {key!r} differs from {keys[0]!r} in shapes, or in leaves '
          f'that are no arrays: {shape} and {shapes[0]}'
        )
    part = jax.tree.map(lambda *v: _join(v), *layers, is_leaf=is_low_rank)
    return {last: part} | {k: v for k, v in node.items() if k not in keys}

  return _at(tree, parents, path, edit)


def _child(node: Any, key: str, path: str) -> Any:
  if not isinstance(node, Mapping) or key not in node:
    known = list(node)[:6] if isinstance(node, Mapping) else type(node).__name__
    raise KeyError(f'nothing at {path!r}: no {key!r} in {known}')
  return node[key]


def _at(tree: Any, parents: Sequence[str], path: str, edit: Any) -> Any:
  if not parents:
    return edit(tree)
  first, *rest = parents
  child = _at(_child(tree, first, path), rest, path, edit)
  return {k: child if k == first else v for k, v in tree.items()}


def _moved(leaf: Any, old: str, new: str) -> Any:
  """The leaf, the one that holds its left factor having moved with it."""
  if not is_low_rank(leaf) or leaf.left is None:
    return leaf
  inside = leaf.left.removeprefix(f'{old}/')
  if inside == leaf.left:
    raise ValueError(
      f'a leaf below {old!r} has its left factor in {leaf.left!r}, outside'
    )
  return dataclasses.replace(leaf, left=f'{new}/{inside}')


def _has_layers(leaf: Any) -> bool:
  """Whether a leaf is an array; others are the same for every layer."""
  return is_low_rank(leaf) or tracing.is_array(leaf)


def _layer(leaf: Any, i: int) -> Any:
  if not _has_layers(leaf):
    return leaf
  if not is_low_rank(leaf):
    return leaf[i]
  layout = leaf.layout
  first = pieces_of(layout.shape, layout.atoms)[0]
  if first != layout.groups[:1]:
    raise ValueError(
      f'a low-rank leaf of shape {layout.shape} is no stack of kernels: its '
      'first axis is not what counts them'
    )
  less = lambda atoms: tuple(a - 1 for a in atoms)
  inner = Layout(
    layout.shape[1:],
    layout.atoms[1:],
    less(layout.groups[1:]),
    less(layout.inputs),
    less(layout.outputs),
  )
  if isinstance(leaf, NarrowHeads):
    return NarrowHeads(leaf.a[i], None, None, inner, head=leaf.head - 1)
  c = None if leaf.c is None else leaf.c[i]
  order = None if leaf.order is None else Order(leaf.order.array[i])
  a = None if leaf.a is None else leaf.a[i]
  return LowRank(a, leaf.b[i], c, inner, order, leaf.left)


def _join(leaves: Sequence[Any]) -> Any:
  if not any(map(_has_layers, leaves)):
    return leaves[0]
  if not any(map(is_low_rank, leaves)):
    array = np if isinstance(leaves[0], np.ndarray) else jnp
    return array.stack(leaves)
  first = leaves[0]
  same = all(
    type(v) is type(first)
    and v.layout == first.layout
    and getattr(v, 'head', None) == getattr(first, 'head', None)
    and (v.c is None) == (first.c is None)
    and (v.order is None) == (first.order is None)
    and (v.a is None, v.left) == (first.a is None, first.left)
    for v in leaves
  )
  if not same:
    raise ValueError(
      'low-rank layers can be stacked with others that are factored over the '
      f'same axes of shape {first.shape} and all have a constant, or none, '
      'and an identity block, or none'
    )
  layout, n = first.layout, len(leaves)
  more = lambda atoms: tuple(a + 1 for a in atoms)
  outer = Layout(
    (n, *layout.shape),
    (n, *layout.atoms),
    (0, *more(layout.groups)),
    more(layout.inputs),
    more(layout.outputs),
  )
  if isinstance(first, NarrowHeads):
    narrow = [v.padded(max(w.rank for w in leaves)) for v in leaves]
    return NarrowHeads(
      jnp.stack(narrow), None, None, outer, head=first.head + 1
    )
  rank = max(v.rank for v in leaves)
  order = None
  if first.order is not None:
    order = Order(np.stack([v.order.array for v in leaves]))
  c = None if first.c is None else jnp.stack([v.c for v in leaves])
  pairs = [_at_rank(v, rank) for v in leaves]
  a, b = (
    None if factor[0] is None else jnp.stack(factor)
    for factor in zip(*pairs, strict=True)
  )
  return LowRank(a, b, c, outer, order, first.left)


def _at_rank(leaf: LowRank, rank: int) -> tuple[Any, Any]:
  """The factors of a leaf, enlarged to a rank; they are the same kernel."""
  more = rank - leaf.rank
  if not more:
    return leaf.a, leaf.b
  if leaf.order is not None:
    matrices = leaf.layout.group_shape + (-1, leaf.rank)
    a, b = widen(leaf.a.reshape(matrices), leaf.b, rank)
    return a.reshape(*leaf.a.shape[:-1], rank), b
  pad = lambda v, axis: jnp.pad(
    v, [(0, more if i == axis else 0) for i in range(v.ndim)]
  )
  a = None if leaf.a is None else pad(leaf.a, leaf.a.ndim - 1)
  return a, pad(leaf.b, len(leaf.layout.groups))

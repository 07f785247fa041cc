"""How factors are spread over a mesh, from how their kernels are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

from utilized_rank.lowrank.leaf import is_low_rank
from utilized_rank.lowrank.place import axes_of_factors
from utilized_rank.lowrank.place import even_spec
from utilized_rank.tree import paths


class _One(dict):
  """Devices along each mesh axis where no mesh is known: all divide."""

  def __missing__(self, name: str) -> int:
    return 1


def shardings(small: Any, specs: Any, mesh: Mesh | None = None) -> Any:
  """Derives the factors' specs from those of the kernels.

  Every axis of a factor is spread as the kernel's axis that it is, and the
  rank's over nothing: of P(None, 'model') A is P(None, None), B is
  P(None, 'model') and c is P('model').

  Args:
    small: parameters with `LowRank` leaves, arrays or their shapes.
    specs: the dense tree with a `PartitionSpec`, a `NamedSharding` or None for
      each leaf.
    mesh: makes `NamedSharding`s of the result, and leaves out an axis that
      does not divide among its devices. Without one specs stay specs.

  Returns:
    A tree like `small`, for `jax.device_put` and for `in_shardings`.

  Raises:
    ValueError: the two trees have different leaves, or a spec has more entries
      than its kernel has axes.

  >>> from utilized_rank.tree.layout import Layout
  >>> layout = Layout.of((4, 6), inputs=(0,), outputs=(1,))
  >>> from utilized_rank.lowrank.leaf import LowRank
  >>> w = LowRank(jnp.ones((4, 2)), jnp.ones((2, 6)), jnp.ones(6), layout)
  >>> found = shardings({'w': w}, {'w': PartitionSpec(None, 'model')})['w']
  >>> found.a, found.b, found.c
  (P(None, None), P(None, 'model'), P('model',))
  """
  named, treedef = paths.flatten(small, is_low_rank)
  given = _by_path(specs, _is_spec)
  # A leaf at two places has the path of the first, and specs at both; what is
  # None is no leaf, and may have one.
  places = set(_by_path(small, lambda v: v is None or is_low_rank(v)))
  places |= set(named)
  if lacking := sorted(set(named) - set(given)) or sorted(set(given) - places):
    here = 'parameters' if lacking[0] in named else 'specs'
    raise ValueError(
      f'{lacking[0]!r} is in the {here} alone: specs are a tree like the dense '
      'parameters, with a PartitionSpec or None for each leaf'
    )
  found = {p: _of_leaf(p, leaf, given[p], mesh) for p, leaf in named.items()}
  return paths.unflatten(treedef, found)


def _by_path(tree: Any, is_leaf: Callable[[Any], bool]) -> dict[str, Any]:
  """All leaves: equal specs may be one object, which ties nothing."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf)
  name = lambda path: jax.tree_util.keystr(path, simple=True, separator='/')
  return {name(path): leaf for path, leaf in leaves}


def _of_leaf(path: str, leaf: Any, spec: Any, mesh: Mesh | None) -> Any:
  if isinstance(spec, NamedSharding):
    spec, mesh = spec.spec, spec.mesh
  spec = PartitionSpec() if spec is None else spec
  if not isinstance(spec, PartitionSpec):
    raise ValueError(
      f'specs has a {type(spec).__name__} at {path!r}, where a PartitionSpec, '
      'a NamedSharding or None belongs'
    )
  # Functions and names among the leaves have none.
  shape = getattr(leaf, 'shape', ())
  if len(spec) > len(shape):
    raise ValueError(
      f'{path!r} has the shape {tuple(shape)} and {spec}, which is of '
      f'{len(spec)} axes'
    )
  finished = lambda s: s if mesh is None else NamedSharding(mesh, s)
  if not is_low_rank(leaf):
    return finished(spec)
  sizes = _One() if mesh is None else mesh.shape
  over = axes_of_factors(leaf, spec, sizes)

  def of(name: str, factor: Any) -> Any:
    return finished(even_spec(factor.shape, over[name], sizes))

  return leaf.opened().changed(of)


def _is_spec(node: Any) -> bool:
  return node is None or isinstance(node, (PartitionSpec, NamedSharding))

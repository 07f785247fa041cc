"""Factors where the kernel was: spread over a mesh as its axes were."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import math
from typing import Any, TypeVar

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

from utilized_rank.lowrank.leaf import LowRank
from utilized_rank.lowrank.narrow_heads import NarrowHeads
from utilized_rank.tree.layout import pieces_of

L = TypeVar('L', bound=LowRank)


def place(leaf: L, kernel: Any) -> L:
  """The leaf on the devices of the kernel that it stands for.

  Where the kernel is on a mesh, each axis of the factors is spread as it is in
  the kernel, and the rank's over nothing. An axis that no longer divides among
  its devices (the heads' narrower features, what an identity block leaves of
  the outputs) is on all of them.

  Args:
    leaf: factors on the host.
    kernel: the dense kernel.

  Returns:
    The leaf of device arrays; uncommitted ones if the kernel is on no mesh.
  """
  sharding = getattr(kernel, 'sharding', None)
  if not isinstance(sharding, NamedSharding):
    # `jnp.asarray` compiles a program for every shape.
    return jax.tree.map(jax.device_put, leaf)
  over = axes_of_factors(leaf, sharding.spec, sharding.mesh.shape)
  put = lambda array, names: _put(array, sharding.mesh, names)
  return dataclasses.replace(
    leaf,
    **{name: put(getattr(leaf, name), axes) for name, axes in over.items()},
  )


def axes_of_factors(
  leaf: LowRank, spec: Any, sizes: Mapping[str, int]
) -> dict[str, list[tuple[str, ...]]]:
  """The mesh axes that each axis of each factor is spread over.

  Args:
    leaf: the pair.
    spec: the kernel's entries: a mesh axis, several, or None for each axis.
    sizes: devices along each mesh axis.
  """
  layout = leaf.layout
  names = _names_of_atoms(leaf, spec, sizes)
  pick = lambda atoms: [names[a] for a in atoms]
  groups, inputs = pick(layout.groups), pick(layout.inputs)
  outputs = pick(layout.outputs)
  if isinstance(leaf, NarrowHeads):  # all axes are in `a`
    return {'a': groups + inputs + outputs}
  kept = outputs
  if leaf.order is not None:
    kept = [tuple(n for over in outputs for n in over)]
  return {
    'a': [*groups, *inputs, ()],
    'b': [*groups, (), *kept],
    'c': groups + outputs,
  }


def place_like(array: Any, old: Any) -> jax.Array:
  """A host array in place of another, where that one was.

  Of a narrower one, an axis that no longer divides among its devices is on all
  of them.
  """
  sharding = getattr(old, 'sharding', None)
  if not isinstance(sharding, NamedSharding):
    # Cast on the host, where no program has to be compiled for it.
    return jax.device_put(np.asarray(array).astype(old.dtype))
  if array.shape != old.shape:
    names = [_names(entry) for entry in sharding.spec]
    names += [()] * (array.ndim - len(names))
    return _put(array.astype(old.dtype), sharding.mesh, names)
  return jax.device_put(array.astype(old.dtype), sharding)


def _names_of_atoms(
  leaf: LowRank, spec: Any, sizes: Mapping[str, int]
) -> list[tuple[str, ...]]:
  """Mesh axes that each atom of the kernel is spread over.

  An axis's are the outermost of its atoms that they divide.
  """
  layout = leaf.layout
  names: list[tuple[str, ...]] = [() for _ in layout.atoms]
  per_axis = pieces_of(layout.shape, layout.atoms)
  for entry, atoms in zip(spec, per_axis):
    over = _names(entry)
    wide = [a for a in atoms if layout.atoms[a] > 1]
    if wide and layout.atoms[wide[0]] % _size(sizes, over) == 0:
      names[wide[0]] = over
  return names


def _names(entry: Any) -> tuple[str, ...]:
  if entry is None or entry is PartitionSpec.UNCONSTRAINED:
    return ()
  return (entry,) if isinstance(entry, str) else tuple(entry)


def _size(sizes: Mapping[str, int], names: tuple[str, ...]) -> int:
  return math.prod(sizes[n] for n in names)


def even_spec(
  shape: Sequence[int], names: list[tuple[str, ...]], sizes: Mapping[str, int]
) -> PartitionSpec:
  """The spec, without what does not divide an axis of the shape."""
  return PartitionSpec(
    *(
      (n[0] if len(n) == 1 else n)
      if n and size % _size(sizes, n) == 0
      else None
      for size, n in zip(shape, names, strict=True)
    )
  )


def _put(array: Any, mesh: Any, names: list[tuple[str, ...]]) -> Any:
  if array is None:
    return None
  spec = even_spec(array.shape, names, mesh.shape)
  return jax.device_put(array, NamedSharding(mesh, spec))

"""Batches of a training loop: from a step on, and on a mesh."""

from __future__ import annotations

from collections.abc import (
  Callable,
  Generator,
  Iterable,
  Sequence,
  Sized,
)
import contextlib
import dataclasses
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

from utilized_rank.collection.one_pass import check_batch
from utilized_rank.host import meshes

# Batches, gone through again and again; or the batches from a step on.
Batches = Iterable[Any] | Callable[[int], Iterable[Any]]


def stream(batches: Batches, start: int) -> Generator[Any, None, None]:
  """The batches after the first `start`, for as long as there are any.

  Args:
    batches: `batches(start)` makes them; or an iterable, which is begun anew
      where it ends, except for an iterator.
    start: how many updates there were before.

  >>> list(itertools.islice(stream([1, 2, 3], 4), 4))
  [2, 3, 1, 2]
  """
  if callable(batches):
    yield from batches(start)
    return
  first = iter(batches)
  if first is batches:
    yield from itertools.islice(first, start, None)
    return
  left = start
  if isinstance(batches, Sized) and len(batches):
    left %= len(batches)
  ended = False
  while not ended:
    ended = True
    for batch in first:
      ended = False
      if left:
        left -= 1
      else:
        yield batch
    first = iter(batches)


@dataclasses.dataclass(frozen=True)
class Placement:
  """Where arrays of a loop are.

  Attributes:
    mesh: the mesh, or None: then JAX places them.
    batch_axes: its axes over which batches are spread.
  """

  mesh: Mesh | None
  batch_axes: tuple[str, ...] = ()

  def arrays(self, tree: Any) -> Any:
    """Arrays on the mesh: where they are, if they are there, else on all."""
    if self.mesh is None:
      return tree
    everywhere = NamedSharding(self.mesh, PartitionSpec())
    devices = set(self.mesh.devices.flat)

    def put(array: Any) -> Any:
      sharding = getattr(array, 'sharding', None)
      if isinstance(sharding, NamedSharding) and sharding.device_set == devices:
        return array
      return jax.device_put(array, everywhere)

    return jax.tree.map(put, tree)

  def batch(self, batch: Any, number: int, accumulate: int) -> tuple[Any, int]:
    """A batch on the mesh, and how many examples are in it.

    Raises:
      ValueError: it is no batch, or does not divide.
    """
    examples = check_batch(batch, number)
    parts = accumulate
    if self.mesh is not None:
      parts *= math.prod(self.mesh.shape[name] for name in self.batch_axes)
    if examples % parts:
      raise ValueError(
        f'batch {number} has {examples} examples, which do not divide into '
        f'accumulate={accumulate} parts on each of {parts // accumulate} '
        'devices'
      )
    if self.mesh is None:
      return batch, examples
    sharding = NamedSharding(self.mesh, PartitionSpec(self.batch_axes))
    return jax.device_put(batch, sharding), examples

  def within(self) -> contextlib.AbstractContextManager[Any]:
    """Puts the mesh in force, if types say how arrays are spread over it."""
    if self.mesh is None or not meshes.is_explicit(self.mesh):
      return contextlib.nullcontext()
    return meshes.within(self.mesh)


ANYWHERE = Placement(None)


def placement(
  arrays: Any, mesh: Mesh | None, batch_axes: Sequence[str] | None
) -> Placement:
  """The mesh of the caller, else of the arrays, else the one in force.

  Args:
    arrays: pytree of the parameters.
    mesh: given by the caller, or None.
    batch_axes: axes that batches are spread over; default the first.

  Raises:
    ValueError: axes without a mesh, or that it does not have.
  """
  if mesh is None:
    shardings = [getattr(v, 'sharding', None) for v in jax.tree.leaves(arrays)]
    found = [
      s.mesh
      for s in shardings
      if isinstance(s, NamedSharding) and isinstance(s.mesh, Mesh)
    ]
    mesh = found[0] if found else meshes.ambient()
  if mesh is None:
    if batch_axes is not None:
      raise ValueError('batch_axes are axes of a mesh; pass mesh= as well')
    return ANYWHERE
  axes = mesh.axis_names[:1] if batch_axes is None else tuple(batch_axes)
  if unknown := sorted(set(axes) - set(mesh.axis_names)):
    raise ValueError(
      f'batch_axes has {unknown}; the mesh has {list(mesh.axis_names)}'
    )
  return Placement(mesh, axes)


def like(arrays: Any, old: Any) -> Any:
  """Host arrays where others of their shapes are."""

  def put(new: Any, there: Any) -> Any:
    if isinstance(there, np.ndarray):
      return new
    if isinstance(there.sharding, NamedSharding):
      return jax.device_put(new, there.sharding)
    return jnp.asarray(new)

  return jax.tree.map(put, arrays, old)

"""Which mesh a collection runs on, and what of it the function sees.

A function sees what it would under `jax.jit` in the same place. Where there is
a mesh, its own code may name the axes: then it runs on whole arrays of that
mesh. Where there is none it runs on every device, on a share of the batch, and
sees none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh

from utilized_rank.collection.devices import Devices
from utilized_rank.collection.devices import Sharded
from utilized_rank.collection.pmapped import Pmapped
from utilized_rank.host import meshes
from utilized_rank.walk import compat
from utilized_rank.walk import tracing


@dataclasses.dataclass(frozen=True)
class Placement:
  """Where a collection's steps run.

  Attributes:
    mesh: the devices; None for all.
    whole: steps see whole arrays that are on the mesh.
    spread: parameters are spread over it.
    in_force: the mesh that the function finds set.
    batch_axes: mesh axes of the batches, or None.
    pmap_axis: the name of the axis of `jax.pmap`, or None.
  """

  mesh: Mesh | None
  whole: bool
  spread: bool
  in_force: Mesh | None
  batch_axes: tuple[str, ...] | None
  pmap_axis: str | None

  @property
  def everywhere(self) -> bool:
    """Whether the result is that of all processes."""
    several = jax.process_count() > 1
    return several and (self.mesh is None or meshes.crosses(self.mesh))

  @property
  def is_typed(self) -> bool:
    """Whether parameters' types say how they are spread."""
    return (
      self.spread and self.mesh is not None and meshes.is_explicit(self.mesh)
    )

  def named_by(
    self, fn: Callable[..., Any], params: Any, batch: Any
  ) -> Placement:
    """The same on the mesh that the function itself names, if it names one.

    Raises:
      ValueError: the function does not accept the arguments.
    """
    if self.whole or self.pmap_axis is not None:
      return self
    traced = tracing.trace(fn, params, (batch,), {})
    named = compat.meshes_of(traced.jaxpr)
    if not named:
      return self
    mesh = named[0] if self.mesh is None else self.mesh
    in_force = mesh if meshes.is_explicit(mesh) else None
    return dataclasses.replace(self, mesh=mesh, whole=True, in_force=in_force)

  def devices(self, params: Sequence[Any]) -> Devices:
    """What runs the steps.

    Args:
      params: the parameters' arrays.

    Raises:
      ValueError: parameters or `batch_axes` do not fit.
    """
    if self.whole:
      assert self.mesh is not None
      # Axes that no parameter needs would only repeat the work of others.
      names = self.mesh.axis_names[: 1 if self.spread else None]
      told = self.spread or self.batch_axes is not None
      return Sharded(
        params,
        self.mesh,
        self.batch_axes or names,
        self.in_force,
        told or not meshes.is_explicit(self.mesh),
      )
    everyone = jax.devices() if self.mesh is None else self.mesh.devices.flat
    here = jax.process_index()
    mine = [d for d in everyone if d.process_index == here]
    if self.pmap_axis is not None:
      return Pmapped(params, mine, self.pmap_axis)
    return Devices(params, mine)


def placement(
  params: Sequence[Any],
  mesh: Mesh | None,
  batch_axes: Sequence[str] | None,
  pmap_axis: str | None,
) -> Placement:
  """Where a collection runs, by what its caller gives and has in force.

  Args:
    params: the parameters' arrays.
    mesh: as for `collect`, and the others too.

  Raises:
    ValueError: parameters are spread over several meshes, or `batch_axes`
      are of none.
  """
  axes = None if batch_axes is None else tuple(batch_axes)
  if pmap_axis is not None:
    if mesh is None and axes is not None:
      raise ValueError('batch_axes are axes of a mesh; pass mesh= as well')
    return Placement(mesh, False, False, None, axes, pmap_axis)
  around = _joint(meshes.ambient())
  found = mesh or _mesh_of(params) or around
  if found is None:
    if axes is not None:
      raise ValueError('batch_axes are axes of a mesh; pass mesh= as well')
    return Placement(None, False, False, None, None, None)
  spread = any(_is_spread(v, found) for v in params)
  whole = spread or axes is not None or around is not None
  is_set = mesh is not None or around is not None or meshes.is_explicit(found)
  return Placement(found, whole, spread, found if is_set else None, axes, None)


def _is_spread(array: Any, mesh: Mesh) -> bool:
  return (
    isinstance(array, jax.Array)
    and array.sharding.device_set == set(mesh.devices.flat)
    and not array.is_fully_replicated
  )


def _joint(mesh: Mesh | None) -> Mesh | None:
  """The mesh, unless it is this process's own and there are others, whose
  examples count too."""
  if mesh is None or jax.process_count() == 1 or meshes.crosses(mesh):
    return mesh
  return None


def _mesh_of(params: Sequence[Any]) -> Mesh | None:
  """The mesh that parameters are spread over, or None.

  Raises:
    ValueError: there are several.
  """
  found: dict[Mesh, Any] = {}
  for v in params:
    if not isinstance(v, jax.Array) or v.is_fully_replicated:
      continue
    mesh = getattr(v.sharding, 'mesh', None)
    if isinstance(mesh, Mesh):
      found.setdefault(mesh, v.sharding)
  if len(found) > 1:
    raise ValueError(
      'parameters are spread over several meshes, '
      f'{[str(s) for s in found.values()]}; put them on one, or pass the one '
      'to use as mesh='
    )
  return _joint(next(iter(found), None))

"""The mesh that the caller's code runs under, and code that must not see it.

Three things are called so in JAX: the mesh of `jax.set_mesh`, which is in force
for every program and every device that one may use; the mesh of `with mesh:`,
which only gives bare partition specs their devices; and the mesh of a
`jax.shard_map`, which the code inside it sees.
"""

from __future__ import annotations

import contextlib
from typing import Any

import jax
from jax.sharding import AbstractMesh
from jax.sharding import AxisType
from jax.sharding import Mesh


def ambient() -> Mesh | None:
  """The mesh of `jax.set_mesh`, or None."""
  mesh = jax.sharding.get_mesh()
  return None if mesh.empty else mesh


def within(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
  """Puts a mesh in force, or none, unless it is in force already."""
  if mesh == ambient():
    return contextlib.nullcontext()
  return jax.set_mesh(mesh)


def unseen() -> contextlib.AbstractContextManager[Any]:
  """Code that is traced inside sees no mesh, as if nobody had made one."""
  return jax.sharding.use_abstract_mesh(AbstractMesh((), ()))


def crosses(mesh: Mesh) -> bool:
  """Whether a mesh has devices of several processes."""
  return len({d.process_index for d in mesh.devices.flat}) > 1


def is_explicit(mesh: Any) -> bool:
  """Whether types say how arrays are spread over some of the mesh's axes."""
  return AxisType.Explicit in mesh.axis_types

"""Where a step of a collection runs, and where its running sums are.

A step adds what one device sees of one batch to that device's sums. Each class
here is one way to run it on many devices; in all of them the sums have a
leading axis with one part per device (or group of devices), and nothing is
added over that axis before the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
import functools
import math
from typing import Any
import zlib

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

from utilized_rank.host import meshes
from utilized_rank.host import processes
from utilized_rank.moments.moments import Moments
from utilized_rank.moments.moments import Sums
from utilized_rank.moments.sites import Sites

EXAMPLES = 'examples'
# `measure(params, (batch, mask)) -> Moments`; a step is `(state, params, batch)
# -> (state, whether each sum is finite, the most rows)`; a state is a pytree of
# sums.
Measure = Callable[[Any, Any], Any]


class Devices:
  """Every device holds all parameters and takes its share of a batch.

  The devices are this process's own: processes work at their own pace. The
  function sees no mesh: it runs on one device, as it is.
  """

  def __init__(self, params: Sequence[Any], devices: Sequence[Any]):
    self.devices = list(devices)
    self.parts = len(self.devices)
    self.mesh = Mesh(np.array(self.devices), (EXAMPLES,))
    self.placement = NamedSharding(self.mesh, PartitionSpec(EXAMPLES))
    everywhere = NamedSharding(self.mesh, PartitionSpec())
    self.params = [jax.device_put(local_copy(v), everywhere) for v in params]

  def key(self) -> Any:
    """What its steps depend on, beside what they sum."""
    return type(self), self.mesh

  @property
  def shares(self) -> int:
    """What the number of examples must divide by to be spread evenly."""
    return self.parts

  @property
  def over(self) -> tuple[Mesh, tuple[str, ...]] | None:
    """Mesh axes over which a step itself sees whole arrays, or None."""
    return None

  def within(self) -> AbstractContextManager[Any]:
    """What must be in force while anything here runs."""
    return meshes.within(None)

  def split(self, batch: Any) -> list[tuple[Any, bool]]:
    """Parts of a batch on the devices, and whether each sees all of a part.

    Examples that do not divide evenly among the devices are the second part.
    """
    size = jax.tree.leaves(batch)[0].shape[0]
    even = size - size % self.parts
    put = lambda spec, cut: jax.device_put(
      jax.tree.map(lambda a: a[cut], batch), NamedSharding(self.mesh, spec)
    )
    out = []
    if even:
      out.append((put(PartitionSpec(EXAMPLES), slice(even)), False))
    if even < size:
      out.append((put(PartitionSpec(), slice(even, None)), True))
    return out

  def run(self, measure: Measure, accumulate: Any, whole: bool) -> Any:
    """The step on all devices; what all of them see, the first one counts."""

    def local(state, params, batch):
      with meshes.unseen():  # these axes are no names of the function's
        new = measure(params, batch)
      if whole:
        first = jax.lax.axis_index(EXAMPLES) == 0
        new = jax.tree.map(
          lambda a: jnp.where(first, a, jnp.zeros_like(a)), new
        )
      # The new sums get the parts' axis. Taken off the state instead, XLA would
      # not add in place: every batch, it would copy all sums once more.
      new = jax.tree.map(lambda a: a[None], new)
      return jax.vmap(accumulate)(state, new)

    spread = PartitionSpec(EXAMPLES)
    seen = PartitionSpec() if whole else spread
    return jax.jit(
      jax.shard_map(
        local,
        mesh=self.mesh,
        in_specs=(spread, PartitionSpec(), seen),
        out_specs=spread,
        check_vma=False,
      ),
      donate_argnums=0,
    )

  def shapes(self, fn: Callable[..., Any], batch: Any) -> Any:
    """Types of `fn(params, batch)` on one device."""
    return jax.eval_shape(fn, self.params, batch)

  def sites(self, find: Callable[..., Sites], batch: Any) -> Sites:
    """What `find(params, batch)` finds where the step runs."""
    found = []
    self.shapes(lambda *args: found.append(find(*args)), batch)
    return found[-1]

  def states(self, shapes: Any) -> Any:
    """Types of running sums, of the types that one device adds."""
    return jax.tree.map(
      lambda s: jax.ShapeDtypeStruct(
        (self.parts, *s.shape), s.dtype, sharding=self.placement
      ),
      shapes,
    )

  def zeros(self, shapes: Any) -> Any:
    leaves, treedef = jax.tree.flatten(self.states(shapes))
    types = tuple((s.shape, s.dtype) for s in leaves)
    return jax.tree.unflatten(treedef, _zeros(types, self.placement)())

  def put(self, state: Any) -> Any:
    """Running sums from the host."""
    return jax.device_put(state, self.placement)

  def wide(self, state: Any) -> Any:
    """This process's sums on the host, in float64 and int64."""
    return jax.tree.map(_wide_sum, state)

  def total(self, state: Any, host: Any, everywhere: bool) -> Any:
    """All devices' sums as host arrays; with `everywhere`, all processes'."""
    if everywhere:
      told = processes.exchange([_fingerprint(state), host is not None])
      if len(set(told[:, 0].tolist())) > 1:
        raise ValueError(
          'the processes collect different kernels; give all of them one '
          'function, parameters of the same shapes, one selection and loss'
        )
      if told[:, 1].any():
        mine = self.wide(state)
        if host is not None:
          mine = jax.tree.map(np.add, mine, host)
        mine = jax.tree.map(lambda a: a[None], mine)
        return processes.add_over_processes(mine, self.devices[:1])
      return processes.add_over_processes(state, self.devices)
    if host is not None:
      return jax.tree.map(np.add, self.wide(state), host)
    if self.parts == 1:  # nothing to add up, and no program to compile for it
      return jax.tree.map(lambda a: np.asarray(a)[0, ...], state)
    return processes.decoded(self.reducer(state)(state), state)

  def reducer(self, state: Any) -> Any:
    specs = jax.tree.map(lambda _: PartitionSpec(EXAMPLES), state)
    return processes.reducer(self.mesh, specs, (EXAMPLES,))


class Sharded(Devices):
  """Parameters as they are on the caller's mesh.

  The function sees whole arrays, and JAX decides what its devices exchange.
  The batch is spread over some of the mesh's axes; each share of it has sums
  of its own, which stay where it is.
  """

  def __init__(
    self,
    params: Sequence[Any],
    mesh: Mesh,
    names: Sequence[str],
    in_force: Mesh | None = None,
    spreads: bool = True,
  ):
    """As the class says.

    Args:
      params: parameters; those that are not on the mesh are put there.
      mesh: the mesh.
      names: its axes that batches are spread over.
      in_force: the mesh that the function finds set; None finds none.
      spreads: whether batches that are on one device are spread.
    """
    unknown = [n for n in names if n not in mesh.axis_names]
    if unknown or not names:
      raise ValueError(
        f'batch_axes {tuple(names)} must be axes of the mesh, which has '
        f'{mesh.axis_names}'
      )
    self.mesh = mesh
    self.in_force = in_force
    self.spreads = spreads
    self.names = tuple(names)
    self.parts = math.prod(mesh.shape[n] for n in names)
    self.placement = NamedSharding(mesh, PartitionSpec(self.names))
    everywhere = NamedSharding(mesh, PartitionSpec())
    on_mesh = lambda v: (
      isinstance(v, jax.Array)
      and v.sharding.device_set == set(mesh.devices.flat)
    )
    self.params = [
      v if on_mesh(v) else jax.device_put(v, everywhere) for v in params
    ]

  def key(self) -> Any:
    return *super().key(), self.names, self.in_force, self.spreads

  @property
  def over(self) -> tuple[Mesh, tuple[str, ...]]:
    return self.mesh, self.names

  def within(self) -> AbstractContextManager[Any]:
    return meshes.within(self.in_force)

  def split(self, batch: Any) -> list[tuple[Any, bool]]:
    size = jax.tree.leaves(batch)[0].shape[0]
    return [(jax.tree.map(lambda a: self._put(a, size), batch), False)]

  def _put(self, array: Any, size: int) -> jax.Array:
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
      return array
    if meshes.crosses(self.mesh):
      return jax.make_array_from_process_local_data(
        self.placement, np.asarray(array)
      )
    if meshes.is_explicit(self.mesh) and self._has(array):
      return array  # how it is spread is part of its type
    even = self.spreads and size % self.parts == 0
    spec = PartitionSpec(self.names) if even else PartitionSpec()
    return jax.device_put(array, NamedSharding(self.mesh, spec))

  def _has(self, array: Any) -> bool:
    """Whether an array is spread over this mesh."""
    if not isinstance(array, jax.Array) or array.is_fully_replicated:
      return False
    return getattr(array.sharding, 'mesh', None) == self.mesh

  def run(self, measure: Measure, accumulate: Any, whole: bool) -> Any:
    assert not whole
    # What is made here outlives this object, and the parameters that it has.
    mesh, names = self.mesh, self.names

    def add(state, new):
      new = _parts_first(new)
      state, finite, most = jax.vmap(accumulate)(state, new)
      # A few numbers; the function's own steps are joint ones anyway.
      return state, finite.all(0)[None], most.max()[None]

    def step(state, params, batch):
      join = add
      if meshes.is_explicit(mesh):
        kept = jax.tree.map(lambda _: PartitionSpec(names), state)
        outs = kept, PartitionSpec(), PartitionSpec()
        join = jax.sharding.auto_axes(add, out_sharding=outs)
      return join(state, measure(params, batch))

    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.jit(
      step,
      donate_argnums=0,
      out_shardings=(self.placement, everywhere, everywhere),
    )

  def shapes(self, fn: Callable[..., Any], batch: Any) -> Any:
    batch = self.split(batch)[0][0]
    shapes = jax.eval_shape(fn, self.params, batch)
    if not isinstance(shapes, Moments):
      return shapes
    shapes = jax.eval_shape(_parts_first, _bare(shapes))
    return jax.tree.map(
      lambda s: jax.ShapeDtypeStruct(s.shape[1:], s.dtype), shapes
    )

  def wide(self, state: Any) -> Any:
    if all(a.is_fully_addressable for a in jax.tree.leaves(state)):
      return super().wide(state)
    total = processes.decoded(self.reducer(state)(state), state)
    return jax.tree.map(lambda a: _wide_sum(a[None]), total)

  def total(self, state: Any, host: Any, everywhere: bool) -> Any:
    del everywhere  # the mesh's own processes have all of it
    if host is not None:
      return jax.tree.map(np.add, self.wide(state), host)
    return processes.decoded(self.reducer(state)(state), state)

  def reducer(self, state: Any) -> Any:
    specs = jax.tree.map(lambda _: PartitionSpec(self.names), state)
    return processes.reducer(self.mesh, specs, self.names)


def _parts_first(moments: Moments) -> Moments:
  """The parts' axis, which is in front of the features, in front of all."""
  front = lambda a, features: jnp.moveaxis(a, a.ndim - 1 - features, 0)
  panels = lambda second: jax.tree.map(lambda a: front(a, 2), second)
  sums = tuple(
    Sums(front(s.count, 0), front(s.total, 1), panels(s.panels))
    for s in moments.sums
  )
  grads = moments.grads and tuple(map(panels, moments.grads))
  rows = moments.row_grads and tuple(front(g, 1) for g in moments.row_grads)
  coupled = moments.coupled and jax.tree.map(
    lambda a: front(a, 2), moments.coupled
  )
  return Moments(
    moments.table, sums, grads, moments.examples, rows, coupled=coupled
  )


@functools.lru_cache(maxsize=64)
def _zeros(types: Any, placement: NamedSharding) -> Callable[[], list[Any]]:
  """Makes zeros; in one program, as single arrays take longer to compile than
  to run."""
  make = lambda: [jnp.zeros(shape, dtype) for shape, dtype in types]
  return jax.jit(make, out_shardings=placement)


def _bare(shapes: Any) -> Any:
  return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype), shapes)


def local_copy(array: Any) -> Any:
  """A parameter as this process alone has it.

  Raises:
    ValueError: it is spread over processes.
  """
  if not isinstance(array, jax.Array) or array.is_fully_addressable:
    return array
  if not array.is_fully_replicated:
    raise ValueError(
      f'a parameter of shape {array.shape} is spread over processes '
      f'({array.sharding}); pass its mesh as mesh='
    )
  return array.addressable_data(0)


def _fingerprint(state: Any) -> int:
  """A number that is the same for sums of the same kernels and shapes."""
  leaves, treedef = jax.tree.flatten(state)
  shapes = [(a.shape[1:], str(a.dtype)) for a in leaves]
  return zlib.crc32(f'{treedef} {shapes}'.encode())


def _wide_sum(array: Any) -> np.ndarray:
  is_count = np.issubdtype(array.dtype, np.integer)
  dtype = np.int64 if is_count else np.float64
  return np.asarray(array).sum(0, dtype=dtype)

"""Where a step of a collection runs, and where its running sums are.

A step adds what one device sees of one batch to that device's sums. Each class
here is one way to run it on many devices; in all of them the sums have a
leading axis with one part per device (or group of devices), and nothing is
added over that axis before the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
import zlib

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

from utilized_rank import processes
from utilized_rank.sites import Sites

_AXIS = 'examples'
Step = Callable[[Any, Any, Any], tuple[Any, Any, Any]]


class Devices:
  """Every device holds all parameters and takes its share of a batch.

  The devices are this process's own: processes work at their own pace.
  """

  def __init__(self, params: Sequence[Any], devices: Sequence[Any]):
    self.devices = list(devices)
    self.parts = len(self.devices)
    self.mesh = Mesh(np.array(self.devices), (_AXIS,))
    self.placement = NamedSharding(self.mesh, PartitionSpec(_AXIS))
    everywhere = NamedSharding(self.mesh, PartitionSpec())
    self.params = [jax.device_put(local_copy(v), everywhere) for v in params]

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
      out.append((put(PartitionSpec(_AXIS), slice(even)), False))
    if even < size:
      out.append((put(PartitionSpec(), slice(even, None)), True))
    return out

  def run(self, step: Step, whole: bool) -> Step:
    """The step on all devices; what all of them see, the first one counts."""

    def local(state, params, batch):
      state = jax.tree.map(lambda a: a[0], state)
      new, finite, most = step(state, params, batch)
      if whole:
        first = jax.lax.axis_index(_AXIS) == 0
        new = jax.tree.map(lambda a, b: jnp.where(first, a, b), new, state)
      return jax.tree.map(lambda a: a[None], (new, finite, most))

    spread = PartitionSpec(_AXIS)
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

  def zeros(self, shapes: Any) -> Any:
    return jax.tree.map(
      lambda s: jax.device_put(
        jnp.zeros((self.parts, *s.shape), s.dtype), self.placement
      ),
      shapes,
    )

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
    return processes.decoded(self.reducer(state)(state), state)

  def reducer(self, state: Any) -> Any:
    specs = jax.tree.map(lambda _: PartitionSpec(_AXIS), state)
    return processes.reducer(self.mesh, specs, (_AXIS,))


class Pmapped(Devices):
  """As code that is built on `jax.pmap` has it: parameters and batches with a
  leading device axis, and a named axis that the function may refer to."""

  def __init__(self, params: Sequence[Any], devices: Sequence[Any], axis: str):
    self.devices = list(devices)
    self.parts = len(self.devices)
    self.axis = axis
    self.mesh = Mesh(np.array(self.devices), (_AXIS,))
    self.placement = NamedSharding(self.mesh, PartitionSpec(_AXIS))
    for v in params:
      if np.shape(v)[:1] != (self.parts,):
        raise ValueError(
          f'with pmap_axis every parameter leads with an axis of the '
          f'{self.parts} devices, as flax.jax_utils.replicate makes it; got '
          f'a parameter of shape {np.shape(v)}'
        )
    self.params = [jax.device_put(v, self.placement) for v in params]

  def split(self, batch: Any) -> list[tuple[Any, bool]]:
    self._check(batch)
    return [(jax.device_put(batch, self.placement), False)]

  def _check(self, batch: Any) -> None:
    sizes = {np.shape(a)[:1] for a in jax.tree.leaves(batch)}
    if sizes != {(self.parts,)}:
      raise ValueError(
        f'with pmap_axis every array of a batch leads with an axis of the '
        f'{self.parts} devices, got leading axes {sorted(sizes)}'
      )

  def run(self, step: Step, whole: bool) -> Step:
    assert not whole
    return jax.pmap(
      step, axis_name=self.axis, devices=self.devices, donate_argnums=0
    )

  def shapes(self, fn: Callable[..., Any], batch: Any) -> Any:
    self._check(batch)
    mapped = jax.pmap(fn, axis_name=self.axis, devices=self.devices)
    shapes = jax.eval_shape(mapped, self.params, batch)
    return jax.tree.map(
      lambda s: jax.ShapeDtypeStruct(s.shape[1:], s.dtype), shapes
    )


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

"""A step on devices as code that is built on `jax.pmap` has it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

from utilized_rank.collection.devices import EXAMPLES
from utilized_rank.collection.devices import Devices
from utilized_rank.collection.devices import Measure


class Pmapped(Devices):
  """As code that is built on `jax.pmap` has it: parameters and batches with a
  leading device axis, and a named axis that the function may refer to."""

  def __init__(self, params: Sequence[Any], devices: Sequence[Any], axis: str):
    self.devices = list(devices)
    self.parts = len(self.devices)
    self.axis = axis
    self.mesh = Mesh(np.array(self.devices), (EXAMPLES,))
    self.placement = NamedSharding(self.mesh, PartitionSpec(EXAMPLES))
    for v in params:
      if np.shape(v)[:1] != (self.parts,):
        raise ValueError(
          f'with pmap_axis every parameter leads with an axis of the '
          f'{self.parts} devices, as flax.jax_utils.replicate makes it; got '
          f'a parameter of shape {np.shape(v)}'
        )
    self.params = [jax.device_put(v, self.placement) for v in params]

  def key(self) -> Any:
    return *super().key(), self.axis

  @property
  def shares(self) -> int:
    return 1

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

  def run(self, measure: Measure, accumulate: Any, whole: bool) -> Any:
    assert not whole
    mapped = jax.pmap(measure, axis_name=self.axis, devices=self.devices)
    # Added outside of pmap, which takes the devices' axis off its arguments.
    return jax.jit(
      lambda state, *args: jax.vmap(accumulate)(state, mapped(*args)),
      donate_argnums=0,
    )

  def shapes(self, fn: Callable[..., Any], batch: Any) -> Any:
    self._check(batch)
    mapped = jax.pmap(fn, axis_name=self.axis, devices=self.devices)
    shapes = jax.eval_shape(mapped, self.params, batch)
    return jax.tree.map(
      lambda s: jax.ShapeDtypeStruct(s.shape[1:], s.dtype), shapes
    )

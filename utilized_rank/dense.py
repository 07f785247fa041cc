"""A leaf that stands for itself while its function is walked."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from utilized_rank import compat
from utilized_rank.layout import View


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dense:
  """A leaf that stands for itself: the array, laid out as its view says."""

  array: Any

  def relayout(self, eqn: Any, view: View) -> Dense:
    del view
    return Dense(compat.bind(eqn, [self.array])[0])

  def index(self, cut: View, axis: int, at: Any) -> Dense:
    n = cut.sizes[axis + 1]
    if isinstance(at, int):
      return Dense(
        jax.lax.slice_in_dim(self.array, at * n, at * n + n, axis=axis)
      )
    return Dense(jax.lax.dynamic_slice_in_dim(self.array, at, n, axis))

  def squeeze(self, axis: int) -> Dense:
    return Dense(jax.lax.squeeze(self.array, (axis,)))

  def shard(self, cut: View, spec: Any, parts: dict[int, Any]):
    del cut, parts
    return self.array, spec, Dense

  def unstack(self, view: View):
    del view
    return self.array, Dense

  def materialise(self, view: View) -> Any:
    del view
    return self.array

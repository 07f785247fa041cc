"""Records what a framework's own layers are given, wherever they are called."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import numpy as np

from frameworks.case import patches


class Taps:
  """Values by path, in float64; also from inside `vmap`, `scan` and `jit`."""

  def __init__(self):
    self._seen: dict[str, list[np.ndarray]] = {}

  def __call__(self, path: str, x: Any) -> None:
    seen = self._seen.setdefault(path, [])
    jax.debug.callback(lambda x: seen.append(np.asarray(x, np.float64)), x)

  def values(self) -> Mapping[str, list[np.ndarray]]:
    jax.effects_barrier()
    return self._seen


class _Tapped(eqx.Module):
  layer: Any
  tap: Callable[[Any], None] = eqx.field(static=True)

  def __call__(self, x, *args, **kwargs):
    self.tap(x)
    return self.layer(x, *args, **kwargs)


def _is_layer(node: Any) -> bool:
  return isinstance(node, (eqx.nn.Linear, eqx.nn.Conv))


def equinox_inputs(model: Any, run: Callable[[Any], Any]) -> dict[str, Any]:
  """(rows, d) of every linear layer and convolution without padding.

  Args:
    model: of Equinox.
    run: calls such a model, its layers with one example each.
  """
  taps, layers = Taps(), {}

  def tapped(keys, node):
    if not _is_layer(node):
      return node
    path = jax.tree_util.keystr(keys, simple=True, separator='/') + '/weight'
    layers[path] = node
    return _Tapped(node, lambda x: taps(path, x))

  run(jax.tree_util.tree_map_with_path(tapped, model, is_leaf=_is_layer))
  inputs = {}
  for path, seen in taps.values().items():
    layer, x = layers[path], np.stack(seen)
    if isinstance(layer, eqx.nn.Linear):
      inputs[path] = x.reshape(-1, x.shape[-1])
    else:
      inputs[path] = patches(
        np.moveaxis(x, 1, -1), layer.kernel_size, layer.stride,
        ((0, 0), (0, 0)), channels_first=True,
      )  # fmt: skip
  return inputs

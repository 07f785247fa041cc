"""One model of one framework, with its own account of what its kernels read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
  """A model, and what must be found in it.

  Attributes:
    fn: `fn(params, batch)`, the framework's usual call.
    params: parameters, in the framework's own container.
    batch: what the model takes.
    kernels: leaf path to the shape of its matrices, (*groups, d, m).
    inputs: makes path to the kernel's inputs, (*groups, rows, d), by the
      framework's means alone; features in the kernel's own axis order.
    unseen: path to a part of the reason why a leaf that looks like a kernel
      is none.
  """

  fn: Callable[[Any, Any], Any]
  params: Any
  batch: Any
  kernels: Mapping[str, tuple[int, ...]]
  inputs: Callable[[], Mapping[str, np.ndarray]]
  unseen: Mapping[str, str] = dataclasses.field(default_factory=dict)


def normal(*shape: int) -> jax.Array:
  """The same numbers for the same shape; `jax.random` takes long to compile."""
  noise = np.random.default_rng(sum(shape)).normal(size=shape)
  return jnp.asarray(noise, jnp.float32)


def tokens() -> jax.Array:
  """Four sentences of seven words, out of eleven."""
  return jnp.asarray(np.random.default_rng(0).integers(0, 11, (4, 7)))


def filled(shapes: Any) -> Any:
  """Parameters for the shapes of them; biases and scales are not trivial."""

  def fill(keys, leaf):
    if not isinstance(leaf, jax.ShapeDtypeStruct):
      return leaf
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      return jax.random.key(0)
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
      return jnp.zeros(leaf.shape, leaf.dtype)
    name = jax.tree_util.keystr(keys)
    around = 1.0 if 'scale' in name or 'var' in name else 0.0
    return around + 0.3 * normal(*leaf.shape)

  return jax.tree_util.tree_map_with_path(fill, shapes)


def rows(x: Any, features: int) -> np.ndarray:
  """(rows, features) from inputs whose trailing axes are the features."""
  return np.asarray(x, np.float64).reshape(-1, features)


def same_padding(
  size: Sequence[int], kernel: Sequence[int], strides: Sequence[int]
) -> list[tuple[int, int]]:
  pads = []
  for n, k, s in zip(size, kernel, strides, strict=True):
    total = max((-(-n // s) - 1) * s + k - n, 0)
    pads.append((total // 2, total - total // 2))
  return pads


def patches(
  x: Any,
  kernel: Sequence[int],
  strides: Sequence[int] = (1, 1),
  pads: Sequence[tuple[int, int]] | None = None,
  channels_first: bool = False,
) -> np.ndarray:
  """The patches (rows, d) of NHWC images that a convolution multiplies.

  Args:
    x: images (B, H, W, C).
    kernel: height and width.
    strides: steps.
    pads: zeros before and after each side; default those of 'SAME'.
    channels_first: features in (c, h, w) order, else in (h, w, c) order.
  """
  x = np.asarray(x, np.float64)
  if pads is None:
    pads = same_padding(x.shape[1:3], kernel, strides)
  x = np.pad(x, [(0, 0), *pads, (0, 0)])
  found = []
  for i in range(0, x.shape[1] - kernel[0] + 1, strides[0]):
    for j in range(0, x.shape[2] - kernel[1] + 1, strides[1]):
      patch = x[:, i : i + kernel[0], j : j + kernel[1]]
      if channels_first:
        patch = patch.transpose(0, 3, 1, 2)
      found.append(patch.reshape(len(x), -1))
  return np.concatenate(found)

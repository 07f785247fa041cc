"""Stock layers in place of pairs of factors, for code that knows no others."""

from __future__ import annotations

from collections.abc import Mapping
import sys
from typing import Any

import jax
import jax.numpy as jnp

from utilized_rank.lowrank.leaf import LowRank
from utilized_rank.lowrank.leaf import is_low_rank
from utilized_rank.lowrank.leaf import with_left
from utilized_rank.lowrank.leaf import write_out
from utilized_rank.lowrank.narrow_heads import NarrowHeads
from utilized_rank.tree import paths

_HOW = 'merge multiplies it out, and ur.low_rank runs it as it is'


def two_layers(small: Any) -> Any:
  """Two stock layers in place of each one whose kernel is a pair.

  An `nnx.Linear` becomes an `nnx.Sequential` of two, an `eqx.nn.Linear` an
  `eqx.nn.Sequential`: the module runs as it is, without this library. In a
  tree of dictionaries (Linen, Haiku by its layers' names) a layer's entry
  becomes `Dense_0` and `Dense_1`, or of a convolution `Conv_0` and `Conv_1`,
  each with the kernel that a stock layer has. Kernels that are dense stay, and
  a constant that the pair has becomes the second layer's bias.

  Args:
    small: parameters or a module with `LowRank` leaves.

  Returns:
    The tree or module, of arrays alone.

  Raises:
    ValueError: a pair that is no kernel of such a layer, or narrower heads
      (`compress(heads=False)` makes none); names the leaf.

  >>> from utilized_rank.tree.layout import Layout
  >>> layout = Layout.of((4, 3), inputs=(0,), outputs=(1,))
  >>> w = LowRank(jnp.ones((4, 1)), jnp.ones((1, 3)), None, layout)
  >>> head = two_layers({'head': {'kernel': w, 'bias': jnp.zeros(3)}})['head']
  >>> {name: list(layer) for name, layer in head.items()}
  {'Dense_0': ['kernel'], 'Dense_1': ['kernel', 'bias']}
  """
  named, treedef = paths.flatten(write_out(small), is_low_rank)
  whole = paths.unflatten(treedef, with_left(named))
  result = jax.tree.map(_in_place, whole, is_leaf=_is_layer)
  for path, leaf in paths.flatten(result, is_low_rank)[0].items():
    if is_low_rank(leaf):
      kind = 'narrower heads' if isinstance(leaf, NarrowHeads) else 'a pair'
      raise ValueError(
        f'{path!r} is {kind} of the shape {leaf.shape} and no kernel of a '
        f'stock dense layer or convolution: {_HOW}'
      )
  return result


def _modules(name: str) -> Any:
  """The types that a node may be of, as far as they were imported."""
  flax, equinox = sys.modules.get('flax.nnx'), sys.modules.get('equinox')
  found = {
    'nnx': getattr(flax, 'Linear', ()),
    'equinox': getattr(getattr(equinox, 'nn', None), 'Linear', ()),
  }
  return found[name]


def _is_layer(node: Any) -> bool:
  return is_low_rank(_kernel_of(node)) or is_low_rank(node)


def _kernel_of(node: Any) -> Any:
  if isinstance(node, Mapping):
    return node.get('kernel')
  if isinstance(node, _modules('nnx')):
    return node.kernel
  return node.weight if isinstance(node, _modules('equinox')) else None


def _in_place(node: Any) -> Any:
  kernel = _kernel_of(node)
  if not is_low_rank(kernel) or isinstance(kernel, NarrowHeads):
    return node
  kernel = kernel.opened()
  if isinstance(node, Mapping):
    return _entries(node, kernel)
  if isinstance(node, _modules('nnx')):
    return _nnx(node, kernel)
  return _equinox(node, kernel)


def _entries(node: Mapping[str, Any], kernel: LowRank) -> Any:
  layout = kernel.layout
  if layout.atoms != layout.shape or set(node) - {'kernel', 'bias'}:
    return node
  first, second = {'kernel': kernel.a}, {'kernel': kernel.b}
  if 'bias' in node:
    second['bias'] = node['bias']
  elif kernel.c is not None:
    second['bias'] = kernel.c
  name = 'Dense'
  if len(layout.shape) == 4 and layout.inputs == (0, 1, 2):
    name = 'Conv'
    second['kernel'] = kernel.b[None, None]
  return {f'{name}_0': first, f'{name}_1': second}


def _nnx(node: Any, kernel: LowRank) -> Any:
  nnx = sys.modules['flax.nnx']
  first = _like(nnx, node, kernel.a, None)
  bias = node.bias
  if kernel.c is not None:
    bias = nnx.Param(kernel.c)
  return nnx.Sequential(first, _like(nnx, node, kernel.b, bias))


def _like(nnx: Any, node: Any, kernel: Any, bias: Any) -> Any:
  """A stock layer with this kernel, its other options those of the node."""
  layer = nnx.Linear(
    *kernel.shape,
    use_bias=bias is not None,
    dtype=node.dtype,
    param_dtype=kernel.dtype,
    precision=node.precision,
    # Filled in below; nothing is drawn.
    kernel_init=lambda key, shape, dtype: jnp.zeros(shape, dtype),
    rngs=nnx.Rngs(0),
  )
  layer.kernel[...] = kernel
  if bias is not None:
    layer.bias[...] = bias[...]
  return layer


def _equinox(node: Any, kernel: LowRank) -> Any:
  equinox = sys.modules['equinox']
  # Equinox stores weights as (outputs, inputs), factors in the kernel's order.
  if kernel.layout.inputs != (1,):
    return node
  bias = node.bias if kernel.c is None else kernel.c
  make = lambda d, m, use_bias: equinox.nn.Linear(
    d, m, use_bias=use_bias, dtype=kernel.dtype, key=jax.random.key(0)
  )
  d, m = node.in_features, node.out_features
  first, second = (
    make(d, kernel.rank, False),
    make(kernel.rank, m, bias is not None),
  )
  put = lambda layer, weight: equinox.tree_at(lambda v: v.weight, layer, weight)
  first, second = put(first, kernel.a.T), put(second, kernel.b.T)
  if bias is not None:
    second = equinox.tree_at(lambda v: v.bias, second, bias)
  return equinox.nn.Sequential([first, second])

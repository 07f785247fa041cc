"""Low-rank leaves among what `jax.export` and `flax.serialization` write.

Both know the nodes of a tree by their type. A function of a tree with such
leaves can be exported and serialized; `flax.serialization.to_bytes` and
`from_bytes` take the tree. What decides the function travels with the factors:
how the kernel is read as matrices, and the order of an identity block.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import functools
import importlib.abc
import importlib.util
import json
import sys
from typing import Any

from jax import export
import numpy as np

from utilized_rank.lowrank.leaf import LowRank
from utilized_rank.lowrank.narrow_heads import NarrowHeads
from utilized_rank.products.gauge import Order
from utilized_rank.tree.layout import Layout

_FLAX = 'flax.serialization'
_LAYOUT = [f.name for f in dataclasses.fields(Layout)]
_KINDS: list[type[LowRank]] = [LowRank, NarrowHeads]


def _layout_of(fields: dict[str, Any]) -> Layout:
  return Layout(*(tuple(map(int, fields[n])) for n in _LAYOUT))


# --- jax.export: what is static, as bytes ---


def _static_to_bytes(static: tuple[Any, ...]) -> bytes:
  layout, *rest, box = static
  if box is not None:
    raise ValueError(
      'a low-rank leaf of an NNX module is written by jax.export as part of a '
      'tree of arrays: give the exported function nnx.to_pure_dict of the '
      "module's state"
    )
  rest = [v.array.tolist() if isinstance(v, Order) else v for v in rest]
  return json.dumps([dataclasses.asdict(layout), *rest]).encode()


def _static_of(data: Any) -> tuple[Any, ...]:
  layout, *rest = json.loads(bytes(data))
  rest = [Order(v) if isinstance(v, list) else v for v in rest]
  return (_layout_of(layout), *rest, None)


def _register_export() -> None:
  for kind in _KINDS:
    export.register_pytree_node_serialization(
      kind,
      serialized_name=f'utilized_rank.{kind.__name__}',
      serialize_auxdata=_static_to_bytes,
      deserialize_auxdata=_static_of,
    )


# --- flax.serialization: everything, as a dict of arrays ---


def _to_state(leaf: LowRank) -> dict[str, Any]:
  state = {n: getattr(leaf, n) for n in 'abc'}
  state['layout'] = {
    n: np.asarray(getattr(leaf.layout, n), np.int32) for n in _LAYOUT
  }
  if leaf.order is not None:
    state['order'] = leaf.order.array
  if leaf.left is not None:
    state['left'] = leaf.left
  if isinstance(leaf, NarrowHeads):
    state['head'] = leaf.head
  return state


def _from_state(target: LowRank, state: dict[str, Any]) -> LowRank:
  """The leaf that the state is; the target says which kernel it is of.

  Raises:
    ValueError: it is of another kind, or of a kernel of another shape.
  """
  kind = type(target)
  if ('head' in state) != issubclass(kind, NarrowHeads):
    raise ValueError(
      f'a {kind.__name__} leaf cannot be restored from what another kind of '
      f'low-rank leaf was written as: {sorted(state)}'
    )
  layout = _layout_of(state['layout'])
  if layout.shape != target.layout.shape:
    raise ValueError(
      f'a {kind.__name__} leaf in place of a kernel of shape '
      f'{target.layout.shape} cannot be restored from one of {layout.shape}'
    )
  order = state.get('order')
  more: dict[str, Any] = {}
  if 'head' in state:
    more['head'] = int(state['head'])
  return kind(
    state['a'],
    state['b'],
    state['c'],
    layout,
    None if order is None else Order(order),
    state.get('left'),
    **more,
  )


def _register_flax(serialization: Any) -> None:
  for kind in _KINDS:
    serialization.register_serialization_state(
      kind, _to_state, _from_state, override=True
    )


class _Later(importlib.abc.MetaPathFinder):
  """Runs something once a module has been imported, by whomever."""

  def __init__(self, name: str, run: Callable[[Any], None]):
    self._name = name
    self._run = run

  def find_spec(self, fullname: str, path: Any = None, target: Any = None):
    del path, target
    if fullname != self._name:
      return None
    sys.meta_path.remove(self)
    spec = importlib.util.find_spec(fullname)
    if spec is not None and spec.loader is not None:
      execute = spec.loader.exec_module

      def execute_and_run(module):
        execute(module)
        self._run(module)

      spec.loader.exec_module = execute_and_run  # type: ignore[method-assign]
    return spec


@functools.cache
def register() -> None:
  """Makes the leaves known, to Flax where or as soon as it is imported."""
  _register_export()
  if _FLAX in sys.modules:
    _register_flax(sys.modules[_FLAX])
  else:
    # This package does not import Flax; who writes a tree with it does.
    sys.meta_path.insert(0, _Later(_FLAX, _register_flax))

"""A tree as a nested dictionary of arrays and JSON, and back."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from utilized_rank.linalg import gram
from utilized_rank.linalg.sketch import Sketch
from utilized_rank.lowrank.leaf import LowRank
from utilized_rank.lowrank.leaf import is_low_rank
from utilized_rank.lowrank.narrow_heads import NarrowHeads
from utilized_rank.moments import coverage
from utilized_rank.moments.moments import Coupled
from utilized_rank.moments.moments import Entry
from utilized_rank.moments.moments import Moments
from utilized_rank.moments.moments import Sums
from utilized_rank.products.gauge import Order
from utilized_rank.storage import containers
from utilized_rank.storage import modules
from utilized_rank.tree.layout import Layout
from utilized_rank.walk import compat


def encode(tree: Any, where: str) -> tuple[Any, Any]:
  """A tree as a nested dictionary of arrays, and JSON.

  Args:
    tree: see `checkpoint.save`.
    where: its place, for errors.

  Returns:
    (arrays, structure); containers without arrays leave no trace in arrays.

  Raises:
    TypeError: the tree holds something that cannot be written.

  >>> encode([np.ones(2), 'x'], '')[1]['items']
  {'0': 'array', '1': {'kind': 'value', 'value': 'x'}}
  """
  if is_low_rank(tree):
    tree = tree.opened()
  if isinstance(tree, NarrowHeads):
    record = {'head': tree.head, **dataclasses.asdict(tree.layout)}
    return {'a': tree.a}, {'kind': 'narrow_heads', **record}
  if isinstance(tree, LowRank):
    factors = {'a': tree.a, 'b': tree.b, 'c': tree.c}
    arrays = {name: v for name, v in factors.items() if v is not None}
    record = {'kind': 'low_rank', **dataclasses.asdict(tree.layout)}
    if tree.order is not None:
      record['order'] = tree.order.array.tolist()
    if tree.left is not None:
      record['left'] = tree.left
    return arrays, record
  if isinstance(tree, Moments):
    arrays = {
      str(i): {
        'count': s.count,
        'total': s.total,
        **(
          {'sketch': s.panels.sums}
          if isinstance(s.panels, Sketch)
          else {'panels': _numbered(s.panels)}
        ),
      }
      for i, s in enumerate(tree.sums)
    }
    if tree.grads is not None:
      arrays['grads'] = _numbered([_numbered(g) for g in tree.grads])
      arrays['examples'] = tree.examples
    if tree.row_grads is not None:
      arrays['row_grads'] = _numbered(tree.row_grads)
    if tree.coupled is not None:
      arrays['coupled'] = _numbered(
        [
          {
            'total': c.total,
            'inputs': _numbered(c.inputs),
            'grads': _numbered(c.grads),
          }
          for c in tree.coupled
        ]
      )
    table = [dataclasses.asdict(entry) for entry in tree.table]
    kept = tree.coverage and dataclasses.asdict(tree.coverage)
    return arrays, {'kind': 'moments', 'table': table, 'coverage': kept}
  if isinstance(tree, dict):
    items = {str(key): value for key, value in tree.items()}
    numbers = [str(key) for key in tree if isinstance(key, int)]
    if len(items) < len(tree) or any(
      not isinstance(key, (str, int)) for key in tree
    ):
      raise TypeError(
        f'the keys {list(tree)} at {where[1:]!r} cannot be saved: strings and '
        'integers can, if no two look alike'
      )
    kind: dict[str, Any] = {'kind': 'dict', 'numbers': numbers}
    if type(tree) is not dict:
      kind['class'] = containers.record(tree, where[1:])
  elif isinstance(tree, (list, tuple)):
    items = {str(i): value for i, value in enumerate(tree)}
    kind = {'kind': 'list' if isinstance(tree, list) else 'tuple'}
    if hasattr(tree, '_fields'):
      kind['class'] = containers.record(tree, where[1:])
  elif tree is None:
    return None, {'kind': 'none'}
  elif type(tree) in (bool, int, float, str):
    return None, {'kind': 'value', 'value': tree}
  elif _is_array(tree):
    return _encode_array(tree)
  elif modules.is_container(tree):
    return encode(modules.as_dictionaries(tree), where)
  else:
    raise TypeError(
      f'cannot save a {type(tree).__name__} at {where[1:]!r}: trees of '
      'dictionaries, lists, tuples, arrays of numbers, LowRank, Moments, '
      'strings, flags and numbers are written, and modules of these; leave '
      'functions out'
    )
  parts = {k: encode(v, f'{where}/{k}') for k, v in items.items()}
  arrays = {k: a for k, (a, _) in parts.items() if a is not None}
  return arrays or None, {
    **kind,
    'items': {k: s for k, (_, s) in parts.items()},
  }


def _is_array(leaf: Any) -> bool:
  kinds = (jax.Array, np.ndarray, np.generic)
  return isinstance(leaf, kinds) and compat.is_known(leaf.dtype)


def _encode_array(array: Any) -> tuple[Any, Any]:
  if compat.is_key(array.dtype):
    impl = str(jax.random.key_impl(array))
    return jax.random.key_data(array), {'kind': 'key', 'impl': impl}
  if isinstance(array, np.generic):
    return array, {'kind': 'scalar'}
  if array.size:
    return array, 'array'
  # orbax does not write them.
  about = {'shape': list(array.shape), 'dtype': array.dtype.name}
  return None, {'kind': 'empty', **about}


def decode(arrays: Any, structure: Any) -> Any:
  """What `encode` wrote down.

  Raises:
    ValueError: no module that was imported has a class that the tree holds.

  >>> decode(*encode({'a': (1.5, None)}, ''))
  {'a': (1.5, None)}
  """
  if structure == 'array':
    return _array(arrays)
  if 'kind' not in structure:
    return decode(arrays['leaf'], structure['leaf'])
  kind = structure['kind']
  if kind == 'none':
    return None
  if kind == 'scalar':
    return np.asarray(arrays)[()]
  if kind == 'empty':
    dtype = jnp.dtype(structure['dtype'])
    return _array(np.zeros(structure['shape'], dtype))
  if kind == 'key':
    return jax.random.wrap_key_data(arrays, impl=structure['impl'])
  if kind == 'value':
    return structure['value']
  if kind == 'low_rank':
    a, b, c = (_array(arrays[k]) if k in arrays else None for k in 'abc')
    return LowRank(
      a,
      b,
      c,
      _layout(structure),
      Order(structure['order']) if 'order' in structure else None,
      structure.get('left'),
    )
  if kind == 'narrow_heads':
    layout, head = _layout(structure), structure['head']
    return NarrowHeads(_array(arrays['a']), None, None, layout, head=head)
  if kind == 'moments':
    table = tuple(
      Entry(**{**entry, 'layout': _layout(entry['layout'])})
      for entry in structure['table']
    )
    count = len({entry.index for entry in table})
    sums = tuple(_sums(arrays[str(i)]) for i in range(count))
    known = coverage.from_record(structure.get('coverage'))
    if 'grads' not in arrays:
      return Moments(table, sums, coverage=known)
    grads = tuple(map(_panels, _in_order(arrays['grads'])))
    rows = _in_order(arrays['row_grads']) if 'row_grads' in arrays else None
    coupled = None
    if 'coupled' in arrays:
      coupled = tuple(
        Coupled(c['total'], _panels(c['inputs']), _panels(c['grads']))
        for c in _in_order(arrays['coupled'])
      )
    return Moments(table, sums, grads, arrays['examples'], rows, known, coupled)
  items = {
    k: decode((arrays or {}).get(k), s) for k, s in structure['items'].items()
  }
  if kind == 'dict':
    numbers = set(structure['numbers'])
    plain = {int(k) if k in numbers else k: v for k, v in items.items()}
    return containers.of_record(structure.get('class'), plain)
  if kind == 'list':
    return list(items.values())
  return containers.of_record(structure.get('class'), tuple(items.values()))


def _array(array: Any) -> Any:
  """On the device, unless JAX would cut its numbers (float64, int64)."""
  is_kept = jax.dtypes.canonicalize_dtype(array.dtype) == array.dtype
  return jnp.asarray(array) if is_kept else np.asarray(array)


def _sums(arrays: dict[str, Any]) -> Sums:
  if 'sketch' in arrays:
    second: Any = Sketch(arrays['sketch'])
  else:
    second = _panels(arrays['second' if 'second' in arrays else 'panels'])
  return Sums(arrays['count'], arrays['total'], second)


def _panels(kept: Any) -> gram.Panels:
  """Panels, or those of a whole matrix, as 0.1 wrote it."""
  return _in_order(kept) if isinstance(kept, dict) else gram.panels_of(kept)


def _numbered(arrays: Sequence[Any]) -> dict[str, Any]:
  return {str(i): array for i, array in enumerate(arrays)}


def _in_order(numbered: dict[str, Any]) -> tuple[Any, ...]:
  return tuple(numbered[str(i)] for i in range(len(numbered)))


def _layout(record: dict[str, Any]) -> Layout:
  names = [field.name for field in dataclasses.fields(Layout)]
  return Layout(**{name: tuple(record[name]) for name in names})

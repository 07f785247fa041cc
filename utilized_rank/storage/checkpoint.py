"""Trees on disk, with everything needed to read them back and to trust them.

Arrays are stored with orbax as a nested dictionary, so that other tools can
read them; the structure (lists, tuples, `LowRank`, `Moments`) and a checksum of
every array travel as the checkpoint's JSON metadata. orbax itself restores
`LowRank` as a dictionary, and returns wrong numbers for a flipped bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import dataclasses
import hashlib
import json
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from utilized_rank.host import files
from utilized_rank.host.extras import extra
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

_FORMAT = 1
_KEY = 'utilized_rank'


def save(
  path: str | os.PathLike[str],
  tree: Any,
  *,
  metadata: dict[str, Any] | None = None,
  overwrite: bool = False,
) -> None:
  """Writes a tree: all of it, or nothing.

  Args:
    path: directory to make.
    tree: dictionaries of any class (keys strings or integers), lists and
      tuples of arrays, `LowRank`, `Moments`, strings, flags, numbers and None;
      modules and states of NNX and Equinox, which are written as dictionaries
      of their arrays.
    metadata: JSON to keep with it; `load_metadata` returns it.
    overwrite: replace what is there; an error otherwise.

  Raises:
    FileExistsError: there is something at `path`.
    TypeError: the tree holds something that is not written here.

  >>> import tempfile
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   save(folder + '/t', {'a': [jnp.ones(2)]})
  ...   load(folder + '/t')
  {'a': [Array([1., 1.], dtype=float32)]}
  """
  where = os.path.abspath(os.fspath(path))
  if os.path.exists(where) and not overwrite:
    raise FileExistsError(f'{where!r} exists; pass overwrite=True to replace')
  arrays, structure = _encode(tree, '')
  if not isinstance(arrays, dict):
    arrays, structure = {'leaf': arrays}, {'leaf': structure}
  arrays = jax.tree.map(np.asarray, arrays)
  record = {
    'format': _FORMAT,
    'structure': structure,
    'checksums': {name: _checksum(a) for name, a in _leaves(arrays)},
    'metadata': metadata,
  }
  kept = {_KEY: files.sealed(record)}
  _orbax().save(where, arrays, custom_metadata=kept, overwrite=overwrite)


@compat.moves_data
def load(path: str | os.PathLike[str], *, like: Any = None) -> Any:
  """Reads a tree that `save` wrote; no target tree is needed.

  Arrays of 64 bits are numpy's where JAX has them disabled.

  Args:
    path: what `save` wrote.
    like: the module that was saved, or one like it: dense, or where layers got
      narrower `recipe.abstract(dense)`. Without it, as its class and functions
      are no arrays, a module comes back as dictionaries.

  Raises:
    FileNotFoundError: there is no checkpoint at `path`.
    ValueError: it is damaged, or was not written by `save`; it holds
      dictionaries of a class whose module was not imported; `like` has other
      leaves.
  """
  where = os.path.abspath(os.fspath(path))
  record, shapes = _open(where)
  target = jax.tree.map(lambda m: np.zeros(m.shape, m.dtype), shapes)
  try:
    arrays = _orbax().load(where, target)
  except Exception as error:
    raise ValueError(
      f'checkpoint {where!r} is damaged: {str(error).splitlines()[0]}'
    ) from error
  found = dict(_leaves(arrays))
  if sorted(found) != sorted(record['checksums']):
    raise ValueError(
      f'checkpoint {where!r} is damaged: it should hold '
      f'{len(record["checksums"])} arrays and holds {len(found)}'
    )
  for name, array in found.items():
    if _checksum(array) != record['checksums'][name]:
      raise ValueError(
        f'checkpoint {where!r} is damaged: the array {name!r} is not the '
        'one that was saved'
      )
  tree = _decode(arrays, record['structure'])
  return tree if like is None else modules.filled(like, tree)


def load_metadata(path: str | os.PathLike[str]) -> Any:
  """The `metadata` that a tree was saved with."""
  return _open(os.path.abspath(os.fspath(path)))[0]['metadata']


def save_file(
  path: str | os.PathLike[str], tree: Any, metadata: dict[str, Any]
) -> None:
  """Writes a tree of numpy arrays to one file: all of it, or nothing.

  For a process of several that has nothing to do with the others: orbax's
  saves wait for all of them.

  Args:
    path: the file, in the format of `np.savez`.
    tree: as for `save`, of arrays on the host.
    metadata: JSON to keep with it.
  """
  arrays, structure = _encode(tree, '')
  leaves, treedef = jax.tree.flatten(arrays)
  record = {
    'format': _FORMAT,
    'structure': structure,
    'places': jax.tree.unflatten(treedef, range(len(leaves))),
    'metadata': metadata,
  }
  text = np.frombuffer(json.dumps(record).encode(), np.uint8)
  files.write(path, lambda file: np.savez(file, text, *leaves))


def load_file(path: str | os.PathLike[str]) -> tuple[Any, dict[str, Any]]:
  """The tree and the metadata that `save_file` wrote.

  Raises:
    FileNotFoundError: there is no file.
    ValueError: it is damaged, or was not written by `save_file`.
  """
  with open(path, 'rb') as raw:
    try:
      with np.load(raw) as file:
        text, *leaves = (file[f'arr_{i}'] for i in range(len(file.files)))
      record = json.loads(text.tobytes())
      if record['format'] != _FORMAT:
        raise ValueError(f'its format is {record["format"]}, not {_FORMAT}')
      arrays = jax.tree.map(lambda i: leaves[i], record['places'])
      return _decode(arrays, record['structure']), record['metadata']
    except Exception as e:  # of as many kinds as a zip has fields
      raise ValueError(f'{path!s} is damaged, or no tree: {e}') from e


def _open(where: str) -> tuple[dict[str, Any], Any]:
  ocp = _orbax()
  if not os.path.isdir(where):
    raise FileNotFoundError(f'no checkpoint at {where!r}')
  try:
    found = ocp.metadata(where)
    record = files.unsealed((found.custom_metadata or {}).get(_KEY))
    shapes = found.metadata
  except Exception as error:
    raise ValueError(
      f'checkpoint {where!r} is damaged or is none: '
      f'{type(error).__name__}: {str(error).splitlines()[0]}'
    ) from error
  if record is None or record['format'] != _FORMAT:
    raise ValueError(
      f'{where!r} was not written by utilized_rank.save (format {_FORMAT}); '
      'read it with orbax'
    )
  return record, shapes


def _orbax():
  with extra('save'):
    from orbax.checkpoint import v1  # the core imports jax and numpy alone

  return v1


def _checksum(array: np.ndarray) -> str:
  array = np.ascontiguousarray(array)
  head = f'{array.dtype.name}{array.shape}'.encode()
  return hashlib.sha256(head + array.tobytes()).hexdigest()


def _leaves(tree: Any, prefix: str = '') -> Iterator[tuple[str, np.ndarray]]:
  if isinstance(tree, dict):
    for key in sorted(tree):
      yield from _leaves(tree[key], f'{prefix}/{key}')
  else:
    yield prefix, tree


# --- a tree as (nested dict of arrays, JSON) and back ---


def _encode(tree: Any, where: str) -> tuple[Any, Any]:
  """(arrays, structure); containers without arrays leave no trace in arrays."""
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
        f'the keys {list(tree)} at {where!r} cannot be saved: strings and '
        'integers can, if no two look alike'
      )
    kind: dict[str, Any] = {'kind': 'dict', 'numbers': numbers}
    if type(tree) is not dict:
      kind['class'] = containers.record(tree, where)
  elif isinstance(tree, (list, tuple)) and not hasattr(tree, '_fields'):
    items = {str(i): value for i, value in enumerate(tree)}
    kind = {'kind': type(tree).__name__}
  elif tree is None:
    return None, {'kind': 'none'}
  elif type(tree) in (bool, int, float, str):
    return None, {'kind': 'value', 'value': tree}
  elif isinstance(tree, (jax.Array, np.ndarray)) and tree.size:
    return tree, 'array'
  elif isinstance(tree, np.generic) and tree.dtype.kind not in 'OSUMm':
    return tree, {'kind': 'scalar'}
  elif modules.is_container(tree) and not hasattr(tree, '_fields'):
    return _encode(modules.as_dictionaries(tree), where)
  else:
    raise TypeError(
      f'cannot save a {type(tree).__name__} at {where!r}: trees of '
      'dictionaries, lists, tuples, non-empty arrays, LowRank, Moments, '
      'strings, flags and numbers are written, and modules of these; leave '
      'functions and named tuples out'
    )
  parts = {k: _encode(v, f'{where}/{k}') for k, v in items.items()}
  arrays = {k: a for k, (a, _) in parts.items() if a is not None}
  return arrays or None, {
    **kind,
    'items': {k: s for k, (_, s) in parts.items()},
  }


def _decode(arrays: Any, structure: Any) -> Any:
  if structure == 'array':
    return _array(arrays)
  if 'kind' not in structure:
    return _decode(arrays['leaf'], structure['leaf'])
  kind = structure['kind']
  if kind == 'none':
    return None
  if kind == 'scalar':
    return np.asarray(arrays)[()]
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
    k: _decode((arrays or {}).get(k), s) for k, s in structure['items'].items()
  }
  if kind == 'dict':
    numbers = set(structure['numbers'])
    plain = {int(k) if k in numbers else k: v for k, v in items.items()}
    return containers.of_record(structure.get('class'), plain)
  return (list if kind == 'list' else tuple)(items.values())


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

"""Trees on disk, with everything needed to read them back and to trust them.

Arrays are stored with orbax as a nested dictionary, so that other tools can
read them; the structure (lists, tuples, `LowRank`, `Moments`) and a checksum of
every array travel as the checkpoint's JSON metadata. orbax itself restores
`LowRank` as a dictionary, and returns wrong numbers for a flipped bit.
"""

from __future__ import annotations

from collections.abc import Iterator
import hashlib
import json
import os
from typing import Any

import jax
import numpy as np

from utilized_rank.host import files
from utilized_rank.host.extras import extra
from utilized_rank.storage import encoding
from utilized_rank.storage import modules
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
    tree: dictionaries of any class (keys strings or integers), lists, tuples
      and named tuples of arrays, random keys, `LowRank`, `Moments`, strings,
      flags, numbers and None; modules and states of NNX and Equinox, which are
      written as dictionaries of their arrays.
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
  arrays, structure = encoding.encode(tree, '')
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
      dictionaries or named tuples of a class whose module was not imported;
      `like` has other leaves.
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
  tree = encoding.decode(arrays, record['structure'])
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
  arrays, structure = encoding.encode(tree, '')
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
      return encoding.decode(arrays, record['structure']), record['metadata']
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

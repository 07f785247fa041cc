"""Factors for those who do not have this library: safetensors and numpy."""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np

from utilized_rank import version
from utilized_rank.host import files
from utilized_rank.lowrank.leaf import is_low_rank
from utilized_rank.lowrank.leaf import with_left
from utilized_rank.lowrank.leaf import write_out
from utilized_rank.lowrank.narrow_heads import NarrowHeads
from utilized_rank.storage.recipe import Recipe
from utilized_rank.tree import paths
from utilized_rank.walk import compat
from utilized_rank.walk import tracing

_TENSORS = 'model.safetensors'
_CONFIG = 'config.json'


def save_safetensors(
  folder: str | os.PathLike[str],
  small: Any,
  *,
  recipe: Recipe | None = None,
  overwrite: bool = False,
) -> None:
  """Writes a tree as a folder of the form that Hugging Face's tools take.

  `model.safetensors` has each leaf under its path with `.` between the keys,
  a pair as `PATH.a`, `PATH.b` and, if it has one, `PATH.c`; identity blocks
  are written out. `config.json`, which is the file's metadata too, says which
  axes of a pair's kernel are inputs and outputs, so that numpy runs it:
  contract the inputs of x with `a`, the result with `b`, and add `c`.

  Args:
    folder: to be made.
    small: parameters of arrays and `LowRank` leaves.
    recipe: what made them, such as `report.recipe`; kept with them.
    overwrite: write over such a folder that is there.

  Raises:
    FileExistsError: there is something at `folder`.
    ValueError: two leaves have one name.
    TypeError: a leaf is no array.

  >>> import tempfile
  >>> from safetensors.numpy import load_file
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   save_safetensors(folder + '/out', {'w': {'kernel': jnp.ones(2)}})
  ...   load_file(folder + '/out/model.safetensors')
  {'w.kernel': array([1., 1.], dtype=float32)}
  """
  from safetensors.numpy import save

  where = os.fspath(folder)
  if os.path.exists(where) and not overwrite:
    raise FileExistsError(f'{where!r} exists; pass overwrite=True to replace')
  named, _ = paths.flatten(write_out(small), is_low_rank)
  tensors: dict[str, np.ndarray] = {}
  kernels: dict[str, Any] = {}
  for path, leaf in with_left(named).items():
    name = path.replace('/', '.')
    parts = {name: leaf}
    if is_low_rank(leaf):
      parts = {
        f'{name}.{key}': getattr(leaf.opened(), key)
        for key in 'abc'
        if getattr(leaf, key) is not None
      }
      kernels[name] = _about(leaf)
    for key, value in parts.items():
      if key in tensors:
        raise ValueError(f'two leaves have the name {key!r} ({path!r} is one)')
      tensors[key] = _contiguous(path, value)
  config = {
    'library_name': 'utilized_rank',
    'version': version.__version__,
    'kernels': kernels,
    'recipe': None if recipe is None else recipe.json(),
  }
  text = json.dumps(config)
  data = save(tensors, {'format': 'np', 'utilized_rank': text})
  os.makedirs(where, exist_ok=True)
  files.write(os.path.join(where, _TENSORS), lambda file: file.write(data))
  files.write_text(os.path.join(where, _CONFIG), text + '\n')


def _about(leaf: Any) -> dict[str, Any]:
  layout = leaf.layout
  about = {
    'shape': list(layout.shape),
    # Whole axes, or pieces of them in the kernel's order.
    'atoms': list(layout.atoms),
    'groups': list(layout.groups),
    'inputs': list(layout.inputs),
    'outputs': list(layout.outputs),
  }
  if isinstance(leaf, NarrowHeads):
    return {**about, 'head': leaf.head}
  return {**about, 'rank': leaf.rank}


def _contiguous(path: str, value: Any) -> np.ndarray:
  tracing.check_value(path, value)
  if not tracing.is_array(value) or compat.is_key(value.dtype):
    raise TypeError(
      f'{path!r} is a {type(value).__name__}: safetensors holds arrays of '
      'numbers alone'
    )
  # safetensors 0.8 writes a transposed array's memory as it lies.
  return np.ascontiguousarray(np.asarray(value)).reshape(np.shape(value))

"""Kernels that a directory holds as pairs, as `compress_checkpoint` writes it.

`NAME.weight` is there as `NAME.0.weight` (r, inputs) and `NAME.1.weight`
(outputs, r), what two linear layers of PyTorch hold, and its bias as
`NAME.1.bias`. Where a tensor is several kernels side by side, each has a name
of its own below it: `NAME.query.0.weight`.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

import numpy as np

from utilized_rank.lowrank.leaf import LowRank
from utilized_rank.models.importing.files.tensor import Tensor
from utilized_rank.storage.recipe import Recipe

# In the metadata of a directory's index.
KEY = 'utilized_rank'
_FORMAT = 1
# Which tensors a leaf is made of, by what they are to it.
Parts = Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Factored:
  """What of a directory is not as its names and shapes say.

  Attributes:
    recipe: how the pairs were made, and their layouts.
    replaced: shapes of the tensors that are not there as they were, by name.
    leaves: for each leaf that is in tensors of its own their names: 'a', 'b'
      and 'c' of a pair; 'weight', transposed; 'bias'.
  """

  recipe: Recipe
  replaced: Mapping[str, tuple[int, ...]]
  leaves: Mapping[str, Parts]

  @classmethod
  def of(cls, others: Mapping[str, Any]) -> Factored | None:
    """What `formats.read_tensors` found beside the tensors; None for nothing.

    Raises:
      ValueError: it was written by another version's format.
    """
    record = others.get(f'__metadata__.{KEY}')
    if record is None:
      return None
    if record.get('format') != _FORMAT:
      raise ValueError(
        f'the index has {KEY} in format {record.get("format")}, known here is '
        f'{_FORMAT}'
      )
    return cls(
      Recipe.from_json(record['recipe']),
      {name: tuple(shape) for name, shape in record['replaced'].items()},
      record['leaves'],
    )

  def json(self) -> dict[str, Any]:
    """What `of` reads."""
    return {
      'format': _FORMAT,
      'recipe': self.recipe.json(),
      'replaced': {name: list(shape) for name, shape in self.replaced.items()},
      'leaves': {path: dict(parts) for path, parts in self.leaves.items()},
    }

  def dense_shapes(
    self, shapes: Mapping[str, tuple[int, ...]]
  ) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors that were there before."""
    own = {name for parts in self.leaves.values() for name in parts.values()}
    return {n: s for n, s in shapes.items() if n not in own} | dict(
      self.replaced
    )

  def leaf(
    self,
    path: str,
    tensors: Mapping[str, Tensor],
    shape: tuple[int, ...],
    dtype: Any,
  ) -> Any:
    """A leaf, an array or `LowRank` of arrays of numpy.

    Raises:
      ValueError: a tensor of it is not there.
    """
    parts = self.leaves[path]
    if missing := [n for n in parts.values() if n not in tensors]:
      raise ValueError(f'{path} should be in {missing}, which are not there')
    values = {what: tensors[name].read() for what, name in parts.items()}
    if 'a' not in values:
      return of_parts(values).reshape(shape).astype(dtype)
    layout = self.recipe.leaves[path].layout
    return low_rank_of(values, layout, dtype)


def of_parts(values: Mapping[str, np.ndarray]) -> np.ndarray:
  """The array of a leaf that is no pair: its weight or its bias."""
  return values['weight'].T if 'weight' in values else values['bias']


def parts_of(leaf: Any) -> dict[str, np.ndarray]:
  """A pair as two linear layers of PyTorch hold it; see `low_rank_of`."""
  found: dict[str, np.ndarray] = {
    'a': np.asarray(leaf.a).reshape(-1, leaf.rank).T,
    'b': np.asarray(leaf.b).reshape(leaf.rank, -1).T,
  }
  if leaf.c is not None:
    found['c'] = np.asarray(leaf.c).reshape(-1)
  return found


def low_rank_of(
  values: Mapping[str, np.ndarray], layout: Any, dtype: Any
) -> LowRank:
  """The pair of tensors `a`, `b` and perhaps `c` as a leaf."""
  a, b = (values[key].T.astype(dtype) for key in 'ab')
  c = values.get('c')
  return LowRank(
    np.ascontiguousarray(a).reshape(*layout.input_shape, -1),
    np.ascontiguousarray(b).reshape(-1, *layout.output_shape),
    None if c is None else c.reshape(layout.output_shape).astype(dtype),
    layout,
  )

"""What a compressed tree is made of, in a file: its shapes without its data.

A compressed checkpoint can be read by any tool that is told the tree to expect.
A recipe tells it: which leaves are factored, at what ranks, how, and on which
calibration data. A step function can be compiled, and memory laid out, before
there are any weights.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import hashlib
import os
from typing import Any

import jax
import numpy as np

from utilized_rank import version
from utilized_rank.factorization import methods
from utilized_rank.factorization import shared_left
from utilized_rank.host import files
from utilized_rank.lowrank.leaf import LowRank
from utilized_rank.lowrank.leaf import is_low_rank
from utilized_rank.lowrank.narrow_heads import NarrowHeads
from utilized_rank.lowrank.narrow_heads import narrow_shape
from utilized_rank.moments.moments import Moments
from utilized_rank.products.gauge import Order
from utilized_rank.tree import paths
from utilized_rank.tree.layout import Layout
from utilized_rank.walk import tracing

_FORMAT = 1
_KIND = 'utilized_rank recipe'


@dataclasses.dataclass(frozen=True)
class FactoredLeaf:
  """The static part of a `LowRank` leaf, or of `NarrowHeads`; see there."""

  layout: Layout
  rank: int
  has_constant: bool
  order: Order | None
  left: str | None
  head: int | None = None

  @classmethod
  def of(cls, leaf: LowRank) -> FactoredLeaf:
    return cls(
      leaf.layout,
      leaf.rank,
      leaf.c is not None,
      leaf.order,
      leaf.left,
      leaf.head if isinstance(leaf, NarrowHeads) else None,
    )

  def abstract(self, dtype: Any) -> LowRank:
    """The leaf with shapes in place of arrays."""
    layout = self.layout
    groups, outputs = layout.group_shape, layout.output_shape
    own = outputs
    if self.order is not None:
      own = (layout.matrix_shape[1] - self.rank,)
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, dtype)
    if self.head is not None:
      sizes = narrow_shape(layout, self.head, self.rank)
      return NarrowHeads(shape(*sizes), None, None, layout, head=self.head)
    return LowRank(
      None
      if self.left is not None
      else shape(*groups, *layout.input_shape, self.rank),
      shape(*groups, self.rank, *own),
      shape(*groups, *outputs) if self.has_constant else None,
      layout,
      self.order,
      self.left,
    )


@dataclasses.dataclass(frozen=True)
class Recipe:
  """How a tree was compressed, enough to know its structure.

  Attributes:
    ranks: as they were given to `factorize`; of kernels with narrower heads,
      the features that a head keeps.
    method: as it was given to `factorize`.
    compensate_mean: as it was given to `factorize`.
    damping: as it was given to `factorize`.
    calibration: `fingerprint` of the moments.
    versions: of utilized_rank, jax and numpy.
    leaves: for each factored leaf's path, what is static in it.
    narrowed: path to shape of leaves that are narrower than the dense tree's
      (`narrow_hidden`).

  >>> import tempfile, utilized_rank as ur
  >>> fn = lambda p, x: x @ p['w']
  >>> params = {'w': jnp.eye(4)}
  >>> moments = ur.capture(fn)(params, jnp.tile(jnp.eye(4), (4, 1)))[1]
  >>> small = ur.factorize(params, moments, {'w': 2}, gauge='identity')
  >>> recipe = Recipe.of(small, moments, {'w': 2})
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   recipe.save(folder + '/recipe.json')
  ...   again = Recipe.load(folder + '/recipe.json')
  >>> leaf = again.abstract(jax.eval_shape(lambda: params))['w']
  >>> leaf.a.shape, leaf.b.shape
  ((4, 2), (2, 2))
  """

  ranks: shared_left.Ranks
  method: str
  compensate_mean: bool
  damping: float
  calibration: str
  versions: Mapping[str, str]
  leaves: Mapping[str, FactoredLeaf]
  narrowed: Mapping[str, tuple[int, ...]] = dataclasses.field(
    default_factory=dict
  )

  @property
  def gauge(self) -> str | None:
    """As it was given to `factorize`."""
    has_order = any(leaf.order is not None for leaf in self.leaves.values())
    return 'identity' if has_order else None

  @classmethod
  def of(
    cls,
    small: Any,
    moments: Moments,
    ranks: shared_left.Ranks,
    *,
    method: str = 'output',
    compensate_mean: bool = True,
    damping: float = methods.DAMPING,
    params: Any = None,
  ) -> Recipe:
    """The recipe of a tree that `factorize` made with these arguments.

    Args:
      small: the tree, or its shapes.
      moments: as for `factorize`; only their fingerprint is kept.
      ranks: as for `factorize`.
      method: as for `factorize`.
      compensate_mean: as for `factorize`.
      damping: as for `factorize`.
      params: the dense parameters, or their shapes; needed where leaves of
        the tree are narrower than theirs.
    """

    methods.check_method(method)
    named, _ = paths.flatten(small, is_low_rank)
    leaves = {
      path: FactoredLeaf.of(leaf)
      for path, leaf in named.items()
      if is_low_rank(leaf)
    }
    given = {
      name: int(np.max(rank))
      for key, rank in ranks.items()
      for name in shared_left.names_of(key)
    }
    for path in [*leaves, *given]:
      has = leaves[path].rank if path in leaves else None
      if given.get(path) != has:
        raise ValueError(
          f'{path!r} has rank {has} in the tree and {given.get(path)} in '
          'ranks: give what factorize was given'
        )
    return cls(
      dict(ranks),
      method,
      compensate_mean,
      damping,
      fingerprint(moments),
      versions_here(),
      leaves,
      {} if params is None else _narrowed(named, paths.flatten(params)[0]),
    )

  def abstract(self, params: Any) -> Any:
    """The compressed tree's shapes, from the dense tree's.

    Args:
      params: dense parameters, or their shapes (`jax.eval_shape`).

    Returns:
      `params` with `ShapeDtypeStruct`s in place of arrays, those of `LowRank`
      leaves in place of kernels: a target for orbax, and what `jax.jit(
      low_rank(fn)).lower` compiles for.

    Raises:
      ValueError: a factored leaf is not there, or has another shape.
    """
    named, treedef = paths.flatten(params, is_low_rank)
    shapes = {
      path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
      if tracing.is_array(leaf)
      else leaf
      for path, leaf in named.items()
    }
    for path in (*self.leaves, *self.narrowed):
      if path not in named:
        raise ValueError(
          'the recipe is of other parameters: these lack '
          + paths.unknown(path, named)
        )
    for path, shape in self.narrowed.items():
      shapes[path] = jax.ShapeDtypeStruct(shape, named[path].dtype)
    for path, leaf in self.leaves.items():
      found = getattr(shapes[path], 'shape', None)
      if found != leaf.layout.shape or is_low_rank(named[path]):
        raise ValueError(
          f'the recipe is of other parameters: it wants a dense {path!r} of '
          f'shape {leaf.layout.shape}, these have '
          f'{type(named[path]).__name__} of shape {found}'
        )
      shapes[path] = leaf.abstract(named[path].dtype)
    return paths.unflatten(treedef, shapes)

  def json(self) -> dict[str, Any]:
    """What `save` writes."""
    return {
      'kind': _KIND,
      'format': _FORMAT,
      'method': self.method,
      'gauge': self.gauge,
      'compensate_mean': self.compensate_mean,
      'damping': self.damping,
      'calibration': self.calibration,
      'versions': dict(self.versions),
      'ranks': [
        {'paths': shared_left.names_of(key), 'rank': np.asarray(rank).tolist()}
        for key, rank in self.ranks.items()
      ],
      'leaves': {name: _record(leaf) for name, leaf in self.leaves.items()},
      'narrowed': {name: list(v) for name, v in self.narrowed.items()},
    }

  def save(self, path: str | os.PathLike[str]) -> None:
    """Writes JSON: all of it, or nothing."""
    files.write_json(path, self.json(), indent=1)

  @classmethod
  def load(cls, path: str | os.PathLike[str]) -> Recipe:
    """Reads what `save` wrote.

    Raises:
      FileNotFoundError: there is no file.
      ValueError: it holds no recipe, or one of another format.
    """
    return files.read_json(path, 'recipe', cls.from_json)

  @classmethod
  def from_json(cls, record: Any) -> Recipe:
    """What `json` gave.

    Raises:
      KeyError, TypeError, ValueError: it is something else.
    """
    known = record['kind'], record['format']
    if known != (_KIND, _FORMAT):
      raise ValueError(f'it holds {known}, not {(_KIND, _FORMAT)}')
    return cls(
      {_key(r['paths']): _rank(r['rank']) for r in record['ranks']},
      record['method'],
      record['compensate_mean'],
      record['damping'],
      record['calibration'],
      record['versions'],
      {name: _leaf(leaf) for name, leaf in record['leaves'].items()},
      {name: tuple(v) for name, v in record.get('narrowed', {}).items()},
    )


def versions_here() -> dict[str, str]:
  """Those of this process that decide on numbers."""
  return {
    'utilized_rank': version.__version__,
    'jax': jax.__version__,
    'numpy': np.__version__,
  }


def fingerprint(moments: Moments) -> str:
  """A digest of everything that factors are computed from but the weights."""
  digest = hashlib.sha256()
  for path in moments:
    moment = moments[path]
    entry = moment.entry
    digest.update(repr((path, moment.layout, entry.bias)).encode())
    if entry.bias_scale != 1:
      digest.update(repr(entry.bias_scale).encode())
    known = moment.sums, moment.grad_panels, moment.examples
    for array in jax.tree.leaves(known):
      array = np.ascontiguousarray(array)
      digest.update(f'{array.dtype.name}{array.shape}'.encode())
      digest.update(array.tobytes())
  return digest.hexdigest()


def _narrowed(
  small: dict[str, Any], dense: dict[str, Any]
) -> dict[str, tuple[int, ...]]:
  """Shapes of leaves that are not those of the dense tree."""
  shapes = {
    path: tuple(leaf.shape)
    for path, leaf in small.items()
    if tracing.is_array(leaf) or is_low_rank(leaf)
  }
  return {
    path: shape
    for path, shape in shapes.items()
    if path in dense and shape != tuple(dense[path].shape)
  }


def _record(leaf: FactoredLeaf) -> dict[str, Any]:
  return {
    'layout': dataclasses.asdict(leaf.layout),
    'rank': leaf.rank,
    'has_constant': leaf.has_constant,
    'order': None if leaf.order is None else leaf.order.array.tolist(),
    'left': leaf.left,
    'head': leaf.head,
  }


def _leaf(record: dict[str, Any]) -> FactoredLeaf:
  layout = {name: tuple(v) for name, v in record['layout'].items()}
  order = record['order']
  return FactoredLeaf(
    Layout(**layout),
    record['rank'],
    record['has_constant'],
    None if order is None else Order(order),
    record['left'],
    record.get('head'),
  )


def _key(names: list[str]) -> shared_left.Key:
  return names[0] if len(names) == 1 else tuple(names)


def _rank(rank: int | list[int]) -> int | tuple[int, ...]:
  return tuple(rank) if isinstance(rank, list) else rank

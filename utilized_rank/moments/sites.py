"""What a walk found: for every leaf, the products it takes part in, or why
it takes part in none."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
import dataclasses
from typing import Any

import jax

from utilized_rank.host.columns import aligned
from utilized_rank.moments.coverage import Coverage
from utilized_rank.moments.moments import Entry
from utilized_rank.tree import paths
from utilized_rank.tree.layout import Layout
from utilized_rank.walk import tracing


@dataclasses.dataclass(frozen=True)
class Site(Entry):
  """A leaf that is the kernel of one or more products.

  Attributes:
    rows: rows that one call of the function contributes to each matrix, if
      every branch is taken and every `while_loop` runs once.
    uses: number of products it takes part in, per call of the function.
    also: what else happens to the leaf (an embedding's lookup, say).
  """

  rows: int = 0
  uses: int = 1
  also: tuple[str, ...] = ()

  @property
  def matrix_shape(self) -> tuple[int, int]:
    return self.layout.matrix_shape


class Sites(Mapping[str, Site]):
  """Every kernel of a function, by path; `print(sites)` explains every leaf.

  Attributes:
    unseen: for every other leaf, why it is no kernel.
    shapes: every leaf's shape.
    holes: leaves that enter a primitive which hides its computation, and the
      primitive; empty unless `on_opaque='report'`.
    others: leaves that are no arrays, and what they are.
    biases: leaves that are added to products of kernels.
  """

  def __init__(
    self,
    sites: dict[str, Site],
    unseen: dict[str, str],
    shapes: dict[str, tuple[int, ...]],
    holes: dict[str, str],
    others: dict[str, str] | None = None,
    biases: Collection[str] = (),
  ):
    self._sites = sites
    self.unseen = unseen
    self.shapes = shapes
    self.holes = holes
    self.others = others or {}
    self.biases = frozenset(biases)

  def __getitem__(self, path: str) -> Site:
    if path in self._sites:
      return self._sites[path]
    if path in self.others:
      raise KeyError(f'{path!r} is not a site: {self.others[path]}')
    if path in self.unseen:
      raise KeyError(f'{path!r} is not a site: {self.unseen[path]}')
    raise KeyError('no leaf ' + paths.unknown(path, self.shapes))

  def __iter__(self) -> Iterator[str]:
    return iter(self._sites)

  def __len__(self) -> int:
    return len(self._sites)

  @property
  def coverage(self) -> Coverage:
    """Which share of the parameters the kernels hold."""
    return Coverage.of(self.shapes, self.unseen, self.biases)

  def __str__(self) -> str:
    rows = [('leaf', 'shape', 'groups', 'matrix', 'input', 'notes')]
    for path, shape in self.shapes.items():
      dims = '×'.join(map(str, shape)) or 'scalar'
      site = self._sites.get(path)
      if site is None:
        rows.append((path, dims, '', '', '', '- ' + self.unseen[path]))
        continue
      groups = '×'.join(map(str, site.layout.group_shape))
      matrix = '×'.join(map(str, site.matrix_shape))
      rows.append((path, dims, groups, matrix, f'#{site.index}', _notes(site)))
    rows += [(p, '', '', '', '', f'- {why}') for p, why in self.others.items()]
    lines = aligned(rows)
    shared = len({s.index for s in self._sites.values()})
    lines.append(
      f'{len(self)} kernels of {len(self.shapes)} leaves, {shared} distinct '
      'inputs (one number, one value)'
    )
    lines.append(str(self.coverage))
    return '\n'.join(lines)


def _notes(site: Site) -> str:
  notes = [site.kind if site.uses == 1 else f'{site.kind} ×{site.uses}']
  if site.side == 'output':
    notes.append('from its outputs')
  if site.columns:
    notes.append(f'sketch of {site.columns} columns')
  if site.bias is not None:
    notes.append(f'bias {site.bias}')
  if site.also:
    notes.append('also ' + ', '.join(site.also))
  return '; '.join(notes)


def no_arrays(params: Any) -> dict[str, str]:
  """Path to what it is, of every leaf that is no array.

  >>> no_arrays({'w': jnp.ones(2), 'rate': 0.1})
  {'rate': 'no array: a float, which stays as it is'}
  """
  named, _ = paths.flatten(params)
  return {p: _other(v) for p, v in named.items() if not tracing.is_array(v)}


def _other(leaf: Any) -> str:
  kind = type(leaf).__name__
  of = type(leaf).__module__.partition('.')[0]
  if any(map(tracing.is_array, jax.tree.leaves(getattr(leaf, 'value', None)))):
    # A variable that is no pytree: the function reads it by itself.
    how = 'take the arrays out, and put them in inside the function'
    if of == 'penzai':
      how += (
        ' (model, params = pz.unbind_params(model, freeze=True), and '
        'pz.bind_variables(model, params))'
      )
    return f'HIDDEN: a {kind} of {of} that JAX cannot look into: {how}'
  if hasattr(leaf, 'shape') and hasattr(leaf, 'dtype'):
    return f'HIDDEN: a {kind} of {of}: make an array of it'
  return f'no array: a {kind}, which stays as it is'


def layout_conflict(layouts: list[Layout]) -> str:
  """Says in which different ways a leaf is contracted."""
  ways = sorted(
    {
      f'over sizes {layout.input_shape or (1,)} of {layout.shape}'
      for layout in layouts
    }
  )
  return 'contracted in different ways: ' + ' and '.join(ways)

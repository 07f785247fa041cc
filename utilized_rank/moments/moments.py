"""Sums over data, and what they say: means and second moments per kernel."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from utilized_rank.linalg import gram
from utilized_rank.linalg.nystrom import Nystrom
from utilized_rank.linalg.nystrom import nystrom
from utilized_rank.linalg.sketch import Sketch
from utilized_rank.moments.coverage import Coverage
from utilized_rank.tree import paths
from utilized_rank.tree.layout import Layout


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sums:
  """Running sums over the rows that one or more kernels read.

  Plain sums: adding two of them is adding two data sets, and a `psum` over
  devices is the reduction.

  Attributes:
    count: n, number of rows.  # shape=(*groups,), dtype=int32
    total: s = sum x.  # shape=(*groups, d), dtype=float32
    panels: C = sum x x^T without what mirrors the rest, see `gram.Panels`; of
      a kernel that is measured from the output side, sum y y^T; or a `Sketch`
      of C.  # dtype=float32
  """

  count: Any
  total: Any
  panels: gram.Panels | Sketch

  @property
  def second(self) -> Any:
    """C, (*groups, d, d), made anew at each use; from the output side
    (*groups, m, m).

    Raises:
      ValueError: there is a sketch of it.
    """
    if isinstance(self.panels, Sketch):
      raise ValueError(
        'of these sums of x x^T there is a sketch: `Moment.second` has what '
        'they are taken for'
      )
    return gram.whole(self.panels)


@dataclasses.dataclass(frozen=True)
class Entry:
  """Where a kernel's sums are, and how the kernel is read as a matrix.

  Attributes:
    path: the leaf's path.
    layout: the leaf as one matrix per group.
    index: position of its sums in `Moments.sums`; q, k and v share one.
    bias: path of the leaf that is added to this product, or taken off it as a
      norm's running mean is, and used for nothing else; a constant output can
      be moved there. None where there is none.
    kind: 'dot' or 'conv'.
    side: 'input'; 'output' where the sums are of outputs y = x W: T is
      measured, S is not known; 'sketch' where they are a sketch of S.
    number: in which pass over the batches it was collected, from 0; not looked
      at where moments are compared or merged.
    columns: of the sketch; 0 without.
    bias_scale: what a constant of x W is multiplied with to be one of the
      bias; the function may multiply either with a number.
  """

  path: str
  layout: Layout
  index: int
  bias: str | None
  kind: str
  side: str = 'input'
  number: int = dataclasses.field(default=0, compare=False, kw_only=True)
  columns: int = dataclasses.field(default=0, kw_only=True)
  bias_scale: float = dataclasses.field(default=1.0, kw_only=True)

  @property
  def measured(self) -> tuple[Layout, str, int]:
    """What was summed for it: sums of unequal ones are of unequal things."""
    return self.layout, self.side, self.columns


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Coupled:
  """Sums over the rows of one kernel of its inputs x and the gradients g at
  its outputs, of one row each: what S and G, summed apart, do not know.

  Attributes:
    total: sum |g|^2 x.  # shape=(*groups, 1, d), dtype=float32
    inputs: sum |g|^2 x x^T, as panels of (*groups, d, d).
    grads: sum |x|^2 g g^T, as panels of (*groups, m, m).
  """

  total: Any
  inputs: gram.Panels
  grads: gram.Panels


@dataclasses.dataclass(frozen=True)
class Moment:
  """Moments of one kernel's inputs. Rows are x, of d features.

  A leaf that holds several kernels (scan steps, experts) has leading group
  axes in every array.
  """

  entry: Entry
  sums: Sums
  grad_panels: gram.Panels | None = None
  examples: Any = None
  row_grad: Any = None
  coupled: Coupled | None = None

  @property
  def layout(self) -> Layout:
    return self.entry.layout

  @property
  def count(self) -> Any:
    """n, shape (*groups,)."""
    return self.sums.count

  @property
  def mean(self) -> Any:
    """mu = s / n, shape (*groups, d)."""
    total = self.sums.total
    return total / _divisor(self.sums.count, total)[..., None]

  @property
  def second(self) -> Any:
    """S = C / n, uncentred, shape (*groups, d, d); of a sketch what it is
    taken for, on the host, see `nystrom`.

    Raises:
      ValueError: the kernel was measured from the output side.
    """
    if self.entry.side == 'output':
      raise unknown_inputs(self.entry.path)
    if self.entry.side == 'sketch':
      return self._of_sketch(lambda known: known.matrix())
    return self._second

  @property
  def unseen(self) -> Any:
    """Of a kernel with a sketch, how much of tr S it does not see, shape
    (*groups,): no set of directions has more data than `second` says by more
    than this. Else None."""
    if self.entry.side != 'sketch':
      return None
    return self._of_sketch(lambda known: known.unseen)

  def sketched(self, index: tuple[int, ...], centered: bool) -> Nystrom:
    """What one matrix's S is taken for, of a kernel with a sketch.

    Args:
      index: place in the group axes.
      centered: S - mu mu^T in place of S.
    """
    sketch: Any = self.sums.panels
    # What was never reached has no rows: moments of zero, not NaN.
    n = max(int(np.asarray(self.count)[index]), 1)
    mean = np.asarray(self.sums.total)[index].astype(np.float64) / n
    sums = np.asarray(sketch.sums)[index]
    return nystrom(sums, n, mean if centered else None)

  def _of_sketch(
    self, read: Callable[[Nystrom], Any], centered: bool = False
  ) -> np.ndarray:
    """`read` of every group's approximation, as one array on the host."""
    found = [
      read(self.sketched(index, centered))
      for index in np.ndindex(*self.layout.group_shape)
    ]
    shape = self.layout.group_shape + np.shape(found[0])
    return np.stack(found).reshape(shape).astype(self.sums.total.dtype)

  @property
  def output_second(self) -> Any:
    """T, second moment of the outputs x W, shape (*groups, m, m), of a kernel
    that was measured from the output side; else None (T = W^T S W)."""
    return self._second if self.entry.side == 'output' else None

  @property
  def _second(self) -> Any:
    second = self.sums.second
    return second / _divisor(self.sums.count, second)[..., None, None]

  @property
  def grad(self) -> Any:
    """Sum over rows of g g^T, (*groups, m, m), made anew at each use; None
    without a loss."""
    return None if self.grad_panels is None else gram.whole(self.grad_panels)

  @property
  def grad_second(self) -> Any:
    """G, second moment over rows of the gradient of an example's loss at the
    kernel's output, shape (*groups, m, m); None without a loss."""
    grad = self.grad
    if grad is None:
      return None
    return grad / _divisor(self.sums.count, grad)[..., None, None]

  @property
  def rows_per_example(self) -> Any:
    """Rows that an example contributes, shape (*groups,); None without a
    loss."""
    if self.examples is None:
      return None
    return self.sums.count / _divisor(self.examples, self.sums.total)

  @property
  def row_fisher(self) -> Any:
    """sum_j E[(dL/dW_ij)^2] over examples, shape (*groups, d); None unless
    it was asked for."""
    if self.row_grad is None:
      return None
    return self.row_grad / _divisor(self.examples, self.row_grad)

  @property
  def covariance(self) -> Any:
    """S_c = S - mu mu^T, centred, shape (*groups, d, d); of a sketch that of
    S_c itself."""
    if self.entry.side == 'sketch':
      return self._of_sketch(lambda known: known.matrix(), centered=True)
    mean = self.mean
    return self.second - mean[..., :, None] * mean[..., None, :]


def unknown_inputs(path: str) -> ValueError:
  """The error for what needs S where only T was measured."""
  return ValueError(
    f'{path!r} was measured from the output side, from_outputs=: its T is '
    "known and its S is not; factorize with method='output' or 'weight', or "
    'collect it from the input side'
  )


def _divisor(count: Any, sums: Any) -> Any:
  # Branches that were never taken and experts that no token reached have no
  # rows; their moments are zero, not NaN.
  at_least_one = (jnp if isinstance(count, jax.Array) else np).maximum(count, 1)
  return at_least_one.astype(sums.dtype)


@dataclasses.dataclass(frozen=True)
class _Static:
  """What of moments is no sum; what else there is does not tell them apart."""

  table: tuple[Entry, ...]
  coverage: Coverage | None = dataclasses.field(compare=False, repr=False)


@jax.tree_util.register_pytree_node_class
class Moments(Mapping[str, Moment]):
  """Moments of every selected kernel: a mapping from leaf path to `Moment`.

  A pytree of plain sums; kernels that read one value share one `Sums`. The
  table of entries is static, so moments can be jitted over, reduced with
  `jax.lax.psum` and donated.

  >>> import utilized_rank as ur
  >>> fn = lambda params, x: x @ params['w']
  >>> params = {'w': jnp.ones((2, 3))}
  >>> _, moments = ur.capture(fn)(params, jnp.array([[1.0, 2.0]]))
  >>> moments['w'].second.tolist()
  [[1.0, 2.0], [2.0, 4.0]]
  """

  def __init__(
    self,
    table: tuple[Entry, ...],
    sums: tuple[Sums, ...],
    grads: tuple[gram.Panels, ...] | None = None,
    examples: Any = None,
    row_grads: tuple[Any, ...] | None = None,
    coverage: Coverage | None = None,
    coupled: tuple[Coupled, ...] | None = None,
  ):
    """Made by `capture` and `collect`.

    Args:
      table: one entry per kernel.
      sums: the distinct sums that entries point at.
      grads: sums of g g^T for each entry, panels of (*groups, m, m); None
        without loss.
      examples: number of examples behind `grads`.
      row_grads: sums of the squared gradients of each entry's rows,
        (*groups, d); None unless they were asked for.
      coverage: which share of the parameters the kernels hold; not looked at
        where moments are compared or merged. None where it is not known.
      coupled: for each entry the sums of inputs and gradients together; None
        unless they were asked for.
    """
    self.table = table
    self.sums = sums
    self.grads = grads
    self.examples = examples
    self.row_grads = row_grads
    self.coverage = coverage
    self.coupled = coupled
    self._places = {entry.path: i for i, entry in enumerate(table)}

  def tree_flatten(self):
    sums = self.sums, self.grads, self.examples, self.row_grads, self.coupled
    return sums, _Static(self.table, self.coverage)

  @classmethod
  def tree_unflatten(cls, static, children) -> Moments:
    sums, grads, examples, rows, coupled = children
    return cls(
      static.table, sums, grads, examples, rows, static.coverage, coupled
    )

  def __getitem__(self, path: str) -> Moment:
    if path not in self._places:
      raise KeyError('no moments for ' + paths.unknown(path, self._places))
    place = self._places[path]
    entry = self.table[place]
    at = lambda of: None if of is None else of[place]
    return Moment(
      entry,
      self.sums[entry.index],
      at(self.grads),
      self.examples,
      at(self.row_grads),
      at(self.coupled),
    )

  def __iter__(self) -> Iterator[str]:
    return iter(self._places)

  def __len__(self) -> int:
    return len(self._places)

  def only(self, wanted: Collection[str]) -> Moments:
    """The same for some of the kernels."""
    some = self._at([i for i, e in enumerate(self.table) if e.path in wanted])
    if self.coverage is None:
      return some
    sizes = {e.path: math.prod(e.layout.shape) for e in self.table}
    left = {path: n for path, n in sizes.items() if path not in wanted}
    return some.covering(self.coverage.without(left))

  def covering(self, coverage: Coverage | None) -> Moments:
    """The same, with what is known of the other parameters."""
    static = _Static(self.table, coverage)
    return Moments.tree_unflatten(static, self.tree_flatten()[0])

  def in_order_of(self, other: Moments) -> Moments:
    """The same with the table of moments of the same kernels."""
    some = self._at([self._places[path] for path in other])
    static = _Static(other.table, other.coverage)
    return Moments.tree_unflatten(static, some.tree_flatten()[0])

  def _at(self, places: Sequence[int]) -> Moments:
    pick = lambda v: None if v is None else tuple(v[i] for i in places)
    return Moments(
      tuple(self.table[i] for i in places),
      self.sums,
      pick(self.grads),
      self.examples,
      pick(self.row_grads),
      coupled=pick(self.coupled),
    )

  def __repr__(self) -> str:
    return f'Moments({len(self)} kernels, {len(self.sums)} distinct inputs)'

"""Pairs the kernels of a parameter tree with their moments, checked."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import numpy as np

from utilized_rank.factorization.input_basis import InputBasis
from utilized_rank.host.warning import warn
from utilized_rank.linalg import best_pairs
from utilized_rank.linalg import eigh
from utilized_rank.linalg import gram
from utilized_rank.linalg import subspace
from utilized_rank.linalg.nystrom import Nystrom
from utilized_rank.linalg.overflow import not_finite
from utilized_rank.linalg.sketch import Sketch
from utilized_rank.lowrank.leaf import is_low_rank
from utilized_rank.moments.moments import Coupled
from utilized_rank.moments.moments import Moment
from utilized_rank.moments.moments import Moments
from utilized_rank.moments.moments import unknown_inputs
from utilized_rank.tree import paths
from utilized_rank.tree.layout import Layout
from utilized_rank.walk import compat
from utilized_rank.walk import tracing

# Rows per input feature below which moments are mostly noise.
ENOUGH_ROWS = 4


class Weighed(NamedTuple):
  """Of one matrix: E[|g|^2 x] (d,), E[|g|^2 x x^T] and E[|x|^2 g g^T]."""

  mean: np.ndarray
  inputs: np.ndarray
  gradients: np.ndarray


@dataclasses.dataclass(frozen=True)
class Kernel:
  """One matrix of a leaf with the moments of its inputs, in float64.

  `second` and `gradient` are made anew at each use, so that of a stack of large
  kernels no more than those at work are held in float64.

  Attributes:
    path: the leaf's path.
    index: place in the leaf's group axes.
    w: (d, m).
    mean: mu (d,).
    count: rows that the moments are over.
    rows_per_example: rows that an example contributes; 0 without gradients.
    row_fisher: (d,) squared gradients of the rows of W; None without.
    from_outputs: whether T was measured and S is not known.
    sketched: makes what S is taken for, of a kernel with a sketch; else None.
    coupled: makes moments of inputs and gradients weighed by each other; None
      where they were not summed.
    centered: whether `second` is about the mean.
  """

  path: str
  index: tuple[int, ...]
  w: np.ndarray
  mean: np.ndarray
  count: int
  rows_per_example: float
  row_fisher: np.ndarray | None
  _second: Callable[[], np.ndarray]
  _gradient: Callable[[], np.ndarray] | None
  _in_basis: InputBasis
  from_outputs: bool = False
  sketched: Callable[[], Nystrom] | None = None
  coupled: Callable[[], Weighed] | None = None
  centered: bool = False

  @property
  def name(self) -> str:
    """Path, with the place in the stack in brackets where there is one."""
    return member_name(self.path, self.index)

  @property
  def second(self) -> np.ndarray:
    """S (d, d); centred if the kernels were asked for so.

    Raises:
      ValueError: the kernel was measured from the output side.
    """
    if self.from_outputs:
      raise unknown_inputs(self.path)
    return self._second()

  @property
  def gradient(self) -> np.ndarray | None:
    """G (m, m), second moment of the loss's gradient; None without."""
    return None if self._gradient is None else self._gradient()

  @property
  def in_basis(self) -> subspace.Basis:
    """Eigenbasis of S, made when called for; kernels that share an input
    share it."""
    if self.from_outputs:
      raise unknown_inputs(self.path)
    return self._in_basis()

  @property
  def in_spectrum(self) -> np.ndarray:
    """The values of `in_basis`, without its vectors."""
    if self.from_outputs:
      raise unknown_inputs(self.path)
    return self._in_basis.values()

  def out_spectrum(self) -> np.ndarray:
    """The values of `out_basis`, but for 1e-9 of them, without its vectors."""
    if self.from_outputs or self.sketched is not None:
      return self.out_basis.values
    wide = self.w.shape[1] > self.w.shape[0]
    t = best_pairs.reduced(self.w, self.second) if wide else self.out_second
    return np.maximum(eigh.eigenvalues(t)[::-1], 0)

  @functools.cached_property
  def out_second(self) -> np.ndarray:
    """T = W^T S W (m, m), or T as it was measured."""
    if self.from_outputs:
      return self._second()
    if self.sketched is not None:
      return self.w.T @ self.sketched().times(self.w)
    return self.w.T @ (self.second @ self.w)

  @functools.cached_property
  def out_basis(self) -> subspace.Basis:
    """Eigenbasis of T = W^T S W; what rounding put below zero is zero."""
    values, vectors = self.leading_outputs(None)
    return subspace.Basis(np.maximum(values, 0), vectors)

  def leading_outputs(self, most: int | None) -> subspace.Basis:
    """`out_basis`, with no more than the first `most` vectors and the values
    as they are: they add up to T's trace."""
    w = self.w
    if self.from_outputs:
      return subspace.measured_output_basis(w, self.out_second, most)
    if w.shape[1] > w.shape[0]:
      return subspace.output_basis(w, self.second, self.in_basis, None, most)
    return subspace.output_basis(w, self.second, None, self.out_second, most)

  def ranks(self, e_s: float, e_t: float) -> tuple[int, int]:
    """(k_S, k_T) at the given energies."""
    return (
      subspace.energy_rank(self.in_basis.values, e_s),
      subspace.energy_rank(self.out_basis.values, e_t),
    )

  def projected(self, e_s: float, e_t: float) -> np.ndarray:
    """W' = P_S W P_T at the given energies."""
    k_s, k_t = self.ranks(e_s, e_t)
    return subspace.project(
      self.w, self.in_basis.vectors[:, :k_s], self.out_basis.vectors[:, :k_t]
    )


def kernels(
  params: Any,
  moments: Moments,
  *,
  centered: bool = False,
  only: Iterable[str] | None = None,
) -> Iterator[tuple[str, Iterator[Kernel]]]:
  """Each leaf with its matrices, in the order they are computed in.

  What is asked for is checked at once; matrices are made as they are taken, so
  that of a stack no more are held in float64 than are at work.

  Args:
    params: parameters that hold the kernels.
    moments: moments collected for them.
    centered: use S - mu mu^T in place of S.
    only: paths to yield; default every path that has moments.

  Raises:
    ValueError: a path has no moments, is not in the parameters, or has other
      shapes there; a kernel or a moment is not finite.
  """
  named, _ = paths.flatten(params, is_low_rank)
  wanted = set(moments if only is None else only)
  for path in wanted:
    _check(path, named, moments)
  order = [path for path in moments if path in wanted]
  warn_if_few(moments, order)
  return _pairs(named, moments, order, centered)


def _check_finite(path: str, moment: Moment) -> None:
  """Raises ValueError for sums that are NaN or infinite."""
  is_finite = lambda tree: all(
    np.all(np.isfinite(np.asarray(a))) for a in jax.tree.leaves(tree)
  )
  sums = moment.sums
  why = ''
  if not is_finite((sums.total, sums.panels)):
    if moment.entry.side != 'output':
      why = f': what it reads {not_finite(sums.total)}'
  elif is_finite((moment.grad_panels, moment.row_grad, moment.coupled)):
    return
  raise ValueError(f'the moments of {path!r} hold NaN or infinite values{why}')


def _pairs(
  named: dict[str, Any], moments: Moments, order: list[str], centered: bool
) -> Iterator[tuple[str, Iterator[Kernel]]]:
  last = {moments[path].entry.index: path for path in order}
  shared: dict[int, list[InputBasis]] = {}
  for path in order:
    moment = moments[path]
    at = moment.entry.index
    leaf = np.asarray(named[path])
    if not np.all(np.isfinite(leaf)):
      raise ValueError(f'kernel {path!r} holds NaN or infinite values')
    _check_finite(path, moment)
    if at not in shared:
      shared[at] = _bases(moment, centered)
    yield path, _members(path, leaf, moment, centered, deque(shared[at]))
    if last[at] == path:
      del shared[at]


def _members(
  path: str,
  leaf: np.ndarray,
  moment: Moment,
  centered: bool,
  bases: deque[InputBasis],
) -> Iterator[Kernel]:
  """The matrices of a leaf; `bases`, one for each, are dropped one by one."""
  matrices = moment.layout.to_matrices(leaf)
  count = np.asarray(moment.count)
  gradient = moment.grad_panels
  fisher = None if moment.row_grad is None else np.asarray(moment.row_fisher)
  rows = None if gradient is None else np.asarray(moment.rows_per_example)
  from_outputs = moment.entry.side == 'output'
  for index in np.ndindex(*moment.layout.group_shape):
    w, basis = matrices[index].astype(np.float64), bases.popleft()
    n, make = max(int(count[index]), 1), basis.second
    if from_outputs:
      center, panels = basis.mean @ w if centered else None, moment.sums.panels
      assert not isinstance(panels, Sketch)
      make = functools.partial(_second, panels, index, n, center)
    coupled = moment.coupled
    yield Kernel(
      path,
      index,
      w,
      basis.mean,
      int(count[index]),
      0.0 if rows is None else float(rows[index]),
      None if fisher is None else fisher[index].astype(np.float64),
      make,
      None
      if gradient is None
      else functools.partial(_second, gradient, index, n, None),
      basis,
      from_outputs,
      basis.sketched,
      None
      if coupled is None
      else functools.partial(_coupled, coupled, index, n),
      centered,
    )


def _coupled(sums: Coupled, index: tuple[int, ...], count: int) -> Weighed:
  total = np.asarray(sums.total)[index][0].astype(np.float64) / count
  of = functools.partial(_second, index=index, count=count, mean=None)
  return Weighed(total, of(sums.inputs), of(sums.grads))


def _bases(moment: Moment, centered: bool) -> list[InputBasis]:
  """Of every matrix of a leaf, mu and the eigenbasis of S, in order."""
  count, total = (np.asarray(v) for v in (moment.count, moment.sums.total))
  found = []
  for index in np.ndindex(*moment.layout.group_shape):
    # What was never reached has no rows: moments of zero, not NaN.
    n = max(int(count[index]), 1)
    mean = total[index].astype(np.float64) / n
    center = mean if centered else None
    second = moment.sums.panels
    if isinstance(second, Sketch):
      known = functools.cache(
        functools.partial(moment.sketched, index, centered)
      )
      found.append(InputBasis(mean, functools.partial(_matrix, known), known))
      continue
    make = functools.partial(_second, second, index, n, center)
    found.append(InputBasis(mean, make))
  return found


def _second(
  panels: gram.Panels,
  index: tuple[int, ...],
  count: int,
  mean: np.ndarray | None,
):
  """One matrix of a leaf's sums of x x^T as a second moment, about the mean if
  there is one."""
  second = gram.whole(
    tuple(np.asarray(panel)[index].astype(np.float64) for panel in panels)
  )
  second /= count
  if mean is not None:
    second -= np.outer(mean, mean)
  return second


def _matrix(known: Callable[[], Nystrom]) -> np.ndarray:
  return known().matrix()


def member_name(path: str, index: tuple[int, ...]) -> str:
  """A leaf's path, with the place in its stack in brackets if it is one.

  >>> member_name('blocks/kernel', (3,)), member_name('head/kernel', ())
  ('blocks/kernel[3]', 'head/kernel')
  """
  return f'{path}[{",".join(map(str, index))}]' if index else path


@compat.moves_data  # in a thread too
def to_leaf(matrices: list[np.ndarray], layout: Layout, leaf: Any) -> Any:
  """One matrix per group as an array like `leaf`."""
  stacked = np.stack(matrices).reshape(layout.group_shape + layout.matrix_shape)
  return jax.device_put(layout.from_matrices(stacked).astype(leaf.dtype))


def _check(path: str, named: dict[str, Any], moments: Moments) -> None:
  if path not in moments:
    raise ValueError('no moments for ' + paths.unknown(path, moments))
  if path not in named:
    raise ValueError('no parameter ' + paths.unknown(path, named))
  leaf = named[path]
  if is_low_rank(leaf):
    raise ValueError(f'{path!r} is low-rank already; give the dense parameters')
  tracing.check_value(path, leaf)
  shape = moments[path].layout.shape
  if np.shape(leaf) != shape:
    raise ValueError(
      f'{path!r} has shape {np.shape(leaf)} but its moments were '
      f'collected for {shape}; collect them with these parameters'
    )


def scarce(
  moments: Moments, wanted: Iterable[str]
) -> list[tuple[float, str, int, int]]:
  """The kernels with less than `ENOUGH_ROWS` rows for every feature.

  Returns:
    Of each: rows per feature, path, rows, features.
  """
  few = []
  for path in wanted:
    rows = int(np.min(np.asarray(moments[path].count)))
    from_outputs = moments[path].entry.side == 'output'
    d = moments[path].layout.matrix_shape[from_outputs]
    if rows < ENOUGH_ROWS * d:
      few.append((rows / d, path, rows, d))
  return few


def warn_if_few(moments: Moments, wanted: list[str]) -> None:
  """One warning for all kernels that were measured on few rows."""
  few = scarce(moments, wanted)
  if few:
    _, path, rows, d = min(few)
    side = moments[path].entry.side
    warn(
      f'{path!r} was measured on {rows} rows for {d} {side} features; '
      f'below {ENOUGH_ROWS} rows each ({len(few)} of {len(wanted)} kernels) '
      'moments are noisy, and ranks no higher than the rows'
    )

"""Pairs the kernels of a parameter tree with their moments, checked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
import dataclasses
import functools
from typing import Any
import warnings

import jax.numpy as jnp
import numpy as np

from utilized_rank import lowrank
from utilized_rank import paths
from utilized_rank import subspace
from utilized_rank.layout import Layout
from utilized_rank.moments import Moments
from utilized_rank.moments import unknown_inputs


@dataclasses.dataclass(frozen=True)
class Kernel:
  """One matrix of a leaf with the moments of its inputs, in float64.

  Attributes:
    path: the leaf's path.
    index: place in the leaf's group axes.
    w: (d, m).
    mean: mu (d,).
    count: rows that the moments are over.
    gradient: G (m, m), second moment of the loss's gradient; None without.
    rows_per_example: rows that an example contributes; 0 without gradients.
    in_basis: eigenbasis of `second`, made when called for; kernels that share
      an input share it.
  """

  path: str
  index: tuple[int, ...]
  w: np.ndarray
  _second: np.ndarray | None
  mean: np.ndarray
  count: int
  gradient: np.ndarray | None
  rows_per_example: float
  _in_basis: Any
  _output_second: np.ndarray | None = None

  @property
  def second(self) -> np.ndarray:
    """S (d, d); centred if the kernels were asked for so.

    Raises:
      ValueError: the kernel was measured from the output side.
    """
    if self._second is None:
      raise unknown_inputs(self.path)
    return self._second

  @property
  def in_basis(self) -> subspace.Basis:
    if self._second is None:
      raise unknown_inputs(self.path)
    return self._in_basis()

  @functools.cached_property
  def out_basis(self) -> subspace.Basis:
    """Eigenbasis of T = W^T S W."""
    if self._output_second is not None:
      return subspace.measured_output_basis(self.w, self._output_second)
    wide = self.w.shape[1] > self.w.shape[0]
    return subspace.output_basis(
      self.w, self.second, self.in_basis if wide else None
    )

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
) -> Iterator[tuple[str, list[Kernel]]]:
  """Yields each leaf with its matrices, in the order they are computed in.

  Args:
    params: parameters that hold the kernels.
    moments: moments collected for them.
    centered: use S - mu mu^T in place of S.
    only: paths to yield; default every path that has moments.

  Raises:
    ValueError: a path has no moments, is not in the parameters, or has other
      shapes there; a kernel or a moment is not finite.
  """
  named, _ = paths.flatten(params, lowrank.is_low_rank)
  wanted = list(moments if only is None else only)
  for path in wanted:
    _check(path, named, moments)
  _warn_if_few([moments[p] for p in wanted], wanted)
  shared: dict[tuple[int, tuple[int, ...]], Any] = {}
  for path in [p for p in moments if p in set(wanted)]:
    moment = moments[path]
    layout = moment.layout
    leaf = np.asarray(named[path], np.float64)
    if not np.all(np.isfinite(leaf)):
      raise ValueError(f'kernel {path!r} holds NaN or infinite values')
    matrices = layout.to_matrices(leaf)
    mean = np.asarray(moment.mean, np.float64)
    from_outputs = moment.entry.side == 'output'
    if from_outputs:
      second = np.asarray(moment.output_second, np.float64)
      if centered:
        out = np.einsum('...d,...dm->...m', mean, matrices)
        second = second - out[..., :, None] * out[..., None, :]
    else:
      second = moment.covariance if centered else moment.second
      second = np.asarray(second, np.float64)
    count = np.asarray(moment.count)
    gradient = moment.grad_second
    if gradient is not None:
      gradient = np.asarray(gradient, np.float64)
      rows = np.asarray(moment.rows_per_example)
    if not (np.all(np.isfinite(second)) and np.all(np.isfinite(mean))):
      raise ValueError(f'the moments of {path!r} hold NaN or infinite values')
    members = []
    for index in np.ndindex(*layout.group_shape):
      key = moment.entry.index, index
      if key not in shared:
        shared[key] = functools.cache(
          functools.partial(subspace.input_basis, second[index])
        )
      members.append(
        Kernel(
          path,
          index,
          matrices[index],
          None if from_outputs else second[index],
          mean[index],
          int(count[index]),
          None if gradient is None else gradient[index],
          0.0 if gradient is None else float(rows[index]),
          shared[key],
          second[index] if from_outputs else None,
        )
      )
    yield path, members


def to_leaf(matrices: list[np.ndarray], layout: Layout, leaf: Any) -> Any:
  """One matrix per group as an array like `leaf`."""
  stacked = np.stack(matrices).reshape(layout.group_shape + layout.matrix_shape)
  return jnp.asarray(layout.from_matrices(stacked), leaf.dtype)


def _check(path: str, named: dict[str, Any], moments: Moments) -> None:
  if path not in moments:
    raise ValueError('no moments for ' + paths.unknown(path, moments))
  if path not in named:
    raise ValueError('no parameter ' + paths.unknown(path, named))
  leaf = named[path]
  if lowrank.is_low_rank(leaf):
    raise ValueError(f'{path!r} is low-rank already; give the dense parameters')
  shape = moments[path].layout.shape
  if tuple(leaf.shape) != shape:
    raise ValueError(
      f'{path!r} has shape {tuple(leaf.shape)} but its moments were '
      f'collected for {shape}; collect them with these parameters'
    )


def _warn_if_few(moments: list[Any], wanted: list[str]) -> None:
  short = []
  for path, moment in zip(wanted, moments, strict=True):
    from_outputs = moment.entry.side == 'output'
    d = moment.layout.matrix_shape[from_outputs]
    rows = int(np.min(np.asarray(moment.count)))
    if rows < d:
      features = 'output features' if from_outputs else 'input features'
      short.append((rows / d, path, rows, d, features))
  if short:
    _, path, rows, d, features = min(short)
    warnings.warn(
      f'{len(short)} kernels were measured on fewer rows than they have '
      f'features (worst: {path!r}, {rows} rows for {d} {features}); '
      f'ranks are then bounded by the rows: collect at least {d}, better '
      f'{4 * d} rows',
      stacklevel=3,
    )

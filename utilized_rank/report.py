"""What `measure` returns: the utilization of every layer, and their mean."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import json
import os
from typing import TYPE_CHECKING, Any

import numpy as np

from utilized_rank import files
from utilized_rank import paths
from utilized_rank import subspace
from utilized_rank import tables
from utilized_rank import threads
from utilized_rank.kernels import Kernel
from utilized_rank.kernels import kernels
from utilized_rank.kernels import member_name
from utilized_rank.moments import Moments
from utilized_rank.progress import track
from utilized_rank.ranks import check_energy
from utilized_rank.recipe import Recipe

if TYPE_CHECKING:
  from matplotlib.figure import Figure

ENERGIES = (0.9, 0.95, 0.99, 0.999)


@dataclasses.dataclass(frozen=True)
class LayerReport:
  """Utilization of one kernel, or of one member of a stack of kernels.

  Attributes:
    path: path of the leaf in the parameter tree, keys joined by `/`.
    index: place in the leaf's group axes (scan steps, experts); `()` for a
      leaf that holds one kernel.
    d_in: input features of the kernel seen as a matrix (d).
    d_out: output features of the kernel seen as a matrix (m).
    count: rows (samples x positions) that the moments were taken over.
    energy: share of the spectrum that `k_in` and `k_out` keep.
    k_in: k_S, directions of the input moment S that hold `energy`; None of a
      kernel that was measured from the output side, whose S is not known.
    k_out: k_T, directions of the output moment T that hold `energy`.
    spectrum_in: eigenvalues of S, shape (d_in,), descending; (0,) if S is not
      known.
    spectrum_out: eigenvalues of T, shape (d_out,), descending.
    error_projected: share of the output energy that the paper's
      W' = P_S W P_T loses, E|x(W - W')|^2 / E|xW|^2; None if S is not known.
    error_bound: the same share for the best factor pair of the same rank.
    number: in which pass over the batches it was measured, from 0.
    columns: of the sketch that S was measured by; 0 if it was measured whole.
      k_in is then the most that k_S can be; all else that is of S or T is what
      the sketch takes them for, `nystrom`.
    k_in_least: the least that k_S can be; None without a sketch.
    unseen: share of tr S that the sketch does not see; no directions hold more
      than that beside what is said here. 0 without a sketch.
  """

  path: str
  index: tuple[int, ...]
  d_in: int
  d_out: int
  count: int
  energy: float
  k_in: int | None
  k_out: int
  spectrum_in: np.ndarray
  spectrum_out: np.ndarray
  error_projected: float | None
  error_bound: float
  number: int = 0
  columns: int = 0
  k_in_least: int | None = None
  unseen: float = 0.0

  @property
  def side(self) -> str:
    """'input', 'output' or 'sketch': what was measured."""
    if self.k_in is None:
      return 'output'
    return 'sketch' if self.columns else 'input'

  @property
  def name(self) -> str:
    """Path, with the place in the stack in brackets where there is one."""
    return member_name(self.path, self.index)

  @property
  def rank(self) -> int:
    """r = min(k_S, k_T), the utilized rank; without k_S no less than it."""
    return _rank(self.k_in, self.k_out)

  @property
  def full_rank(self) -> int:
    return min(self.d_in, self.d_out)

  @property
  def rows_per_feature(self) -> float:
    """N over the features that were measured; below 4 moments are noisy."""
    return self.count / (self.d_out if self.k_in is None else self.d_in)

  @property
  def utilization(self) -> float:
    """r / min(d, m), in [0, 1]."""
    return self.rank / self.full_rank


class Report(Mapping[str, LayerReport]):
  """Utilization of every layer: a mapping from name to `LayerReport`.

  Names are leaf paths, with the place in brackets for members of a stack.
  `print(report)` is a table, `plot()` a figure, `json()` plain numbers and
  `html()` a page.

  Attributes:
    energy: share of the spectra that ranks are given at.
    centered: whether spectra are about the mean.
    recipe: how `compress` made the tree that it returned with this report;
      None from `measure`.
  """

  recipe: Recipe | None = None

  def __init__(
    self, layers: Sequence[LayerReport], energy: float, centered: bool
  ):
    self.energy = energy
    self.centered = centered
    self._layers = {layer.name: layer for layer in layers}

  def __getitem__(self, name: str) -> LayerReport:
    if name not in self._layers:
      raise KeyError('no layer ' + paths.unknown(name, self._layers))
    return self._layers[name]

  def __iter__(self) -> Iterator[str]:
    return iter(self._layers)

  def __len__(self) -> int:
    return len(self._layers)

  @property
  def layers(self) -> list[LayerReport]:
    """In the order the function computes them in."""
    return list(self._layers.values())

  @property
  def mean_layer_utilization(self) -> float:
    """MLU: the unweighted mean of r / min(d, m) over layers, in [0, 1]."""
    return float(np.mean([layer.utilization for layer in self.layers]))

  def utilization_at(self, energies: Sequence[float]) -> dict[float, float]:
    """MLU at other energies, from the same spectra."""
    return {e: float(np.mean(self.layers_at(e))) for e in energies}

  def layers_at(self, energy: float) -> np.ndarray:
    """Every layer's utilization at another energy, in their order."""
    check_energy(energy)
    return np.array(
      [_ranks_at(layer, energy)[2] / layer.full_rank for layer in self.layers]
    )

  def __str__(self) -> str:
    about = 'about the mean' if self.centered else 'uncentred'
    least = min(self.layers, key=lambda layer: layer.rows_per_feature)
    return '\n'.join(
      [
        tables.layer_table(self.layers),
        f'energy {self.energy}, spectra {about}; rows per input feature at '
        f'least {least.rows_per_feature:.3g} ({least.name})',
        *tables.how_collected(self.layers),
      ]
    )

  def html(
    self,
    runs: Sequence[Mapping[str, Any]] = (),
    meta: Mapping[str, Any] | None = None,
  ) -> str:
    """The report as one page that loads nothing; needs matplotlib.

    Args:
      runs: size, cost and accuracy of the dense model and of compressed
        ones, as `tables.run_table` takes them.
      meta: what else to say about the run, as `page.html` takes it.

    >>> open('report.html', 'w').write(report.html())  # doctest: +SKIP
    """
    from utilized_rank import page

    about = {'energy': self.energy, 'centered': self.centered, **(meta or {})}
    return page.html(self.layers, self.utilization_at(ENERGIES), runs, about)

  def plot(self) -> Figure:
    """Utilization of every layer along the model; needs matplotlib.

    >>> report.plot().savefig('depth.png')  # doctest: +SKIP
    """
    from utilized_rank import plots

    return plots.utilization_by_depth(self.layers)

  def json(self, energies: Sequence[float] = ENERGIES) -> dict[str, Any]:
    """The report as plain numbers, without the spectra."""
    return {
      'energy': self.energy,
      'centered': self.centered,
      'mean_layer_utilization': {
        str(e): u for e, u in self.utilization_at(energies).items()
      },
      'layers': [
        {
          'path': layer.name,
          'd_in': layer.d_in,
          'd_out': layer.d_out,
          'count': layer.count,
          'rows_per_feature': layer.rows_per_feature,
          'k_in': layer.k_in,
          'k_out': layer.k_out,
          'rank': layer.rank,
          'utilization': layer.utilization,
          'error_projected': layer.error_projected,
          'error_bound': layer.error_bound,
          'side': layer.side,
          'columns': layer.columns,
          'k_in_least': layer.k_in_least,
          'unseen': layer.unseen,
          'pass': layer.number,
        }
        for layer in self.layers
      ],
    }

  def save(self, path: str | os.PathLike[str]) -> None:
    """Writes the report, spectra included, as one JSON file.

    A file that is there is replaced, as a whole.
    """
    record = {
      'energy': self.energy,
      'centered': self.centered,
      'layers': [
        {
          **dataclasses.asdict(layer),
          'spectrum_in': layer.spectrum_in.tolist(),
          'spectrum_out': layer.spectrum_out.tolist(),
        }
        for layer in self.layers
      ],
    }
    files.write_text(path, json.dumps(record))

  @classmethod
  def load(cls, path: str | os.PathLike[str]) -> Report:
    """Reads what `save` wrote.

    Raises:
      ValueError: the file is damaged, or holds something else.
    """
    layer_of = lambda layer: LayerReport(
      **{
        **layer,
        'index': tuple(layer['index']),
        'spectrum_in': np.array(layer['spectrum_in']),
        'spectrum_out': np.array(layer['spectrum_out']),
      }
    )
    make = lambda record: cls(
      [layer_of(layer) for layer in record['layers']],
      record['energy'],
      record['centered'],
    )
    return files.read_json(path, 'utilization report', make)


def _ranks_at(layer: LayerReport, energy: float) -> tuple[int | None, int, int]:
  k_in, k_out = None, subspace.energy_rank(layer.spectrum_out, energy)
  if layer.k_in is not None:
    k_in = subspace.energy_rank(layer.spectrum_in, energy)
  return k_in, k_out, _rank(k_in, k_out)


def _rank(k_in: int | None, k_out: int) -> int:
  return k_out if k_in is None else min(k_in, k_out)


def measure(
  params: Any,
  moments: Moments,
  *,
  energy: float = 0.99,
  centered: bool = False,
  progress: bool = True,
) -> Report:
  """Measures each kernel's utilized rank.

  Args:
    params: dense parameters.
    moments: moments of their kernels.
    energy: share of each spectrum to keep, in (0, 1].
    centered: take the spectra about the mean; the paper's re-implementation
      does not, and a large mean then dominates the energy.
    progress: show a progress bar.

  Returns:
    A `Report` with k_S, k_T, r, utilization and spectra per layer. Of kernels
    that were measured from the output side k_S is not known, and r is k_T,
    which it cannot exceed.

  Raises:
    ValueError: the energy is outside (0, 1], or the moments are not of these
      parameters.

  >>> import jax.numpy as jnp, utilized_rank as ur
  >>> params = {'w': jnp.eye(4)}
  >>> x = jnp.tile(jnp.eye(4)[:1], (16, 1))
  >>> _, moments = ur.capture(lambda p, x: x @ p['w'])(params, x)
  >>> measure(params, moments)['w'].utilization
  0.25

  Source: arXiv 2407.04797.
  """
  check_energy(energy)
  every = (
    kernel
    for _, members in kernels(params, moments, centered=centered)
    for kernel in members
  )
  # A kernel that waits is no more than W in float64.
  layers = threads.ordered_map(
    lambda kernel: _layer(kernel, energy, moments), every, ahead=threads.FAR
  )
  if progress:
    total = sum(moments[path].layout.num_groups for path in moments)
    layers = track(layers, total=total, desc='measure', unit='kernel')
  return Report(list(layers), energy, centered)


def _layer(kernel: Kernel, energy: float, moments: Moments) -> LayerReport:
  d, m = kernel.w.shape
  t = kernel.out_basis
  k_out = subspace.energy_rank(t.values, energy)
  total = float(t.values.sum())
  k_in, spectrum_in = None, np.zeros(0)
  projected, least, unseen = None, None, 0.0
  if not kernel.from_outputs:
    s = kernel.in_basis
    k_in, spectrum_in = subspace.energy_rank(s.values, energy), s.values
    if kernel.sketched is not None:
      known = kernel.sketched()
      least, k_in = known.energy_ranks(energy)
      unseen = known.unseen / known.trace if known.trace > 0 else 0.0
    error = subspace.projected_error(kernel.w, s, k_in, t.vectors[:, :k_out])
    projected = error / total if total > 0 else 0.0
  rank = _rank(k_in, k_out)
  spectrum_out = np.zeros(m)
  spectrum_out[: len(t.values)] = t.values
  return LayerReport(
    kernel.path,
    kernel.index,
    d,
    m,
    kernel.count,
    energy,
    k_in,
    k_out,
    spectrum_in,
    spectrum_out,
    projected,
    float(t.values[rank:].sum()) / total if total > 0 else 0.0,
    moments[kernel.path].entry.number,
    moments[kernel.path].entry.columns,
    least,
    unseen,
  )

"""What `measure` returns: the utilization of every layer, and their mean."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import os
from typing import TYPE_CHECKING, Any

import numpy as np

from utilized_rank.host import files
from utilized_rank.host.progress import wrapped
from utilized_rank.linalg import subspace
from utilized_rank.linalg.subspace import check_energy
from utilized_rank.moments import coverage as coverages
from utilized_rank.moments.coverage import Coverage
from utilized_rank.report import look
from utilized_rank.report import tables
from utilized_rank.report.choice import Choice
from utilized_rank.report.layer import LayerReport
from utilized_rank.report.layer import utilized
from utilized_rank.storage.recipe import Recipe
from utilized_rank.tree import paths

if TYPE_CHECKING:
  from matplotlib.figure import Figure

ENERGIES = (0.9, 0.95, 0.99, 0.999)


class Report(Mapping[str, LayerReport]):
  """Utilization of every layer: a mapping from name to `LayerReport`.

  Names are leaf paths, with the place in brackets for members of a stack.
  `print(report)` is a table, `plot()` a figure, `json()` plain numbers and
  `html()` a page.

  Attributes:
    energy: share of the spectra that ranks are given at.
    centered: whether spectra are about the mean.
    coverage: which share of the parameters the layers hold, and the largest
      of the others; None where it is not known.
    recipe: how `compress` made the tree that it returned with this report;
      None from `measure`.
    choice: what `compress` chose, and what that took; None from `measure`.
  """

  recipe: Recipe | None = None
  choice: Choice | None = None

  def __init__(
    self,
    layers: Sequence[LayerReport],
    energy: float,
    centered: bool,
    coverage: Coverage | None = None,
  ):
    self.energy = energy
    self.centered = centered
    self.coverage = coverage
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

  def __repr__(self) -> str:
    mean = self.mean_layer_utilization if self else float('nan')
    return (
      f'<Report of {len(self)} layers: mean layer utilization {mean:.1%} at '
      f'energy {self.energy:g}>'
    )

  def _repr_html_(self) -> str:
    """What a notebook shows: the page in a frame; without matplotlib text."""
    return look.framed(self)

  def __str__(self) -> str:
    about = 'about the mean' if self.centered else 'uncentred'
    least = min(self.layers, key=lambda layer: layer.rows_per_feature)
    said = [
      f'energy {self.energy}, spectra {about}; rows per input feature at '
      f'least {least.rows_per_feature:.3g} ({least.name})',
      *tables.how_collected(self.layers),
    ]
    if self.coverage is not None:
      said.append(str(self.coverage))
    parts = [tables.layer_table(self.layers), *map(wrapped, said)]
    if self.choice is not None:
      parts += ['', str(self.choice)]
    return '\n'.join(parts)

  def html(
    self,
    runs: Sequence[Mapping[str, Any]] = (),
    meta: Mapping[str, Any] | None = None,
    energies: Sequence[float] = ENERGIES,
  ) -> str:
    """The report as one page that loads nothing; needs matplotlib.

    Args:
      runs: size, cost and accuracy of the dense model and of compressed
        ones, as `tables.run_table` takes them.
      meta: what else to say about the run, as `page.html` takes it.
      energies: shares of the spectra to give the MLU at.

    >>> open('report.html', 'w').write(report.html())  # doctest: +SKIP
    """
    from utilized_rank.report import page
    from utilized_rank.report import sections

    about: dict[str, Any] = {'energy': self.energy, 'centered': self.centered}
    if self.coverage is not None:
      about['coverage'] = str(self.coverage)
    about |= meta or {}
    more = {}
    if self.choice is not None:
      more['What compress chose'] = sections.chosen(self.choice)
    mlu = self.utilization_at(energies)
    return page.html(self.layers, mlu, runs, about, more)

  def plot(self) -> Figure:
    """Utilization of every layer along the model; needs matplotlib.

    >>> report.plot().savefig('depth.png')  # doctest: +SKIP
    """
    from utilized_rank.report import plots

    return plots.utilization_by_depth(self.layers)

  def json(self, energies: Sequence[float] = ENERGIES) -> dict[str, Any]:
    """The report as plain numbers, without the spectra."""
    return {
      'energy': self.energy,
      'centered': self.centered,
      'coverage': _record(self.coverage),
      'choice': _record(self.choice),
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
          'dependence': layer.dependence,
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
      'coverage': _record(self.coverage),
      'choice': _record(self.choice),
      'layers': [
        {
          **{f.name: getattr(layer, f.name) for f in dataclasses.fields(layer)},
          'projected': layer.error_projected,
          'spectrum_in': layer.spectrum_in.tolist(),
          'spectrum_out': layer.spectrum_out.tolist(),
        }
        for layer in self.layers
      ],
    }
    files.write_json(path, record)

  @classmethod
  def load(cls, path: str | os.PathLike[str]) -> Report:
    """Reads what `save` wrote.

    Raises:
      ValueError: the file is damaged, or holds something else.
    """
    layer_of = lambda layer: LayerReport(
      **{
        # The name that files of before 0.2.0 have.
        **{_RENAMED.get(k, k): v for k, v in layer.items()},
        'index': tuple(layer['index']),
        'spectrum_in': np.array(layer['spectrum_in']),
        'spectrum_out': np.array(layer['spectrum_out']),
      }
    )

    def make(record: Any) -> Report:
      made = cls(
        [layer_of(layer) for layer in record['layers']],
        record['energy'],
        record['centered'],
        coverages.from_record(record.get('coverage')),
      )
      made.choice = Choice.from_record(record.get('choice'))
      return made

    return files.read_json(path, 'utilization report', make)


def _record(known: Coverage | Choice | None) -> dict[str, Any] | None:
  return None if known is None else dataclasses.asdict(known)


_RENAMED = {'error_projected': 'projected'}


def _ranks_at(layer: LayerReport, energy: float) -> tuple[int | None, int, int]:
  k_in, k_out = None, subspace.energy_rank(layer.spectrum_out, energy)
  if layer.k_in is not None:
    k_in = subspace.energy_rank(layer.spectrum_in, energy)
  return k_in, k_out, utilized(k_in, k_out)

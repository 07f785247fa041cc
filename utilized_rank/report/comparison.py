"""Several reports side by side: models, trainings, seeds of a training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from utilized_rank.linalg.subspace import check_energy
from utilized_rank.report import depth
from utilized_rank.report import look
from utilized_rank.report import tables
from utilized_rank.report.repetitions import Spread
from utilized_rank.report.repetitions import percent
from utilized_rank.report.repetitions import spread
from utilized_rank.report.report import Report

if TYPE_CHECKING:
  from matplotlib.figure import Figure

ENERGIES = (0.9, 0.95, 0.99)


class Comparison(Mapping[str, tuple[Report, ...]]):
  """Reports by name; those that share a name are repetitions, such as seeds.

  `print(comparison)` is a table, `plot()` a figure by depth, `json()` plain
  numbers and `html()` a page.

  Attributes:
    energies: shares of the spectra that utilization is given at.
    centered: whether the spectra are about the mean.
  """

  def __init__(
    self,
    groups: Mapping[str, Sequence[Report]],
    energies: Sequence[float],
    centered: bool,
  ):
    self.energies = tuple(energies)
    self.centered = centered
    self._groups = {name: tuple(group) for name, group in groups.items()}

  def __getitem__(self, name: str) -> tuple[Report, ...]:
    return self._groups[name]

  def __iter__(self) -> Iterator[str]:
    return iter(self._groups)

  def __len__(self) -> int:
    return len(self._groups)

  def utilization(self, name: str, energy: float) -> np.ndarray:
    """r / min(d, m) at an energy, `(repetitions, layers)`."""
    return np.array([report.layers_at(energy) for report in self[name]])

  def mean_layer_utilization(self, name: str, energy: float) -> Spread:
    """MLU at an energy, over the repetitions."""
    return spread(self.utilization(name, energy).mean(axis=1))

  def by_depth(self, name: str, energy: float) -> list[tuple[str, Spread]]:
    """Mean utilization of every block, in order: its label, and the spread."""
    plan = depth.arrange(self[name][0].layers)
    column = np.array([int(place.x) for place in plan.places])
    values = self.utilization(name, energy)
    return [
      (label, spread(values[:, column == i].mean(axis=1)))
      for i, label in enumerate(plan.ticks)
    ]

  def by_kind(self, name: str, energy: float) -> list[tuple[str, Spread]]:
    """Mean utilization of every kind of kernel, over depth."""
    plan = depth.arrange(self[name][0].layers)
    kinds = np.array([place.kind for place in plan.places])
    values = self.utilization(name, energy)
    return [
      (kind, spread(values[:, kinds == kind].mean(axis=1)))
      for kind in plan.kinds
    ]

  def __repr__(self) -> str:
    return f'<Comparison of {", ".join(self)}>'

  def _repr_html_(self) -> str:
    """What a notebook shows: the page in a frame; without matplotlib text."""
    return look.framed(self)

  def __str__(self) -> str:
    about = 'about the mean' if self.centered else 'uncentred'
    repeated = max(len(group) for group in self.values()) > 1
    what = '  (mean ± standard deviation)' if repeated else ''
    parts = [f'mean layer utilization, spectra {about}{what}']
    parts.append(tables.text_table(*self.table()))
    energy = self.energies[-1]
    for title, table in self.details(energy).items():
      parts.append(f'\n{title}, energy {energy:g}')
      parts.append(tables.text_table(*table))
    return '\n'.join(parts)

  def table(self) -> tuple[list[str], list[list[str]]]:
    """MLU: titles, and a row for every name."""
    repeated = max(len(group) for group in self.values()) > 1
    rows = []
    for name, group in self.items():
      row = [name, str(len(group))] if repeated else [name]
      row += [
        percent(self.mean_layer_utilization(name, energy))
        for energy in self.energies
      ]
      rows.append(row)
    titles = ['', 'runs'] if repeated else ['']
    return [*titles, *(f'{energy:g}' for energy in self.energies)], rows

  def details(
    self, energy: float
  ) -> dict[str, tuple[list[str], list[list[str]]]]:
    """Tables by depth and by kind, where all names have the same ones."""
    found = {}
    for title, parts in (
      ('by depth', {name: self.by_depth(name, energy) for name in self}),
      (
        'by kind of kernel',
        {name: self.by_kind(name, energy) for name in self},
      ),
    ):
      labels = [[label for label, _ in column] for column in parts.values()]
      if all(each == labels[0] for each in labels):
        rows = [
          [label, *(percent(column[i][1]) for column in parts.values())]
          for i, label in enumerate(labels[0])
        ]
        found[title] = ['', *parts], rows
    return found

  def plot(self) -> Figure:
    """Utilization by depth, a panel for every energy; needs matplotlib.

    >>> comparison.plot().savefig('depth.png')  # doctest: +SKIP
    """
    from utilized_rank.report import comparison_plots

    first = next(iter(self.values()))[0]
    lines = {
      name: {energy: self.by_depth(name, energy) for energy in self.energies}
      for name in self
    }
    return comparison_plots.by_depth(lines, depth.arrange(first.layers).axis)

  def html(self, title: str = 'Utilized rank, compared') -> str:
    """The comparison as one page that loads nothing; needs matplotlib.

    >>> open('c.html', 'w').write(comparison.html())  # doctest: +SKIP
    """
    from utilized_rank.report import comparison_page

    energy = self.energies[-1]
    most = max(len(group) for group in self.values())
    facts = [
      f'{len(self)} compared',
      f'up to {most} runs each' if most > 1 else 'one run each',
      'spectra about the mean' if self.centered else 'uncentred',
    ]
    tables = {'Mean layer utilization by energy': self.table()} | {
      f'{name[0].upper()}{name[1:]}, energy {energy:g}': table
      for name, table in self.details(energy).items()
    }
    return comparison_page.html(title, facts, tables, self.plot(), most > 1)

  def json(self) -> dict[str, Any]:
    """Every number that the table and the plot show, as plain ones."""
    return {
      'centered': self.centered,
      'names': {
        name: {
          'runs': len(group),
          'energies': {
            str(energy): {
              'mean_layer_utilization': _plain(
                self.mean_layer_utilization(name, energy)
              ),
              'by_depth': _plain_parts(self.by_depth(name, energy)),
              'by_kind': _plain_parts(self.by_kind(name, energy)),
            }
            for energy in self.energies
          },
        }
        for name, group in self.items()
      },
    }


def compare(
  reports: Sequence[Report],
  names: Sequence[str] | None = None,
  *,
  energies: Sequence[float] = ENERGIES,
) -> Comparison:
  """Puts reports side by side, by their spectra.

  Args:
    reports: what `measure` returned, all centred or none.
    names: of the reports; those with the same name are repetitions (seeds) of
      one measurement and are averaged. None numbers them.
    energies: shares of the spectra, in (0, 1], to compare at.

  Returns:
    A `Comparison`; print it, or take its `plot()`, `html()` or `json()`.

  Raises:
    ValueError: there is no report or no energy, the names are not as many as
      the reports, some are centred and others not, or repetitions have other
      layers.

  >>> import jax.numpy as jnp, utilized_rank as ur
  >>> params = {'w': jnp.eye(4)}
  >>> x = jnp.repeat(jnp.eye(4)[:3], 5, axis=0)
  >>> def report(x):
  ...   _, moments = ur.capture(lambda p, x: x @ p['w'])(params, x)
  ...   return ur.measure(params, moments)
  >>> print(compare([report(x), report(x[:10])], ['all', 'some']))
  mean layer utilization, spectra uncentred
          0.9   0.95   0.99
  ─────────────────────────
  all   75.0%  75.0%  75.0%
  some  50.0%  50.0%  50.0%
  ...
  """
  reports = list(reports)
  if not reports:
    raise ValueError('no reports to compare: expected at least one')
  if not energies:
    raise ValueError('no energies to compare at: expected at least one')
  for energy in energies:
    check_energy(energy)
  if names is None:
    names = [f'report {i + 1}' for i in range(len(reports))]
  if len(names) != len(reports):
    raise ValueError(f'{len(names)} names for {len(reports)} reports')
  if len({report.centered for report in reports}) > 1:
    kinds = [
      f'{name} {"centred" if report.centered else "uncentred"}'
      for name, report in zip(names, reports, strict=True)
    ]
    raise ValueError(
      f'centred and uncentred reports do not compare: {", ".join(kinds)}'
    )
  groups: dict[str, list[Report]] = {}
  for name, report in zip(names, reports, strict=True):
    groups.setdefault(name, []).append(report)
  for name, group in groups.items():
    for report in group[1:]:
      if list(report) != list(group[0]):
        odd = sorted(set(report) ^ set(group[0])) or ['the order of layers']
        raise ValueError(
          f'the reports named {name!r} are of different layers ({odd[0]}); '
          'give them names of their own'
        )
  return Comparison(groups, energies, reports[0].centered)


def _plain(spread: Spread) -> dict[str, float | None]:
  # JSON has no NaN.
  std = spread.std if spread.runs > 1 else None
  return {
    'mean': spread.mean, 'std': std, 'min': spread.low, 'max': spread.high,
  }  # fmt: skip


def _plain_parts(parts: Sequence[tuple[str, Spread]]) -> list[dict[str, Any]]:
  return [{'name': name, **_plain(spread)} for name, spread in parts]

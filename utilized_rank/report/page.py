"""A utilization report as one HTML page that loads nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import json
from typing import Any

import numpy as np

from utilized_rank.report import depth
from utilized_rank.report import look
from utilized_rank.report import plots
from utilized_rank.report import tables
from utilized_rank.report.frame import document
from utilized_rank.report.frame import section
from utilized_rank.report.layer import LayerReport
from utilized_rank.report.look import escape
from utilized_rank.report.sections import layers_table

META_KEYS = (
  'title',
  'config',
  'versions',
  'seconds',
  'centered',
  'energy',
  'coverage',
)

_TERMS = (
  (
    'k_S',
    'directions of the layer’s inputs that hold the chosen share of their '
    'energy',
  ),
  ('k_T', 'directions of the layer’s outputs that hold the same share'),
  ('r', 'the utilized rank, the smaller of k_S and k_T'),
  (
    'Utilization',
    'r as a share of the largest rank the kernel could have, min(d_in, d_out)',
  ),
  ('MLU', 'mean layer utilization, every layer counting the same'),
  (
    'Energy',
    'the share of the spectrum (the sum of eigenvalues of the second moment) '
    'that is kept',
  ),
)


def html(
  layers: Sequence[LayerReport],
  mlu: Mapping[float, float],
  runs: Sequence[Mapping[str, Any]] = (),
  meta: Mapping[str, Any] | None = None,
  more: Mapping[str, str] | None = None,
) -> str:
  """A complete page: headline numbers, tables and plots.

  The page loads nothing: styles, pictures (SVG) and the script that sorts
  the table are inside. It follows the reader's light or dark mode.

  Args:
    layers: the layers in model order.
    mlu: energy to mean layer utilization at that energy.
    runs: as for `tables.run_table`; empty where nothing was compressed.
    meta: any of `title`, `config` (name, or a mapping of settings),
      `versions` (package to version), `seconds` (stage to seconds),
      `centered` (whether the moments were), `energy` (of the layers),
      `coverage` (which parameters they are, in a line).
    more: further sections, HTML by title, before those of the layers.

  Raises:
    ValueError: there is no layer, a run lacks a key, or `meta` has a key
      that is not known.
    ImportError: matplotlib is not installed.

  >>> open('report.html', 'w').write(html(layers, mlu))  # doctest: +SKIP
  """
  tables.check_layers(layers)
  meta = dict(meta or {})
  tables.check_runs(runs)
  unknown = sorted(set(meta) - set(META_KEYS))
  if unknown:
    raise ValueError(
      f'meta has unknown keys {unknown}; known are {list(META_KEYS)}'
    )
  title = str(meta.get('title') or 'Utilized rank')
  energy = float(meta.get('energy') or layers[0].energy)
  sections = [
    _heading(title, layers, energy, meta),
    _tiles(layers, mlu, runs),
    _terms(),
  ]
  if runs:
    sections.append(section('Size and accuracy', _run_section(runs)))
  sections += [section(name, body) for name, body in (more or {}).items()]
  sections += [
    section('Utilization by depth', _depth_section(layers)),
    section('Spectra', _spectra_section(layers, energy)),
    section('Layers', layers_table(layers)),
  ]
  details = _details(meta)
  return document(title, '\n'.join([*sections, details]))


def _heading(
  title: str,
  layers: Sequence[LayerReport],
  energy: float,
  meta: Mapping[str, Any],
) -> str:
  facts = []
  if isinstance(meta.get('config'), str):
    facts.append(meta['config'])
  facts.append(f'{len(layers)} layer' + 's' * (len(layers) != 1))
  rows = sorted({layer.count for layer in layers})
  spread = ' to '.join(f'{count:,}' for count in rows[:: max(1, len(rows) - 1)])
  each = min(layer.rows_per_feature for layer in layers)
  facts.append(f'moments over {spread} rows, {each:.3g} or more per feature')
  if 'centered' in meta:
    facts.append('centred' if meta['centered'] else 'uncentred')
  facts.append(f'energy {energy:g}')
  facts.extend(tables.how_collected(layers))
  if meta.get('coverage'):
    facts.append(meta['coverage'])
  line = ' · '.join(escape(fact) for fact in facts)
  return f'<header><h1>{escape(title)}</h1>\n<p class="sub">{line}</p></header>'


def _tiles(
  layers: Sequence[LayerReport],
  mlu: Mapping[float, float],
  runs: Sequence[Mapping[str, Any]],
) -> str:
  mean = float(np.mean([layer.utilization for layer in layers]))
  tiles = [
    (
      f'{100 * mean:.1f}%',
      'mean layer utilization',
      f'at energy {tables.energies(layers)}',
    )
  ]
  if runs:
    dense, *small = runs
    tiles.append(
      (
        tables.percent(dense['test_accuracy']),
        'dense test accuracy',
        f'{tables.counted(dense)}{tables.unit_count(dense["params"])} '
        'parameters',
      )
    )
    for run in small:
      method = f', {run["method"]}' if run.get('method') else ''
      tiles.append(
        (
          tables.percent(run['test_accuracy']),
          f'with {100 * run["params_fraction"]:.3g}% of block kernels{method}',
          f'{tables.counted(run)}{tables.points_gained(run, dense)} points',
        )
      )
  else:
    low = min(layers, key=lambda layer: layer.utilization)
    high = max(layers, key=lambda layer: layer.utilization)
    short = depth.relative_names(layers)[2]
    names = dict(zip([layer.name for layer in layers], short, strict=True))
    for layer, what in ((low, 'lowest'), (high, 'highest')):
      tiles.append((f'{100 * layer.utilization:.1f}%', what, names[layer.name]))
  cells = ''.join(
    f'<div class="tile"><b>{escape(value)}</b><span>{escape(label)}</span>'
    f'<small>{escape(note)}</small></div>'
    for value, label, note in tiles
  )
  return f'<div class="tiles">{cells}</div>\n{_mlu_table(mlu)}'


def _mlu_table(mlu: Mapping[float, float]) -> str:
  if not mlu:
    return ''
  energies = sorted(mlu)
  head = ''.join(f'<th scope="col">{energy:g}</th>' for energy in energies)
  cells = ''.join(f'<td>{100 * mlu[energy]:.1f}%</td>' for energy in energies)
  return (
    '<div class="scroll"><table class="mlu"><tr><th scope="row">Energy</th>'
    f'{head}</tr><tr><th scope="row">MLU</th>{cells}</tr></table></div>'
  )


def _terms() -> str:
  items = ''.join(
    f'<div><dt>{look.math(term)}</dt><dd>{look.math(meaning)}.</dd></div>'
    for term, meaning in _TERMS
  )
  return (
    '<details class="terms" open><summary>What the terms mean</summary>'
    f'<dl>{items}</dl></details>'
  )


def _run_section(runs: Sequence[Mapping[str, Any]]) -> str:
  titles, rows = tables.run_cells(runs)
  groups: list[list[Any]] = []
  for title in titles:
    if title:
      groups.append([title, 1])
    else:
      groups[-1][1] += 1
  intervals = ''
  if tables.INTERVAL in titles:
    intervals = (
      f' Of {runs[0]["test_count"]:,} test images; the interval is Wilson’s, '
      'for the share of all such images.'
    )
  names = {
    'before': 'accuracy before fine-tuning',
    'accuracy': 'accuracy after fine-tuning',
    'vs dense': 'points vs dense',
  }
  head = ''.join(
    f'<th scope="col" colspan="{span}">{escape(names.get(title, title))}</th>'
    for title, span in groups
  )
  body, share = '', ' class="share"'
  for name, *cells in rows:
    body += f'<tr><th scope="row">{escape(name)}</th>'
    body += ''.join(
      f'<td{"" if title else share}>{escape(cell)}</td>'
      for title, cell in zip(titles[1:], cells, strict=True)
    )
    body += '</tr>\n'
  table = (
    f'<div class="scroll"><table class="runs"><thead><tr>{head}</tr></thead>'
    f'<tbody>{body}</tbody></table></div>'
  )
  batch = runs[0].get('latency_batch_size')
  many = f', {batch} images a call' if batch else ''
  note = (
    '<p class="note">Parameters are those of the whole model, FLOPs those of '
    f'one image. Latency is milliseconds an image{many}, on the device below: '
    'one measurement, which another run may find otherwise. Percentages '
    f'compare with the dense model.{intervals}</p>'
  )
  if runs[0]['test_accuracy'] is None:
    return table + note
  picture = look.inline(
    plots.accuracy_by_size(runs),
    'size',
    'Test accuracy against number of parameters',
  )
  return f'{table}{note}<div class="plot">{picture}</div>'


def _depth_section(layers: Sequence[LayerReport]) -> str:
  picture = look.inline(
    plots.utilization_by_depth(layers),
    'depth',
    'Layer utilization along the model, by kind of kernel',
  )
  return f'<div class="plot">{picture}</div>'


def _spectra_section(layers: Sequence[LayerReport], energy: float) -> str:
  figures = plots.spectra_by_kind(layers, energy)
  panels = ''.join(
    '<div class="panel">'
    f'{look.inline(figure, f"s{i}", f"Spectra of {kind}")}</div>'
    for i, (kind, figure) in enumerate(figures.items())
  )
  key = ''
  if len(layers) > 1:
    key = (
      f'<span class="ramp" style="--ramp: {", ".join(look.DEPTH_COLORS)}">'
      'first layer <i></i> last layer</span>'
    )
  line = ''
  if energy < 1:
    line = (
      ' Where a curve crosses the dashed line lies the share of directions'
      f' that hold {100 * energy:g}% of the energy.'
    )
  return (
    '<p class="note">Energy outside the leading directions, against the share '
    f'of directions kept.{line} {key}</p><div class="panels">{panels}</div>'
  )


def _details(meta: Mapping[str, Any]) -> str:
  blocks = ''
  seconds = {
    stage: f'{value:,.1f} s' for stage, value in meta.get('seconds', {}).items()
  }
  for name, table in (('Seconds', seconds), ('Versions', meta.get('versions'))):
    if table:
      rows = ''.join(
        f'<tr><th scope="row">{escape(key)}</th><td>{escape(value)}</td></tr>'
        for key, value in table.items()
      )
      blocks += f'<div><h3>{name}</h3><table>{rows}</table></div>'
  config = meta.get('config')
  if config is not None:
    if not isinstance(config, str):
      config = json.dumps(config, indent=2, default=str, ensure_ascii=False)
    blocks += f'<div><h3>Config</h3><pre>{escape(config)}</pre></div>'
  if not blocks:
    return ''
  return (
    '<details class="about"><summary>Configuration, versions, seconds per '
    f'stage</summary><div class="columns">{blocks}</div></details>'
  )

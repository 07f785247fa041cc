"""A utilization report as text for terminals and logs, and as one HTML page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
import html as html_lib
import io
import json
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from utilized_rank import plots

if TYPE_CHECKING:
  from matplotlib.figure import Figure

  from utilized_rank.report import LayerReport

META_KEYS = ('title', 'config', 'versions', 'seconds', 'centered', 'energy')
RUN_KEYS = (
  'params_fraction',
  'params',
  'flops',
  'latency_ms',
  'test_accuracy',
  'test_accuracy_before_finetune',
)

_LINE = 100
_BAR = 10
_MISSING = '–'

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


def layer_table(layers: Sequence[LayerReport]) -> str:
  """Utilization of every layer as a text table, for terminals and logs.

  What all paths begin and end with is said once, above. Lines take about 100
  columns: long names lose their middle, but stay different from each other.

  Args:
    layers: the layers, in the order of the lines.

  Raises:
    ValueError: there is no layer.

  >>> print(layer_table(report.layers))  # doctest: +SKIP
  """
  _need(layers)
  prefix, suffix, names = _names(layers)
  counts = [
    [f'{getattr(layer, key):d}' for layer in layers]
    for key in ('d_in', 'd_out', 'k_in', 'k_out', 'rank')
  ]
  shares = [f'{100 * layer.utilization:.1f}%' for layer in layers]
  columns = [
    _aligned(title, cells)
    for title, cells in zip(
      ('d_in', 'd_out', 'k_S', 'k_T', 'r', 'used'),
      [*counts, shares],
      strict=True,
    )
  ]
  bars = ['', *(_bar(layer.utilization) for layer in layers)]
  room = _LINE - sum(len(column[0]) + 2 for column in columns) - 2 - _BAR
  names = ['layer', *_abbreviate(names, room)]
  width = max(map(len, names))
  rows = zip((n.ljust(width) for n in names), *columns, bars, strict=True)
  lines = ['  '.join(row).rstrip() for row in rows]
  rule = '─' * (max(map(len, lines[1:])))
  mean = float(np.mean([layer.utilization for layer in layers]))
  noun = 'layer' if len(layers) == 1 else 'layers'
  head = [f'layers: {prefix}…{suffix}'] if prefix or suffix else []
  return '\n'.join(
    [
      *head,
      lines[0],
      rule,
      *lines[1:],
      rule,
      f'mean layer utilization {100 * mean:.1f}%'
      f'  ({len(layers)} {noun}, energy {_energies(layers)})',
    ]
  )


def run_table(runs: Sequence[Mapping[str, Any]]) -> str:
  """Size, cost and accuracy of the dense and the compressed models, as text.

  Args:
    runs: the dense model first. Keys: `params_fraction` (of the block
      kernels), `params` (whole model), `flops` (per example), `latency_ms`,
      `test_accuracy` and `test_accuracy_before_finetune` (shares in [0, 1]),
      and `method` where several are compared. A value that is not known is
      None.

  Raises:
    ValueError: there is no run, or a run lacks a key; the message names both.
  """
  if not runs:
    raise ValueError('no runs: expected the dense model first')
  _check_runs(runs)
  titles, rows = _run_cells(runs)
  columns = [
    _aligned(title, cells, left=title == 'model')
    for title, cells in zip(titles, zip(*rows, strict=True), strict=True)
  ]
  lines = ['  '.join(row).rstrip() for row in zip(*columns, strict=True)]
  return '\n'.join([lines[0], '─' * max(map(len, lines)), *lines[1:]])


def html(
  layers: Sequence[LayerReport],
  mlu: Mapping[float, float],
  runs: Sequence[Mapping[str, Any]] = (),
  meta: Mapping[str, Any] | None = None,
) -> str:
  """A complete page: headline numbers, tables and plots.

  The page loads nothing: styles, pictures (SVG) and the script that sorts
  the table are inside. It follows the reader's light or dark mode.

  Args:
    layers: the layers in model order.
    mlu: energy to mean layer utilization at that energy.
    runs: as for `run_table`; empty where nothing was compressed.
    meta: any of `title`, `config` (name, or a mapping of settings),
      `versions` (package to version), `seconds` (stage to seconds),
      `centered` (whether the moments were), `energy` (of the layers).

  Raises:
    ValueError: there is no layer, a run lacks a key, or `meta` has a key
      that is not known.
    ImportError: matplotlib is not installed.

  >>> page = html(report.layers, {0.99: 0.35})  # doctest: +SKIP
  """
  _need(layers)
  meta = dict(meta or {})
  _check_runs(runs)
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
    sections.append(_section('Size and accuracy', _run_section(runs)))
  sections += [
    _section('Utilization by depth', _depth_section(layers)),
    _section('Spectra', _spectra_section(layers, energy)),
    _section('Layers', _layer_section(layers)),
  ]
  details = _details(meta)
  return _PAGE.format(
    title=_text(title),
    style=_STYLE,
    body='\n'.join([*sections, details]),
    script=_SCRIPT,
  )


def _need(layers: Sequence[LayerReport]) -> None:
  if not layers:
    raise ValueError('no layers to show: expected at least one LayerReport')


def _check_runs(runs: Sequence[Mapping[str, Any]]) -> None:
  for number, run in enumerate(runs):
    missing = [key for key in RUN_KEYS if key not in run]
    if missing:
      raise ValueError(f'runs[{number}] lacks {missing}; it has {list(run)}')


def _names(layers: Sequence[LayerReport]) -> tuple[str, str, list[str]]:
  """What all paths share at both ends, and what is left of each name."""
  front, back = plots.shared_ends(layer.path for layer in layers)
  parts = layers[0].path.split('/')
  prefix = ''.join(part + '/' for part in parts[:front])
  suffix = ''.join('/' + part for part in parts[len(parts) - back :])
  return prefix, suffix, [
    '/'.join(layer.path.split('/')[front : len(layer.path.split('/')) - back])
    + layer.name[len(layer.path) :]
    for layer in layers
  ]  # fmt: skip


def _abbreviate(names: Sequence[str], room: int) -> list[str]:
  """Shortens long parts of the names until they fit and still differ."""

  def cut(part: str, limit: int) -> str:
    if len(part) <= limit:
      return part
    back = limit // 2
    return f'{part[: limit - 1 - back]}…{part[len(part) - back :]}'

  best = list(names)
  longest = max(len(part) for name in names for part in name.split('/'))
  for limit in range(longest - 1, 6, -1):
    if max(map(len, best)) <= room:
      break
    shorter = ['/'.join(cut(p, limit) for p in n.split('/')) for n in names]
    if len(set(shorter)) < len(set(names)):
      break
    best = shorter
  return best


def _aligned(title: str, cells: Iterable[str], left: bool = False) -> list[str]:
  column = [title, *cells]
  width = max(map(len, column))
  return [c.ljust(width) if left else c.rjust(width) for c in column]


def _bar(share: float) -> str:
  """Up to ten blocks, in eighths; a share above zero is never invisible."""
  eighths = max(round(share * _BAR * 8), 1 if share > 0 else 0)
  whole, part = divmod(eighths, 8)
  return '█' * whole + (' ▏▎▍▌▋▊▉'[part] if part else '')


def _energies(layers: Sequence[LayerReport]) -> str:
  low = min(layer.energy for layer in layers)
  high = max(layer.energy for layer in layers)
  return f'{low:g}' if low == high else f'{low:g} to {high:g}'


def _run_cells(
  runs: Sequence[Mapping[str, Any]],
) -> tuple[list[str], list[list[str]]]:
  """Titles and cells of the runs' table, shared by text and HTML."""
  dense = runs[0]
  rows = []
  for run in runs:
    name = f'{100 * run["params_fraction"]:.3g}% of block kernels'
    if run.get('method'):
      name += f', {run["method"]}'
    before = run['test_accuracy_before_finetune']
    rows.append(
      [
        'dense' if run is dense else name,
        _count(run['params']),
        _ratio(run['params'], dense['params']),
        _unit(run['flops']),
        _ratio(run['flops'], dense['flops']),
        _number(run['latency_ms'], '.3g', ' ms'),
        _ratio(run['latency_ms'], dense['latency_ms']),
        _MISSING if run is dense else _share(before),
        _share(run['test_accuracy']),
        _MISSING if run is dense else _points(run, dense),
      ]
    )
  titles = ['model', 'params', '', 'FLOPs', '', 'latency', '']
  return [*titles, 'before', 'accuracy', 'vs dense'], rows


def _count(value: float | None) -> str:
  return _number(value, ',.0f')


def _unit(value: float | None) -> str:
  return _MISSING if value is None else plots.short_count(value)


def _share(value: float | None) -> str:
  return _number(None if value is None else 100 * value, '.2f', '%')


def _number(value: float | None, form: str, unit: str = '') -> str:
  return _MISSING if value is None else f'{value:{form}}{unit}'


def _ratio(value: float | None, whole: float | None) -> str:
  if value is None or not whole:
    return _MISSING
  return f'{100 * value / whole:.0f}%'


def _points(run: Mapping[str, Any], dense: Mapping[str, Any]) -> str:
  """Accuracy against dense, in percentage points, always with a sign."""
  if run['test_accuracy'] is None or dense['test_accuracy'] is None:
    return _MISSING
  gap = round(100 * (run['test_accuracy'] - dense['test_accuracy']), 2)
  return f'{gap + 0.0:+.2f}'.replace('-', '−')


def _text(value: Any) -> str:
  return html_lib.escape(str(value), quote=True)


def _section(title: str, body: str) -> str:
  return f'<section><h2>{_text(title)}</h2>\n{body}\n</section>'


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
  facts.append(f'moments over {spread} rows')
  if 'centered' in meta:
    facts.append('centred' if meta['centered'] else 'uncentred')
  facts.append(f'energy {energy:g}')
  line = ' · '.join(_text(fact) for fact in facts)
  return f'<header><h1>{_text(title)}</h1>\n<p class="sub">{line}</p></header>'


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
      f'at energy {_energies(layers)}',
    )
  ]
  if runs:
    dense, *small = runs
    tiles.append(
      (
        _share(dense['test_accuracy']),
        'dense test accuracy',
        f'{_unit(dense["params"])} parameters',
      )
    )
    for run in small:
      method = f', {run["method"]}' if run.get('method') else ''
      cost = [f'{_points(run, dense)} points']
      if run['latency_ms'] and dense['latency_ms']:
        cost.append(f'{dense["latency_ms"] / run["latency_ms"]:.2f}× speed')
      tiles.append(
        (
          _share(run['test_accuracy']),
          f'with {100 * run["params_fraction"]:.3g}% of block kernels{method}',
          ', '.join(cost),
        )
      )
  else:
    low = min(layers, key=lambda layer: layer.utilization)
    high = max(layers, key=lambda layer: layer.utilization)
    names = dict(
      zip([layer.name for layer in layers], _names(layers)[2], strict=True)
    )
    for layer, what in ((low, 'lowest'), (high, 'highest')):
      tiles.append(
        (f'{100 * layer.utilization:.1f}%', what, names[layer.name])
      )
  cells = ''.join(
    f'<div class="tile"><b>{_text(value)}</b><span>{_text(label)}</span>'
    f'<small>{_text(note)}</small></div>'
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
    f'<div><dt>{_math(term)}</dt><dd>{_math(meaning)}.</dd></div>'
    for term, meaning in _TERMS
  )
  return (
    '<details class="terms" open><summary>What the terms mean</summary>'
    f'<dl>{items}</dl></details>'
  )


def _math(text: str) -> str:
  """Escapes, and sets r, k_S, d_in as symbols, with the index below."""
  text = re.sub(r'\br\b', '<i>r</i>', _text(text))
  return re.sub(r'\b([kd])_(\w+)', r'<i>\1</i><sub>\2</sub>', text)


def _run_section(runs: Sequence[Mapping[str, Any]]) -> str:
  titles, rows = _run_cells(runs)
  groups: list[list[Any]] = []
  for title in titles:
    if title:
      groups.append([title, 1])
    else:
      groups[-1][1] += 1
  names = {
    'before': 'accuracy before fine-tuning',
    'accuracy': 'accuracy after fine-tuning',
    'vs dense': 'points vs dense',
  }
  head = ''.join(
    f'<th scope="col" colspan="{span}">{_text(names.get(title, title))}</th>'
    for title, span in groups
  )
  body = ''
  for name, *cells in rows:
    body += f'<tr><th scope="row">{_text(name)}</th>'
    body += ''.join(f'<td>{_text(cell)}</td>' for cell in cells) + '</tr>\n'
  table = (
    f'<div class="scroll"><table class="runs"><thead><tr>{head}</tr></thead>'
    f'<tbody>{body}</tbody></table></div>'
  )
  note = (
    '<p class="note">Parameters are those of the whole model, FLOPs and '
    'latency as measured for this run; percentages compare with the dense '
    'model.</p>'
  )
  if runs[0]['test_accuracy'] is None:
    return table + note
  picture = _svg(
    plots.accuracy_by_size(runs),
    'size',
    'Test accuracy against number of parameters',
  )
  return f'{table}{note}<div class="plot">{picture}</div>'


def _depth_section(layers: Sequence[LayerReport]) -> str:
  picture = _svg(
    plots.utilization_by_depth(layers),
    'depth',
    'Layer utilization along the model, by kind of kernel',
  )
  return f'<div class="plot">{picture}</div>'


def _spectra_section(layers: Sequence[LayerReport], energy: float) -> str:
  figures = plots.spectra_by_kind(layers, energy)
  panels = ''.join(
    f'<div class="panel">{_svg(figure, f"s{i}", f"Spectra of {kind}")}</div>'
    for i, (kind, figure) in enumerate(figures.items())
  )
  key = ''
  if len(layers) > 1:
    key = '<span class="ramp">first layer <i></i> last layer</span>'
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


def _layer_section(layers: Sequence[LayerReport]) -> str:
  prefix, suffix, names = _names(layers)
  titles = ['layer', 'd_in', 'd_out', 'k_S', 'k_T', 'r', 'utilization']
  titles += ['error, projected', 'error, best pair']
  head = ''.join(
    f'<th scope="col"><button>{_math(title)}</button></th>' for title in titles
  )
  body = []
  for layer, name in zip(layers, names, strict=True):
    counts = (layer.d_in, layer.d_out, layer.k_in, layer.k_out, layer.rank)
    share = 100 * layer.utilization
    cells = ''.join(f'<td data-v="{v}">{v:,}</td>' for v in counts)
    errors = ''.join(
      f'<td data-v="{value!r}">{_error(value)}</td>'
      for value in map(float, (layer.error_projected, layer.error_bound))
    )
    # Breaks after the slashes only, so that names wrap on a phone.
    shown = _text(name).replace('/', '/<wbr>')
    body.append(
      f'<tr><th scope="row" title="{_text(layer.name)}">{shown}</th>{cells}'
      f'<td class="bar" data-v="{share:.6g}">'
      f'<i style="--w:{share:.1f}%"></i>{share:.1f}%</td>{errors}</tr>'
    )
  shared = ''
  if prefix or suffix:
    shared = f' Names stand for <code>{_text(f"{prefix}…{suffix}")}</code>.'
  return (
    '<p class="note">Errors are shares of the layer’s output energy: lost by '
    'the projection onto the utilized directions, and by the best pair of '
    f'factors of the same rank.{shared}</p>'
    '<div class="scroll tall"><table class="layers" id="layers" '
    f'style="--name:{max(map(len, names)) + 2}ch">'
    f'<thead><tr>{head}</tr></thead>\n<tbody>{"".join(body)}</tbody></table>'
    '</div>'
  )


def _error(value: float) -> str:
  return _MISSING if np.isnan(value) else f'{100 * value:.2g}%'


def _details(meta: Mapping[str, Any]) -> str:
  blocks = ''
  seconds = {
    stage: f'{value:,.1f} s' for stage, value in meta.get('seconds', {}).items()
  }
  for name, table in (('Seconds', seconds), ('Versions', meta.get('versions'))):
    if table:
      rows = ''.join(
        f'<tr><th scope="row">{_text(key)}</th><td>{_text(value)}</td></tr>'
        for key, value in table.items()
      )
      blocks += f'<div><h3>{name}</h3><table>{rows}</table></div>'
  config = meta.get('config')
  if config is not None:
    if not isinstance(config, str):
      config = json.dumps(config, indent=2, default=str, ensure_ascii=False)
    blocks += f'<div><h3>Config</h3><pre>{_text(config)}</pre></div>'
  if not blocks:
    return ''
  return (
    '<details class="about"><summary>Configuration, versions, seconds per '
    f'stage</summary><div class="columns">{blocks}</div></details>'
  )


def _svg(figure: Figure, name: str, label: str) -> str:
  """The figure as inline SVG in the page's own colours and font."""
  import matplotlib

  stream = io.StringIO()
  # Text stays text: it can be searched, and takes the page's font.
  with matplotlib.rc_context({'svg.fonttype': 'none', 'svg.hashsalt': name}):
    figure.savefig(
      stream,
      format='svg',
      transparent=True,
      metadata={'Date': None, 'Creator': None, 'Format': None, 'Type': None},
    )
  text = stream.getvalue()
  text = text[text.index('<svg') :]
  text = re.sub(r'<metadata>.*?</metadata>', '', text, flags=re.DOTALL)
  # Inside HTML the namespaces are implied, and no address remains.
  text = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', '', text)
  text = text.replace('xlink:href=', 'href=')
  # Ids of several pictures share one page.
  text = re.sub(r'(\bid="|url\(#|href="#)', rf'\g<1>{name}-', text)
  text = re.sub(r'(<svg[^>]*?)\s+width="[^"]*"', r'\1', text, count=1)
  text = re.sub(r'(<svg[^>]*?)\s+height="[^"]*"', r'\1', text, count=1)
  text = re.sub(r'font: ([^;"]*?px) [^;"]*', r'font: \1 var(--font)', text)
  for color, variable in (
    (plots.INK, '--ink'),
    (plots.MUTED, '--muted'),
    (plots.GRID, '--grid'),
  ):
    text = text.replace(color, f'var({variable})')
  # A hundredth of a point is below what a screen shows; halves the page.
  text = re.sub(r'(\d\.\d\d)\d+', r'\1', text)
  head = f'<svg role="img" aria-label="{_text(label)}"'
  return text.replace('<svg', head, 1).strip()


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
<script>{script}</script>
</body>
</html>
"""

_STYLE = (
  """
:root {
  --font: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue",
    Arial, sans-serif;
  --ink: #1f2933; --muted: #66727f; --grid: #dde2e7; --page: #ffffff;
  --tile: #f5f7f9; --bar: #b9d3f2;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --ink: #e4e8ec; --muted: #98a4b0; --grid: #333c45; --page: #14181c;
    --tile: #1d2329; --bar: #2b507c;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 var(--font);
}
main { max-width: 1120px; margin: 0 auto; padding: 28px 20px 48px; }
h1 { font-size: 26px; line-height: 1.2; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 36px 0 8px; }
h3 { font-size: 14px; margin: 12px 0 4px; }
.sub, .note { color: var(--muted); margin: 4px 0 12px; }
.note { max-width: 76ch; font-size: 14px; }
code, pre { font: 13px/1.45 ui-monospace, Menlo, Consolas, monospace; }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.tiles {
  display: grid; gap: 12px; margin: 20px 0 12px;
  grid-template-columns: repeat(auto-fit, minmax(190px, 1fr));
}
.tile { background: var(--tile); border-radius: 8px; padding: 12px 14px; }
.tile b {
  display: block; font-size: 28px; line-height: 1.2; font-weight: 650;
  font-variant-numeric: tabular-nums;
}
.tile span, .tile small { display: block; overflow-wrap: anywhere; }
.tile small { color: var(--muted); font-size: 13px; }
summary { cursor: pointer; font-weight: 600; }
.terms { margin: 16px 0; font-size: 14px; }
dl {
  display: grid; gap: 2px 28px; margin: 8px 0;
  grid-template-columns: repeat(auto-fit, minmax(300px, 1fr));
}
dl div { display: flex; gap: 8px; }
dt { font-weight: 600; min-width: 90px; }
dd { margin: 0; color: var(--muted); }
sub { font-size: 0.72em; line-height: 0; }
.scroll { overflow-x: auto; }
.tall { max-height: 75vh; overflow-y: auto; }
table { border-collapse: collapse; font-size: 14px; }
th, td {
  padding: 5px 10px; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--grid); font-variant-numeric: tabular-nums;
}
th { font-weight: 600; }
th[scope="row"], thead th:first-child { text-align: left; }
tbody th[scope="row"] { font-weight: 400; }
.runs, .layers { width: 100%; }
.runs thead th { white-space: normal; }
.runs thead th:nth-last-child(-n + 3) { min-width: 150px; }
thead th { vertical-align: bottom; }
.runs td:nth-child(3), .runs td:nth-child(5), .runs td:nth-child(7) {
  color: var(--muted); padding-left: 0;
}
.layers thead th {
  position: sticky; top: 0; background: var(--page); z-index: 2; padding: 0;
  box-shadow: inset 0 -1px var(--muted);
}
"""
  """
.layers button {
  all: unset; box-sizing: border-box; width: 100%; padding: 6px 10px;
  cursor: pointer;
}
.layers button:focus-visible { outline: 2px solid var(--muted); }
th[aria-sort="ascending"] button::after { content: " ▲"; font-size: 9px; }
th[aria-sort="descending"] button::after { content: " ▼"; font-size: 9px; }
.layers thead th { white-space: normal; }
.layers tbody th { font-size: 13px; min-width: min(var(--name), 40vw); }
.layers th:nth-last-child(-n + 2) { min-width: 96px; }
.bar { position: relative; min-width: 150px; }
.bar i {
  position: absolute; left: 14px; right: 66px; z-index: -1;
  top: calc(50% - 0.75em); height: 1.5em; border-radius: 2px;
  background: linear-gradient(var(--bar) 0 0) 0 / var(--w) 100% no-repeat;
}
.layers { position: relative; z-index: 0; }
.plot { max-width: 620px; }
.panels {
  display: grid; gap: 18px 24px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 320px), 1fr));
}
.panel { max-width: 440px; break-inside: avoid; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
.ramp { white-space: nowrap; }
.ramp i {
  display: inline-block; width: 72px; height: 8px; border-radius: 4px;
  background: linear-gradient(90deg, """
  + ', '.join(plots.DEPTH_COLORS)
  + """);
}
.about { margin-top: 36px; }
.columns { display: flex; flex-wrap: wrap; gap: 8px 48px; }
.columns > div { max-width: 100%; }
@media (max-width: 560px) {
  main { padding: 18px 14px 32px; }
  .tiles { grid-template-columns: 1fr 1fr; gap: 8px; }
  .tile { padding: 10px; }
  .tile b { font-size: 23px; }
  th, td { padding: 5px 7px; }
  .layers tbody th {
    white-space: normal; overflow-wrap: anywhere; line-height: 1.3;
    position: sticky; left: 0; background: var(--page);
  }
  .layers thead th:first-child { left: 0; z-index: 3; }
}
@media print {
  main { max-width: none; padding: 0; }
  .scroll { max-height: none; overflow: visible; }
  table { font-size: 11px; }
  th, td { padding: 3px 5px; }
  .runs thead th:nth-last-child(-n + 3),
  .layers th:nth-last-child(-n + 2) { min-width: 0; }
  .layers tbody th { font-size: 10px; min-width: min(var(--name), 38vw); }
  .bar { min-width: 110px; }
  .tile { border: 1px solid var(--grid); }
  .bar i, .ramp i { print-color-adjust: exact; }
  section, tr, .plot { break-inside: avoid; }
  section:has(.layers), section:has(.panels) { break-inside: auto; }
}
"""
)

_SCRIPT = """
(function () {
  var table = document.getElementById('layers');
  var heads = Array.from(table.tHead.rows[0].cells);
  var body = table.tBodies[0];
  var rows = Array.from(body.rows);
  function value(row, column) {
    var text = row.cells[column].dataset.v;
    return text === undefined ? row.rowIndex : Number(text);
  }
  heads.forEach(function (head, column) {
    head.firstChild.addEventListener('click', function () {
      var was = head.getAttribute('aria-sort');
      heads.forEach(function (other) { other.removeAttribute('aria-sort'); });
      var order = rows.slice();
      // The first column brings back the order of the model.
      if (column > 0) {
        var sign = was === 'descending' ? 1 : -1;
        head.setAttribute('aria-sort', sign > 0 ? 'ascending' : 'descending');
        order.sort(function (a, b) {
          return sign * (value(a, column) - value(b, column));
        });
      }
      order.forEach(function (row) { body.appendChild(row); });
    });
  });
})();
"""

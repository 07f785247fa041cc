"""A utilization report as text tables, for terminals and logs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
import math
from typing import Any

import numpy as np

from utilized_rank.host.progress import WIDTH
from utilized_rank.host.progress import wrapped
from utilized_rank.report import depth
from utilized_rank.report.layer import LayerReport

RUN_KEYS = (
  'params_fraction',
  'params',
  'flops',
  'latency_ms',
  'test_accuracy',
  'test_accuracy_before_finetune',
)
# What stands for a value that is not known.
MISSING = '–'

# Columns of a terminal.
LINE = WIDTH

# The title of what `wilson` gives.
INTERVAL = '95% interval'
_BAR = 10


def layer_table(layers: Sequence[LayerReport]) -> str:
  """Utilization of every layer as a text table, for terminals and logs.

  What all paths begin and end with is said once, above. Lines fit
  80 columns: long names lose their middle, but stay different from each other.

  Args:
    layers: the layers, in the order of the lines.

  Raises:
    ValueError: there is no layer.

  >>> print(layer_table(report.layers))  # doctest: +SKIP
  """
  check_layers(layers)
  prefix, suffix, names = depth.relative_names(layers)
  counts = [
    [_number(getattr(layer, key), 'd') for layer in layers]
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
  room = LINE - sum(len(column[0]) + 2 for column in columns) - 2 - _BAR
  names = ['layer', *shortened(names, room)]
  width = max(map(len, names))
  rows = zip((n.ljust(width) for n in names), *columns, bars, strict=True)
  lines = ['  '.join(row).rstrip() for row in rows]
  rule = '─' * (max(map(len, lines[1:])))
  mean = float(np.mean([layer.utilization for layer in layers]))
  noun = 'layer' if len(layers) == 1 else 'layers'
  head = [wrapped(f'layers: {prefix}…{suffix}')] if prefix or suffix else []
  return '\n'.join(
    [
      *head,
      lines[0],
      rule,
      *lines[1:],
      rule,
      f'mean layer utilization {100 * mean:.1f}%'
      f'  ({len(layers)} {noun}, energy {energies(layers)})',
    ]
  )


def how_collected(layers: Sequence[LayerReport]) -> list[str]:
  """Lines that say from which side and in how many passes, if not plainly."""
  lines = []
  outputs = [layer.path for layer in layers if layer.k_in is None]
  if outputs:
    first, *others = dict.fromkeys(outputs)
    lines.append(
      f'{len(outputs)} of {len(layers)} measured from the output side, where r '
      f'is k_T: {first}' + (', …' if others else '')
    )
  sketched = [layer for layer in layers if layer.columns]
  if sketched:
    worst = max(sketched, key=lambda layer: layer.unseen)
    lines.append(
      f'{len(sketched)} of {len(layers)} measured by a sketch, where k_S is '
      f'the most it can be; at most {worst.unseen:.2%} of an input is unseen '
      f'({worst.name}: k_S from {worst.k_in_least} to {worst.k_in})'
    )
  apart = [
    (layer.dependence, layer.name)
    for layer in layers
    if layer.dependence is not None
  ]
  if apart:
    middle = np.median([value for value, _ in apart])
    most, name = max(apart)
    lines.append(
      'dependence of inputs and gradients: median '
      f'{middle:.2f}, most {most:.2f} ({name})'
    )
  passes = len({layer.number for layer in layers})
  if passes > 1:
    lines.append(f'collected in {passes} passes over the batches')
  return lines


def run_table(runs: Sequence[Mapping[str, Any]]) -> str:
  """Size, cost and accuracy of the dense and the compressed models, as text.

  Args:
    runs: the dense model first. Keys: `params_fraction` (of the block
      kernels), `params` (whole model), `flops` (per example), `latency_ms`,
      `test_accuracy` and `test_accuracy_before_finetune` (shares in [0, 1]);
      `test_correct` and `test_count` where the share is to have an interval,
      and `method` where several are compared. A value that is not known is
      None; a column of such values is left out.

  Raises:
    ValueError: there is no run, or a run lacks a key; the message names both.
  """
  if not runs:
    raise ValueError('no runs: expected the dense model first')
  check_runs(runs)
  titles, rows = run_cells(runs)
  known = [
    i for i in range(len(titles)) if {row[i] for row in rows} != {MISSING}
  ]
  return text_table(
    [titles[i] for i in known], [[row[i] for i in known] for row in rows]
  )


def text_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """Columns under their titles: the first to the left, the others right.

  >>> print(text_table(['', 'a'], [['one', '1'], ['two', '22']]))
        a
  ───────
  one   1
  two  22
  """
  columns = [
    _aligned(title, cells, left=not i)
    for i, (title, cells) in enumerate(
      zip(titles, zip(*rows, strict=True), strict=True)
    )
  ]
  lines = ['  '.join(row).rstrip() for row in zip(*columns, strict=True)]
  return '\n'.join([lines[0], '─' * max(map(len, lines)), *lines[1:]])


def check_layers(layers: Sequence[LayerReport]) -> None:
  if not layers:
    raise ValueError('no layers to show: expected at least one LayerReport')


def check_runs(runs: Sequence[Mapping[str, Any]]) -> None:
  for number, run in enumerate(runs):
    missing = [key for key in RUN_KEYS if key not in run]
    if missing:
      raise ValueError(f'runs[{number}] lacks {missing}; it has {list(run)}')


def energies(layers: Sequence[LayerReport]) -> str:
  low = min(layer.energy for layer in layers)
  high = max(layer.energy for layer in layers)
  return f'{low:g}' if low == high else f'{low:g} to {high:g}'


def run_cells(
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
        percent(run['test_accuracy']),
        _interval(run),
        MISSING if run is dense else percent(before),
        MISSING if run is dense else points_gained(run, dense),
        _count(run['params']),
        _ratio(run['params'], dense['params']),
        unit_count(run['flops']),
        _ratio(run['flops'], dense['flops']),
        _number(run['latency_ms'], '.3g', ' ms'),
        _ratio(run['latency_ms'], dense['latency_ms']),
      ]
    )
  titles = ['model', 'accuracy', INTERVAL, 'before', 'vs dense']
  titles += ['params', '', 'FLOPs', '', 'latency', '']
  if all(row[2] == MISSING for row in rows):
    titles, rows = titles[:2] + titles[3:], [r[:2] + r[3:] for r in rows]
  return titles, rows


def wilson(correct: int, count: int) -> tuple[float, float]:
  """Wilson's 95 % interval for a share of which `correct` of `count` are seen.

  >>> [round(share, 3) for share in wilson(357, 360)]
  [0.976, 0.997]
  """
  z = 1.959964  # of the normal distribution, 2.5 % beyond it on either side
  share, more = correct / count, z * z / count
  middle = (share + more / 2) / (1 + more)
  half = z * math.sqrt(share * (1 - share) / count + more / (4 * count))
  return middle - half / (1 + more), middle + half / (1 + more)


def counted(run: Mapping[str, Any]) -> str:
  """How many of how many test examples were right, if that is known."""
  if run.get('test_count') is None:
    return ''
  return f'{run["test_correct"]:,} of {run["test_count"]:,}, '


def _interval(run: Mapping[str, Any]) -> str:
  if run.get('test_count') is None:
    return MISSING
  low, high = wilson(run['test_correct'], run['test_count'])
  return f'{100 * low:.1f}–{100 * high:.1f}%'


def short_count(value: float) -> str:
  """A count with three digits and a unit of thousands.

  >>> short_count(1234567), short_count(85_000), short_count(12)
  ('1.23 M', '85.0 k', '12')
  """
  for unit, size in (('T', 1e12), ('G', 1e9), ('M', 1e6), ('k', 1e3)):
    # 999,600 is 1.00 M, not 1000 k.
    if abs(value) >= 0.9995 * size:
      scaled = value / size
      digits = max(0, 2 - int(np.log10(max(abs(scaled), 1)) + 2e-4))
      return f'{scaled:.{digits}f} {unit}'
  return f'{value:.3g}'


def points_gained(run: Mapping[str, Any], dense: Mapping[str, Any]) -> str:
  """Accuracy against dense, in percentage points, always with a sign."""
  if run['test_accuracy'] is None or dense['test_accuracy'] is None:
    return MISSING
  gap = round(100 * (run['test_accuracy'] - dense['test_accuracy']), 2)
  return f'{gap + 0.0:+.2f}'.replace('-', '−')


def unit_count(value: float | None) -> str:
  return MISSING if value is None else short_count(value)


def percent(value: float | None) -> str:
  return _number(None if value is None else 100 * value, '.2f', '%')


def some(names: Sequence[str], most: int = 8) -> str:
  """The first of the names, and how many there are more.

  >>> some(['a', 'b', 'c'], most=1)
  'a and 2 more'
  """
  more = len(names) - most
  said = ', '.join(names[:most])
  return f'{said} and {more} more' if more > 0 else said


def shortened(names: Sequence[str], room: int) -> list[str]:
  """Names that fit and still differ, their long parts cut in the middle.

  >>> shortened(['block_0/attention/query', 'block_0/attention/key'], 21)
  ['block_0/att…ion/query', 'block_0/att…ion/key']

  Where that does not suffice the whole name is cut so.

  >>> shortened(['block_0/attention/query', 'block_0/attention/key'], 18)
  ['block_0/…ion/query', 'block_0/…ntion/key']
  """
  best = _cut_parts(names, room)
  if max(map(len, best)) <= room:
    return best
  best = [_cut(name, room) for name in names]
  if len(set(best)) < len(set(names)):
    # What differs is in the middle: numbers tell them apart.
    tags = [f'…{i}' for i in range(len(names))]
    best = [name[: room - len(tag)] + tag for name, tag in zip(names, tags)]
  return best


def _cut(part: str, limit: int) -> str:
  """At most so many characters, without the middle."""
  if len(part) <= limit:
    return part
  back = limit // 2
  return f'{part[: limit - 1 - back]}…{part[len(part) - back :]}'


def _cut_parts(names: Sequence[str], room: int) -> list[str]:
  """Shortens long parts of the names until they fit, or would not differ."""
  best = list(names)
  longest = max(len(part) for name in names for part in name.split('/'))
  for limit in range(longest - 1, 6, -1):
    if max(map(len, best)) <= room:
      break
    shorter = ['/'.join(_cut(p, limit) for p in n.split('/')) for n in names]
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


def _count(value: float | None) -> str:
  return _number(value, ',.0f')


def _number(value: float | None, form: str, unit: str = '') -> str:
  return MISSING if value is None else f'{value:{form}}{unit}'


def _ratio(value: float | None, whole: float | None) -> str:
  if value is None or not whole:
    return MISSING
  return f'{100 * value / whole:.0f}%'

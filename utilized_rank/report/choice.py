"""What `compress` chose, what it tried, and what that took: plain data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
import dataclasses
import math
from typing import Any

from utilized_rank.host.progress import wrapped
from utilized_rank.moments.coverage import NOT_SELECTED
from utilized_rank.report import depth
from utilized_rank.report import tables

# What stands in a kernel's place, and what it is called where there is little
# room.
KINDS = {
  'pair': 'pair',
  'identity pair': 'identity',
  'shared left factor': 'shared left',
  'narrower heads': 'heads',
  'narrower hidden layer': 'hidden layer',
  'dense': 'dense',
}


@dataclasses.dataclass(frozen=True)
class Kept:
  """What is kept of one leaf: of a kernel, or of a stack of them.

  Attributes:
    path: of the leaf.
    kind: a key of `KINDS`.
    before: numbers that it held.
    after: numbers that stand in its place.
    rank: of the pair; of narrower heads the features that a head keeps, of a
      narrower layer its units; None of a dense kernel.
    most: what that is of the dense kernel.
    predicted: damage that was predicted, see `Choice.unit`; None if none was.
    measured: what the directions that are cut cost by the divergence's slope
      at these ranks, before factors were fitted anew; None where no trial
      told.
    why: why it is dense; '' where it is not.
  """

  path: str
  kind: str
  before: int
  after: int
  rank: int | None = None
  most: int | None = None
  predicted: float | None = None
  measured: float | None = None
  why: str = ''

  @property
  def name(self) -> str:
    """As a `LayerReport` of the leaf has it."""
    return self.path


@dataclasses.dataclass(frozen=True)
class Contender:
  """A tree that was compared with the best one before it.

  Attributes:
    name: what it is.
    divergence: mean over the examples that it was judged on.
    gain: by how much the best before it was farther; None of the first.
    error: the standard error of that.
    chosen: whether it took the other's place.
    judged: on which examples; '' for those it was tried on.
  """

  name: str
  divergence: float
  gain: float | None = None
  error: float | None = None
  chosen: bool = True
  judged: str = ''


@dataclasses.dataclass(frozen=True)
class Stage:
  """A step of the way.

  Attributes:
    name: what it is called.
    seconds: that it took, without steps inside it.
    cpu_seconds: the same, of all threads.
    peak_bytes: the most that the process held meanwhile; None if not known.
    before: divergence of the best tree before it; None where it makes none.
    after: of the one that it made.
  """

  name: str
  seconds: float
  cpu_seconds: float
  peak_bytes: int | None = None
  before: float | None = None
  after: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
  """What was chosen, and how; `print` it for a table.

  Attributes:
    method: of the factors.
    damping: of the factors.
    divergence: of the outputs, the mean over the examples it was tried on;
      None where none were.
    unit: of the divergence, such as 'nats'; '' if it is not known.
    predicted_unit: of predicted damages.
    kernels: each leaf that could be compressed, and those not selected.
    contenders: in the order in which they were compared.
    stages: in the order in which they ended.

  >>> kept = Kept('w', 'pair', 64, 32, rank=2, most=8)
  >>> print(Choice(method='loss', damping=0.1, divergence=0.0041, unit='nats',
  ...              kernels=(kept,), stages=(Stage('ranks', 2.0, 3.0),)).line)
  kept 50.0 % of 64: 1 pair; divergence 0.0041 nats; 2.0 s
  """

  method: str
  damping: float
  divergence: float | None = None
  unit: str = ''
  predicted_unit: str = ''
  kernels: tuple[Kept, ...] = ()
  contenders: tuple[Contender, ...] = ()
  stages: tuple[Stage, ...] = ()

  @property
  def compressible(self) -> tuple[Kept, ...]:
    """Without kernels that were left out by a choice of the caller's."""
    return tuple(k for k in self.kernels if k.why != NOT_SELECTED)

  @property
  def seconds(self) -> float:
    return sum(stage.seconds for stage in self.stages)

  @property
  def line(self) -> str:
    """One line: what is kept, as what, how near, and how long it took."""
    ours = self.compressible
    before, after = (sum(k) for k in zip(*((k.before, k.after) for k in ours)))
    counts = Counter(kept.kind for kept in ours)
    parts = [_plural(kind, counts[kind]) for kind in KINDS if counts[kind]]
    share = f'{100 * after / max(before, 1):.1f} %'
    whole = tables.short_count(before)
    said = [f'kept {share} of {whole}: {", ".join(parts)}']
    if self.divergence is not None:
      said.append(f'divergence {damage(self.divergence)} {self.unit}'.rstrip())
    said.append(f'{self.seconds:.{1 if self.seconds < 9.95 else 0}f} s')
    return '; '.join(said)

  @property
  def how(self) -> str:
    """One line: the method, and who won by how much."""
    said = [f'method {self.method}']
    if self.method == 'loss':
      said[0] += f', damping {self.damping:g}'
    return '; '.join([*said, *map(_contest, self.contenders)])

  @property
  def dense(self) -> dict[str, list[str]]:
    """Why kernels are dense, and which."""
    found: dict[str, list[str]] = {}
    for kept in self.kernels:
      if kept.why:
        found.setdefault(kept.why, []).append(kept.path)
    return found

  def kernel_table(self) -> tuple[list[str], list[list[str]]]:
    """Titles, and a row for each leaf that is not dense, without its name."""
    titles = ['kind', 'kept', 'numbers', 'share', 'predicted', 'measured']
    return titles, [
      [
        KINDS.get(kept.kind, kept.kind),
        tables.MISSING if kept.rank is None else f'{kept.rank}/{kept.most}',
        tables.short_count(kept.after),
        f'{100 * kept.after / max(kept.before, 1):.0f}%',
        damage(kept.predicted),
        damage(kept.measured),
      ]
      for kept in self.changed
    ]

  @property
  def changed(self) -> tuple[Kept, ...]:
    """Leaves that are not what they were."""
    return tuple(kept for kept in self.kernels if kept.kind != 'dense')

  def __str__(self) -> str:
    parts = [wrapped(self.line), wrapped(self.how)]
    if self.changed:
      titles, rows = self.kernel_table()
      prefix, suffix, names = depth.relative_names(self.changed)
      widths = [max(map(len, column)) for column in zip(titles, *rows)]
      room = tables.LINE - sum(width + 2 for width in widths)
      names = tables.shortened(names, room)
      lines = [[name, *row] for name, row in zip(names, rows, strict=True)]
      if prefix or suffix:
        parts.append(wrapped(f'kernels: {prefix}…{suffix}'))
      parts.append(tables.text_table(['kernel', *titles], lines))
      parts.append(wrapped(self.units))
    for why, paths in self.dense.items():
      parts.append(wrapped(f'dense, {why}: {tables.some(paths)}'))
    if self.stages:
      parts.append(tables.text_table(*stage_table(self.stages)))
    return '\n'.join(parts)

  @property
  def units(self) -> str:
    """What damages are counted in."""
    said = f'predicted: {self.predicted_unit or "not known"}'
    unit = self.unit or "the divergence's own"
    return f'{said}; measured: {unit}, by slopes before the last fit'

  @classmethod
  def from_record(cls, record: Mapping[str, Any] | None) -> Choice | None:
    """Undoes `dataclasses.asdict`; None of None, as of reports before 0.2."""
    if record is None:
      return None
    parts = {'kernels': Kept, 'contenders': Contender, 'stages': Stage}
    made = {
      name: tuple(of(**one) for one in record[name])
      for name, of in parts.items()
    }
    return cls(**{**record, **made})


def stage_table(
  stages: Sequence[Stage],
) -> tuple[list[str], list[list[str]]]:
  """Titles, and a row for each stage."""
  titles = ['stage', 'seconds', 'CPU s', 'peak', 'before', 'after']
  rows = []
  for stage in stages:
    peak = tables.MISSING
    if stage.peak_bytes is not None:
      peak = f'{stage.peak_bytes / 2**20:,.0f} MiB'
    rows.append(
      [
        stage.name,
        f'{stage.seconds:.1f}',
        f'{stage.cpu_seconds:.1f}',
        peak,
        damage(stage.before),
        damage(stage.after),
      ]
    )
  return titles, rows


def damage(value: float | None) -> str:
  """Two digits, and no more than eight characters.

  >>> [damage(v) for v in (0.00412, 1.5e-7, 12.34, 0.0, None)]
  ['0.0041', '1.5e-07', '12', '0', '–']
  """
  if value is None or math.isnan(value):
    return '–'
  if value and not 1e-4 <= abs(value) < 1e4:
    return f'{value:.1e}'
  if value == 0:
    return '0'
  digits = max(0, 1 - math.floor(math.log10(abs(value))))
  return f'{value:.{digits}f}'


def _plural(kind: str, number: int) -> str:
  if kind == 'dense' or kind.endswith('heads'):
    return f'{number} {kind}'
  return f'{number} {kind}' + 's' * (number != 1)


def _contest(one: Contender) -> str:
  said = f'{one.name} {damage(one.divergence)}'
  if one.gain is not None and one.error is not None:
    way = 'nearer' if one.gain >= 0 else 'farther'
    said += f' ({way} by {damage(abs(one.gain))} ± {damage(one.error)}, '
    said += 'taken)' if one.chosen else 'not taken)'
  return f'{said} on {one.judged}' if one.judged else said

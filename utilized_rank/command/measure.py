"""`utilized-rank measure CHECKPOINT`: how much of its kernels is used."""

from __future__ import annotations

from collections.abc import Sequence

from utilized_rank.collection.collect import collect
from utilized_rank.command import by_block
from utilized_rank.command import errors
from utilized_rank.command import subject
from utilized_rank.host.extras import extra
from utilized_rank.report.measure import measure
from utilized_rank.report.report import Report

with extra('all'):
  from absl import flags

parse = subject.parse


def define(values: flags.FlagValues) -> None:
  """The flags of the command."""
  subject.define(values)
  flags.DEFINE_float(
    'energy', 0.99, 'Share of the spectra to be held.', flag_values=values
  )
  flags.DEFINE_string(
    'out', None, 'Write the page .html, or .json, as well.', flag_values=values
  )


def main(argv: Sequence[str], values: flags.FlagValues = flags.FLAGS) -> None:
  """Measures what the flags say."""
  checkpoint = subject.checkpoint_of(argv)
  errors.prepare()
  with errors.in_one_line(errors.same_command()):
    out = values.out or ''
    if values.out is not None and not out.endswith(('.html', '.json')):
      raise ValueError(f'--out={out}: a file .html or .json')
    report = _measured(checkpoint, values)
    if out.endswith('.json'):
      report.save(out)
    elif out:
      with open(out, 'w', encoding='utf-8') as file:
        file.write(report.html())
    print(report)
    if out:
      print(f'\nreport: {out}')


def _measured(checkpoint: str, values: flags.FlagValues) -> Report:
  if by_block.is_directory(checkpoint):
    return by_block.measure(checkpoint, values)
  it = subject.given(checkpoint, values)
  moments = it.moments
  if moments is None:
    moments = collect(it.fn, it.params, it.batches(), select=it.select)
  return measure(it.params, moments, energy=values.energy)

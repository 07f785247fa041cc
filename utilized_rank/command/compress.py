"""`utilized-rank compress CHECKPOINT`: low-rank factors for its kernels."""

from __future__ import annotations

from collections.abc import Sequence
import os

from utilized_rank.command import by_block
from utilized_rank.command import errors
from utilized_rank.command import subject
from utilized_rank.compression.compress import compress
from utilized_rank.host.extras import extra
from utilized_rank.lowrank.leaf import count_params
from utilized_rank.storage.checkpoint import save

with extra('all'):
  from absl import flags

parse = subject.parse


def define(values: flags.FlagValues) -> None:
  """The flags of the command."""
  subject.define(values)
  share = flags.DEFINE_float
  share('params', None, "Share of the kernels' parameters.", flag_values=values)
  share('flops', None, 'Share of their multiplications.', flag_values=values)
  flags.DEFINE_string(
    'out', None, 'Folder to make, for factors and report.', flag_values=values
  )
  flags.mark_flag_as_required('out', flag_values=values)
  flags.mark_flags_as_mutual_exclusive(
    ['params', 'flops'], required=True, flag_values=values
  )


def main(argv: Sequence[str], values: flags.FlagValues = flags.FLAGS) -> None:
  """Makes smaller what the flags say."""
  checkpoint = subject.checkpoint_of(argv)
  errors.prepare()
  with errors.in_one_line(errors.same_command()):
    if os.path.exists(values.out):
      raise FileExistsError(f'--out={values.out}: it is there already')
    if by_block.is_directory(checkpoint):
      by_block.compress(checkpoint, values)
      return
    it = subject.given(checkpoint, values)
    small, report = compress(
      it.fn,
      it.params,
      it.batches(),
      moments=it.moments,
      params_fraction=values.params,
      flops_fraction=values.flops,
      loss=it.loss,
      select=it.select if it.moments is None else None,
    )
    assert report.recipe is not None  # `compress` has followed one
    file = lambda name: os.path.join(values.out, name)
    save(file('params'), small)
    report.recipe.save(file('recipe.json'))
    report.save(file('report.json'))
    before, after = count_params(it.params), count_params(small)
    print(
      f'{report}\n\n{before:,} parameters -> {after:,} ({after / before:.1%})\n'
      f'small = utilized_rank.load({file("params")!r})'
    )

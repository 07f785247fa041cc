"""`measure` and `compress` of a directory of weights, block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterable
import os
from typing import Any

from utilized_rank.command import subject
from utilized_rank.host.extras import extra
from utilized_rank.host.progress import say
from utilized_rank.models.importing.files import shards
from utilized_rank.report.report import Report
from utilized_rank.streaming.compress_checkpoint import compress_checkpoint
from utilized_rank.streaming.measure_checkpoint import measure_checkpoint
from utilized_rank.streaming.plan_checkpoint import plan_checkpoint

with extra('all'):
  from absl import flags

# Of one batch: activations of a block are in memory with its weights.
_TOKENS = 4096


def is_directory(checkpoint: str) -> bool:
  """Whether a CHECKPOINT is a directory of weights, and not of a run."""
  if not os.path.isdir(checkpoint) or subject.is_run(checkpoint):
    return False
  try:
    return bool(shards.files(checkpoint))
  except ValueError:
    return False


def compress(checkpoint: str, values: flags.FlagValues) -> None:
  """Plans it, says so, and does it; goes on where it was interrupted."""
  if values.params is None:
    raise ValueError(
      f'{checkpoint!r} is a directory, which is compressed block by block to a '
      'share of the parameters: give --params'
    )
  options, batches = _given(checkpoint, values)
  with subject.as_flags(values.option):
    plan = plan_checkpoint(
      checkpoint, batches(), params_fraction=values.params, **options
    )
  say(str(plan))
  recipe = compress_checkpoint(
    checkpoint,
    values.out,
    batches(),
    params_fraction=values.params,
    **options,
  )
  print(
    f'{len(recipe.leaves)} kernels are pairs\n'
    f'model, small, _ = load_checkpoint({values.out!r})'
  )


def measure(checkpoint: str, values: flags.FlagValues) -> Report:
  """Measures it; where it is to write something, it can be interrupted."""
  options, batches = _given(checkpoint, values)
  work = None if values.out is None else f'{values.out}.partial'
  with subject.as_flags(values.option):
    return measure_checkpoint(
      checkpoint, batches(), energy=values.energy, work_dir=work, **options
    )


def _given(
  checkpoint: str, values: flags.FlagValues
) -> tuple[dict[str, Any], Callable[[], Iterable[Any]]]:
  """What `load_checkpoint` is to be told, and what the model is run on."""
  if values.inputs is None or values.inputs.endswith('.npz'):
    raise ValueError(
      f'{checkpoint!r} is a directory of weights: give --inputs=FILE, .npy of '
      'what the model takes'
    )
  options = {
    'config': values.model_config,
    'architecture': values.architecture,
    'assume': values.assume,
    'select': subject.rules(values.select),
    **subject.options(values.option),
  }
  return options, subject.batches_of(values.inputs, _TOKENS)

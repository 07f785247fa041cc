"""A network and what it is run on, of the commands that take a CHECKPOINT."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import contextlib
import json
import os
from typing import Any, NamedTuple

import numpy as np

from utilized_rank.host.extras import extra
from utilized_rank.losses.sampled import sampled_cross_entropy
from utilized_rank.moments.moments import Moments

with extra('all'):
  from absl import app
  from absl import flags

_BATCH = 64
_CONFIG = 'config.json'


class Subject(NamedTuple):
  """A network and what it is run on.

  Attributes:
    fn: `fn(params, batch) -> outputs`.
    params: dense.
    batches: makes the batches, as often as it is called.
    loss: of the outputs, where they are classes; else None.
    select: rules over its kernels, or None for all.
    moments: what a run has collected already, or None.
  """

  fn: Callable[[Any, Any], Any]
  params: Any
  batches: Callable[[], Iterable[Any]]
  loss: Any
  select: Any
  moments: Moments | None


class Facts(NamedTuple):
  """What a file of weights does not say of its model.

  Attributes:
    architecture: its name in timm or torchvision.
    config: the path of its `config.json`, where it is not beside the file.
    options: `name=value`, as `load_checkpoint` takes them.
    assume: take what nothing says as it usually is.
  """

  architecture: str | None = None
  config: str | None = None
  options: Sequence[str] = ()
  assume: bool = False


_NO_FACTS = Facts()


def define(values: flags.FlagValues) -> None:
  """The flags that say what a file of weights is run on."""
  text = flags.DEFINE_string
  text(
    'inputs',
    None,
    'What a file of weights is run on: .npy of the inputs as the model takes '
    "them, or .npz with uint8 images in 'image'. A run's folder has its own.",
    flag_values=values,
  )
  text(
    'preprocess',
    None,
    'Whose preprocessing images get, such as timm_vit or torchvision; default '
    'pixels scaled to [-1, 1].',
    flag_values=values,
  )
  text(
    'select',
    None,
    'Regular expression of the paths of the kernels; default all of them.',
    flag_values=values,
  )
  text(
    'architecture',
    None,
    "The model's name in timm or torchvision, such as vit_base_patch16_224, "
    'where no config.json beside the file says it.',
    flag_values=values,
  )
  text(
    'model_config',
    None,
    "The model's config.json, where it is not beside the file.",
    flag_values=values,
  )
  flags.DEFINE_multi_string(
    'option',
    [],
    'What neither shapes nor a config.json say of the model, such as '
    'activation=relu or heads=12; once for each.',
    flag_values=values,
  )
  flags.DEFINE_bool(
    'assume',
    False,
    'Take what nothing says of the model as it usually is.',
    flag_values=values,
  )


def parse(argv: Sequence[str]) -> list[str]:
  """Parses the command line of a command that takes a CHECKPOINT."""
  return app.parse_flags_with_usage(list(argv))


def checkpoint_of(argv: Sequence[str]) -> str:
  """The one that a parsed command line names; `absl` says how else."""
  if len(argv) != 2:
    raise app.UsageError(f'one CHECKPOINT is wanted, got {argv[1:]}')
  return argv[1]


def given(checkpoint: str, values: flags.FlagValues) -> Subject:
  """The network that a command line names; raises what `open_subject` does."""
  facts = Facts(
    values.architecture, values.model_config, values.option, values.assume
  )
  return open_subject(
    checkpoint, values.inputs, values.preprocess, values.select, facts
  )


def open_subject(
  checkpoint: str,
  inputs: str | None = None,
  preprocess: str | None = None,
  select: str | None = None,
  facts: Facts = _NO_FACTS,
) -> Subject:
  """The network of a run's folder, or of a file of weights.

  Args:
    checkpoint: the folder of `utilized-rank run`, or a file that
      `load_checkpoint` reads.
    inputs: see `define`, as for the rest.
    preprocess: see there.
    select: see there.
    facts: of the model.

  Raises:
    FileNotFoundError: there is no such file or folder.
    ValueError: it is neither, or a file of weights comes without inputs or
      what changes its output, or with what its model does not have.
  """
  if os.path.isdir(checkpoint):
    own = {
      'inputs': inputs,
      'preprocess': preprocess,
      'select': select,
      'architecture': facts.architecture,
      'model_config': facts.config,
      'option': ' '.join(facts.options) or None,
      'assume': facts.assume or None,
    }
    for name, value in own.items():
      if value is not None:
        told = '' if value is True else f'={value}'
        raise ValueError(
          f"--{name}{told}: a run's folder such as {checkpoint!r} has its own"
        )
    return _of_run(checkpoint)
  if not os.path.exists(checkpoint):
    raise FileNotFoundError(f'no file or folder {checkpoint!r}')
  if inputs is None:
    raise ValueError(
      f'{checkpoint!r} is a file of weights: give --inputs=FILE, .npy of what '
      "the model takes, or .npz with uint8 images in 'image'"
    )
  return _of_file(checkpoint, inputs, preprocess, select, facts)


def is_run(folder: str) -> bool:
  """Whether it is the folder of a run with a network in it."""
  return os.path.isfile(os.path.join(folder, _CONFIG)) and os.path.isdir(
    os.path.join(folder, 'dense')
  )


def _of_run(folder: str) -> Subject:
  from utilized_rank.experiment import pipeline

  if not is_run(folder):
    raise ValueError(
      f'{folder!r} is no run with a network in it: a CHECKPOINT is the folder '
      'of `utilized-rank run` once its first stage is finished, or a file or '
      'directory of weights'
    )
  with open(os.path.join(folder, _CONFIG), encoding='utf-8') as file:
    job = pipeline.Job(_tuples(json.load(file)), folder)
  return Subject(
    job.of_batch,
    job.dense,
    lambda: job.calibration()[1],
    job.loss,
    job.compress.select,
    job.moments if job.workdir.finished('collect') else None,
  )


def _tuples(value: Any) -> Any:
  """JSON with tuples for its lists, as configs have them."""
  if isinstance(value, dict):
    return {key: _tuples(inner) for key, inner in value.items()}
  if isinstance(value, list):
    return tuple(_tuples(inner) for inner in value)
  return value


def _of_file(
  path: str,
  inputs: str,
  preprocess: str | None,
  select: str | None,
  facts: Facts,
) -> Subject:
  from utilized_rank.models.importing import load_checkpoint

  with as_flags(facts.options):
    model, params, imported = load_checkpoint(
      path,
      config=facts.config,
      architecture=facts.architecture,
      assume=facts.assume,
      **options(facts.options),
    )
  wanted = imported.input.shape[1:]
  if inputs.endswith('.npz'):
    batches = _images(inputs, preprocess, wanted)
  else:
    batches = _arrays(inputs, wanted)
  has_classes = getattr(model, 'num_classes', None) != 0
  return Subject(
    model.apply,
    params,
    batches,
    sampled_cross_entropy() if has_classes else None,
    rules(select),
    None,
  )


@contextlib.contextmanager
def as_flags(given: Sequence[str]) -> Iterator[None]:
  """Says what a checkpoint does not say of its model in terms of flags.

  Args:
    given: what `--option` gave.

  Raises:
    ValueError: in place of `UnsaidError`, and of an option that no model has.
  """
  from utilized_rank.models.importing import UnsaidError

  try:
    yield
  except UnsaidError as error:
    raise ValueError(
      f'{error} On a command line: --option=NAME=VALUE, --architecture=NAME, '
      '--model_config=FILE, --assume.'
    ) from error
  except TypeError as error:  # the model has no such option
    raise ValueError(f'--option={" ".join(given)}: {error}') from error


def rules(select: str | None) -> Any:
  """The paths that one expression matches, and no others; None for all."""
  return None if select is None else [(select, True), ('.*', False)]


def batches_of(path: str, most: int) -> Callable[[], Iterable[Any]]:
  """Batches of as many examples as have so many places (tokens), or of one."""
  inputs = np.load(path, mmap_mode='r')
  step = max(1, most // max(1, int(np.prod(inputs.shape[1:2]))))
  return _in_batches(inputs, step)


def _in_batches(inputs: np.ndarray, step: int) -> Callable[[], Iterable[Any]]:
  """`step` examples after the other, read when their turn is."""
  starts = range(0, len(inputs), step)
  return lambda: (np.asarray(inputs[i : i + step]) for i in starts)


def options(given: Sequence[str]) -> Mapping[str, Any]:
  """`name=value` as keyword arguments.

  Raises:
    ValueError: one is not of this form.

  >>> options(['activation=relu', 'heads=12', 'epsilon=1e-6'])
  {'activation': 'relu', 'heads': 12, 'epsilon': 1e-06}
  """
  found = {}
  for option in given:
    name, equals, text = option.partition('=')
    if not name.isidentifier() or not equals:
      raise ValueError(f'--option={option}: NAME=VALUE is wanted')
    try:
      found[name] = ast.literal_eval(text)
    except (ValueError, SyntaxError):
      found[name] = text  # a word
  return found


def _arrays(path: str, wanted: tuple[int, ...]) -> Callable[[], Iterable[Any]]:
  inputs = np.load(path, mmap_mode='r')
  if inputs.ndim != 1 + len(wanted):
    raise ValueError(
      f'{path} holds {list(inputs.shape)}; the model takes {["N", *wanted]}'
    )
  return _in_batches(inputs, _BATCH)


def _images(
  path: str, preprocess: str | None, wanted: tuple[int, ...]
) -> Callable[[], Iterable[Any]]:
  from utilized_rank.data import arrays
  from utilized_rank.data import splits

  records = arrays.open_images(path)
  config = splits.DataConfig(
    'arrays', preprocess=preprocess, image_size=wanted[0]
  )
  source = splits.Source(
    records,
    config,
    num_classes=1,
    stored_shape=arrays.shape_of(records),
    channels=wanted[-1],
  )
  return lambda: (batch['image'] for batch in source.epoch(_BATCH))

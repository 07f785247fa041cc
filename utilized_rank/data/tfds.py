"""The splits of a prepared TFDS set, opened without TensorFlow."""

from __future__ import annotations

from collections.abc import Mapping
import difflib
import itertools
from typing import Any, NamedTuple

from utilized_rank.data import tfrecord
from utilized_rank.host.extras import extra


class Opened(NamedTuple):
  """What a kind of storage gives `data.load`.

  Attributes:
    records: per split an object with a length and `__getitems__(indices)`,
      which gives examples: image bytes or arrays, and a label.
    shape: `(H, W, C)` of the images; None where sizes vary.
    num_classes: number of labels.
  """

  records: dict[str, Any]
  shape: tuple[int | None, ...]
  num_classes: int


def open_splits(
  name: str,
  data_dir: str | None,
  specs: Mapping[str, str],
  image_key: str,
  label_key: str,
) -> Opened:
  """Opens slices of a set in `data_dir`; the digits are prepared if need be.

  Raises:
    FileNotFoundError: the set is not prepared in `data_dir`.
    ValueError: unknown name, slice or feature; slices that overlap or are
      empty; a format that is not read.
  """
  builder = _builder(name, data_dir)
  _check_specs(builder, specs)
  shape, num_classes = _features(builder, image_key, label_key)
  instructions = {
    split: _instructions(builder, split, spec) for split, spec in specs.items()
  }
  _check_disjoint(instructions, specs)
  records = {
    split: _records(builder, spec, instructions[split], image_key)
    for split, spec in specs.items()
  }
  return Opened(records, shape, num_classes)


def _builder(name: str, data_dir: str | None) -> Any:
  with extra('data'):
    import tensorflow_datasets as tfds

  where = data_dir or tfds.core.constants.DATA_DIR
  if name == 'sk_digits':
    return _digits_builder(data_dir)
  try:
    builder = tfds.builder(name, data_dir=data_dir)
  except tfds.core.registered.DatasetNotFoundError:
    names = tfds.list_builders(with_community_datasets=False)
    close = difflib.get_close_matches(name, [*names, 'sk_digits'], 1)
    hint = f'; did you mean {close[0]!r}?' if close else '.'
    raise ValueError(
      f'TFDS knows no data set {name!r}, and {where} holds none of '
      f'that name{hint}'
    ) from None
  except (ValueError, AssertionError) as error:
    reason = str(error).strip().split('\n')[0]
    raise ValueError(f'config.data.name={name!r}: {reason}') from None
  if not builder.is_prepared():
    raise FileNotFoundError(
      f'{name} is not prepared in {where}. Set config.data.data_dir to '
      'the directory that holds it, or prepare it once with: '
      'python -c "import tensorflow_datasets as tfds; '
      f"tfds.builder('{name}', data_dir=DIR, "
      "file_format='array_record').download_and_prepare()\""
    )
  return builder


def _digits_builder(data_dir: str | None) -> Any:
  with extra('data'):
    import tensorflow_datasets as tfds

  from utilized_rank.data import digits

  builder = digits.SkDigits(data_dir=data_dir)
  if builder.is_prepared():
    return builder
  tfds.disable_progress_bar()
  builder = digits.SkDigits(data_dir=data_dir, file_format='array_record')
  try:
    builder.download_and_prepare()
  except Exception:
    # Another process may have finished the same directory meanwhile.
    builder = digits.SkDigits(data_dir=data_dir)
    if not builder.is_prepared():
      raise
  return builder


def _check_specs(builder: Any, specs: Mapping[str, str]) -> None:
  missing = [split for split in specs.values() if not _known(builder, split)]
  if missing:
    raise ValueError(
      f'{builder.info.name} has the splits {", ".join(builder.info.splits)}; '
      f'{missing[0]!r} is none of them. Set config.data.splits to slices of '
      "them, such as train='train[:90%]', calibration='train[90%:92%]', "
      "validation='train[92%:]', test='test'."
    )


def _known(builder: Any, spec: str) -> bool:
  try:
    builder.info.splits[spec]
  except (KeyError, ValueError):
    return False
  return True


def _features(
  builder: Any, image_key: str, label_key: str
) -> tuple[tuple[int | None, ...], int]:
  with extra('data'):
    import tensorflow_datasets as tfds

  name, features = builder.info.name, builder.info.features
  for key in (image_key, label_key):
    if key not in features:
      raise ValueError(
        f'{name} has the features {", ".join(features)}; {key!r} is none of '
        'them. Set config.data.image_key and config.data.label_key.'
      )
  image, label = features[image_key], features[label_key]
  if not isinstance(image, tfds.features.Image):
    raise ValueError(
      f'the feature {image_key!r} of {name} is {type(image).__name__}; it '
      'must be an Image.'
    )
  if not isinstance(label, tfds.features.ClassLabel):
    raise ValueError(
      f'the feature {label_key!r} of {name} is {type(label).__name__}; it '
      'must be a ClassLabel.'
    )
  return tuple(image.shape), label.num_classes


def _instructions(builder: Any, split: str, spec: str) -> list[Any]:
  instructions = [
    i for i in builder.info.splits[spec].file_instructions if i.take
  ]
  if not instructions:
    raise ValueError(
      f'config.data.splits.{split}={spec!r} selects no image of '
      f'{builder.info.name}.'
    )
  return instructions


def _check_disjoint(
  instructions: Mapping[str, list[Any]], specs: Mapping[str, str]
) -> None:
  for one, other in itertools.combinations(instructions, 2):
    shared = 0
    for a in instructions[one]:
      for b in instructions[other]:
        if a.filename == b.filename:
          stop = min(a.skip + a.take, b.skip + b.take)
          shared += max(0, stop - max(a.skip, b.skip))
    if shared:
      raise ValueError(
        f'config.data.splits.{one}={specs[one]!r} and '
        f'config.data.splits.{other}={specs[other]!r} share {shared} images; '
        'choose slices that do not overlap.'
      )


def _records(
  builder: Any, spec: str, instructions: list[Any], image_key: str
) -> Any:
  with extra('data'):
    import tensorflow_datasets as tfds

  # TFDS without TensorFlow returns an image with the channels of its file;
  # `augment.decode` brings it to those of the feature.
  decoders = {image_key: tfds.decode.SkipDecoding()}
  file_format = builder.info.file_format.value
  if file_format == 'array_record':
    return builder.as_data_source(split=spec, decoders=decoders)
  if file_format == 'tfrecord':
    return tfrecord.TfRecords(instructions, builder.info.features, decoders)
  raise ValueError(
    f'{builder.info.name} is stored as {file_format}; array_record and '
    'tfrecord are read.'
  )

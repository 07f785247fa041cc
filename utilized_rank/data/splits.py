"""Image classification data, from TFDS without TensorFlow or from arrays.

A batch of training images is a function of the seed and the step alone: any
step can be made at any time, which is what resuming needs, and several are
made ahead in threads. Sets that fit are held decoded in memory.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping
import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import math
import os
import threading
from typing import Any

import numpy as np

from utilized_rank.data import arrays
from utilized_rank.data import augment as augment_lib
from utilized_rank.data import preprocess
from utilized_rank.data import tfds
from utilized_rank.host import options

Batch = dict[str, np.ndarray]

SPLITS = ('train', 'calibration', 'validation', 'test')
# Batches made ahead of the consumer.
PREFETCH = 4


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """What to read; the section `config.data`.

  Attributes:
    name: TFDS name, with `/config` and `:version` as TFDS takes them; or
      'arrays' for `.npz` files.
    data_dir: directory of prepared sets, None for TFDS's own default; or the
      directory of the files.
    splits: for each of `SPLITS` a TFDS split or slice, such as
      `train[:90%]`, or a file or slice of it, such as `train.npz[:90%]` (see
      `arrays`); None when a TFDS set has these four splits itself.
    augment: a key of `augment.AUGMENTATIONS`, or None.
    mean: per channel (or for all) of pixels in [0, 1]; subtracted.
    std: likewise; divided by.
    preprocess: a key of `preprocess.PREPROCESS` for the images of published
      checkpoints: it decides how evaluation resizes and crops, and `mean` and
      `std`, which are then not to be given, like `crop_fraction`.
    image_size: side to resize to; None keeps the size that the set has.
    crop_fraction: part of the shorter side that evaluation sees when it
      resizes; 0.875 is usual for ImageNet.
    cache_bytes: a split whose decoded images need no more is held in memory.
    image_key: name of the image feature, or of the file's array.
    label_key: name of the label feature, or of the file's array.
  """

  name: str
  data_dir: str | None = None
  splits: Mapping[str, str] | None = None
  augment: str | None = None
  mean: tuple[float, ...] = (0.5,)
  std: tuple[float, ...] = (0.5,)
  preprocess: str | None = None
  image_size: int | None = None
  crop_fraction: float = 1.0
  cache_bytes: int = 2**30
  image_key: str = 'image'
  label_key: str = 'label'


class Source:
  """One split: its length, its shapes, and batches of it.

  Attributes:
    num_classes: number of labels.
    image_shape: `(H, W, C)` of the images in a batch.
  """

  def __init__(
    self,
    records: Any,
    config: DataConfig,
    *,
    num_classes: int,
    stored_shape: tuple[int | None, ...],
    channels: int,
  ):
    self._records = records
    self._config = config
    self._lock = threading.Lock()
    self._augment = (
      augment_lib.AUGMENTATIONS[config.augment] if config.augment else None
    )
    self.num_classes = num_classes
    self._preprocess = (
      preprocess.PREPROCESS[config.preprocess] if config.preprocess else None
    )
    about = self._preprocess or config
    self._mean = np.float32(255) * np.asarray(about.mean, np.float32)
    self._std = np.float32(255) * np.asarray(about.std, np.float32)
    size = config.image_size or stored_shape[0]
    assert size is not None  # load has checked that one of them is given
    self.image_shape = (size, size, channels)
    # Without a fixed size the set is kept as it is stored, so that random
    # crops see the whole image.
    self._cached = False
    if None not in stored_shape:
      held = stored_shape if self._preprocess else self.image_shape
      pixels = math.prod(n for n in held if n is not None)
      self._cached = len(records) * pixels <= config.cache_bytes

  def __len__(self) -> int:
    return len(self._records)

  def batches(
    self,
    batch_size: int,
    *,
    seed: int,
    augment: bool = True,
    start_step: int = 0,
  ) -> Iterator[Batch]:
    """Yields shuffled training batches without end.

    Every image comes once per epoch, and an epoch begins in the middle of a
    batch where the length is no multiple of the batch size.

    Args:
      batch_size: images per batch.
      seed: decides order and augmentation.
      augment: apply the config's augmentation.
      start_step: number of batches to pass over, at no cost.

    Yields:
      `{'image': (B, H, W, C) float32, 'label': (B,) int32}`.
    """
    if batch_size < 1 or start_step < 0 or seed < 0:
      raise ValueError(
        f'batch_size={batch_size}, start_step={start_step}, seed={seed}; the '
        'first must be positive, the others not negative.'
      )
    make = functools.partial(self._train_batch, batch_size, seed, augment)
    return _ahead(make, itertools.count(start_step))

  def epoch(self, batch_size: int) -> Iterator[Batch]:
    """Yields the split once, in order, not augmented; the last is smaller."""
    if batch_size < 1:
      raise ValueError(f'batch_size={batch_size}; it must be positive.')

    def make(start: int) -> Batch:
      stop = min(start + batch_size, len(self))
      images, labels = self._read(np.arange(start, stop))
      return self._batch(self._resize(images), labels)

    return _ahead(make, range(0, len(self), batch_size))

  def _train_batch(
    self, batch_size: int, seed: int, augment: bool, step: int
  ) -> Batch:
    first = step * batch_size
    epochs, positions = np.divmod(
      np.arange(first, first + batch_size), len(self)
    )
    indices = np.empty(batch_size, np.int64)
    for epoch in np.unique(epochs):
      here = epochs == epoch
      indices[here] = _order(len(self), seed, int(epoch))[positions[here]]
    images, labels = self._read(indices)
    if augment and self._augment is not None:
      rng = np.random.default_rng((seed, 1, step))
      images = self._augment(images, self.image_shape[0], rng)
    else:
      images = self._resize(images)
    return self._batch(images, labels)

  def _read(self, indices: np.ndarray) -> tuple[Any, np.ndarray]:
    if self._cached:
      # One thread decodes, and the others wait for it.
      with self._lock:
        images, labels = self._memory
      if isinstance(images, np.ndarray):
        return images[indices], labels[indices]
      return [images[i] for i in indices], labels[indices]
    return self._read_records(indices)

  def _read_records(
    self, indices: np.ndarray
  ) -> tuple[list[np.ndarray], np.ndarray]:
    examples = self._records.__getitems__([int(i) for i in indices])
    labels = [example[self._config.label_key] for example in examples]
    channels = self.image_shape[-1]
    images = [
      _pixels(example[self._config.image_key], channels) for example in examples
    ]
    return images, np.asarray(labels, np.int32)

  @functools.cached_property
  def _memory(self) -> tuple[Any, np.ndarray]:
    images, labels = self._read_records(np.arange(len(self)))
    # Some preprocessing gives no uint8, which augmentation takes.
    return images if self._preprocess else self._resize(images), labels

  def _resize(self, images: Any) -> np.ndarray:
    size, fraction = self.image_shape[0], self._config.crop_fraction
    if self._preprocess is None:
      return augment_lib.resize(images, size, fraction)
    return np.stack([self._preprocess.resize(x, size) for x in images])

  def _batch(self, images: np.ndarray, labels: np.ndarray) -> Batch:
    return {'image': (images - self._mean) / self._std, 'label': labels}


def load(config: Any) -> dict[str, Source]:
  """Opens the four splits of a prepared TFDS set.

  The embedded set `sk_digits` is prepared when it is not there; it needs no
  network. Every other set must have been prepared, as array_record or as
  TFRecord; nothing is ever downloaded.

  Args:
    config: a `DataConfig`, or a mapping of its fields.

  Returns:
    A `Source` for each of `SPLITS`.

  Raises:
    FileNotFoundError: the set is not prepared in `data_dir`.
    ValueError: unknown name, split, feature, augmentation or preprocessing;
      splits that overlap or are empty; images of varying size without
      `image_size`.
  """
  config = options.from_config(DataConfig, config, 'config.data')
  _check_names(config)
  specs = _specs(config)
  keys = (config.image_key, config.label_key)
  if config.name == 'arrays':
    opened = arrays.open_splits(config.data_dir, specs, *keys)
  else:
    opened = tfds.open_splits(config.name, config.data_dir, specs, *keys)
  _check_shape(config, opened.shape)
  return {
    split: Source(
      opened.records[split],
      config,
      num_classes=opened.num_classes,
      stored_shape=opened.shape,
      channels=opened.shape[-1] or 3,
    )
    for split in specs
  }


def _specs(config: DataConfig) -> dict[str, str]:
  given = {split: split for split in SPLITS}
  if config.splits is not None:
    given = {key: config.splits[key] for key in config.splits}
  if sorted(given) != sorted(SPLITS):
    raise ValueError(
      f'config.data.splits has the keys {sorted(given)}; it takes '
      f'{", ".join(SPLITS)}.'
    )
  return {split: given[split] for split in SPLITS}


def _check_shape(config: DataConfig, shape: tuple[int | None, ...]) -> None:
  square = shape[0] is not None and shape[0] == shape[1]
  if config.image_size is None and not square:
    raise ValueError(
      f'the images of {config.name} have shape {shape}; set '
      'config.data.image_size to bring them to one square size.'
    )
  about: Any = config
  where = 'config.data.'
  if config.preprocess is not None:
    about = preprocess.PREPROCESS[config.preprocess]
    where = f'preprocess={config.preprocess!r}: its '
  for name in ('mean', 'std'):
    if len(getattr(about, name)) not in (1, shape[-1]):
      raise ValueError(
        f'{where}{name} has {len(getattr(about, name))} values; the images '
        f'of {config.name} have {shape[-1]} channels.'
      )


def _check_names(config: DataConfig) -> None:
  for name, table in (
    ('augment', augment_lib.AUGMENTATIONS),
    ('preprocess', preprocess.PREPROCESS),
  ):
    value = getattr(config, name)
    if value not in (None, *table):
      raise ValueError(
        f'config.data.{name}={value!r}; it is None or one of '
        f'{", ".join(table)}.'
      )
  if config.preprocess is not None:
    for field in dataclasses.fields(config):
      given = getattr(config, field.name)
      if field.name in ('mean', 'std', 'crop_fraction') and (
        given != field.default
      ):
        raise ValueError(
          f'config.data.{field.name}={given!r} and '
          f'preprocess={config.preprocess!r}, which decides it; give one.'
        )


def _pixels(image: Any, channels: int) -> np.ndarray:
  if isinstance(image, bytes):
    return augment_lib.decode(image, channels)
  return image.reshape(*image.shape[:2], channels)


@functools.lru_cache(maxsize=4)
def _order(length: int, seed: int, epoch: int) -> np.ndarray:
  return np.random.default_rng((seed, 0, epoch)).permutation(length)


def _ahead(make: Any, arguments: Any) -> Iterator[Batch]:
  """Yields `make(a)` in order while threads work on the next ones."""
  # Decoding and most of numpy release the interpreter's lock.
  workers = min(os.cpu_count() or 1, PREFETCH)
  arguments = iter(arguments)
  with contextlib.ExitStack() as stack:
    pool = concurrent.futures.ThreadPoolExecutor(workers)
    # Runs when the consumer drops the iterator, too; nothing is waited for.
    stack.callback(pool.shutdown, wait=False, cancel_futures=True)
    pending = collections.deque(
      pool.submit(make, a) for a in itertools.islice(arguments, PREFETCH)
    )
    while pending:
      yield pending.popleft().result()
      for a in itertools.islice(arguments, 1):
        pending.append(pool.submit(make, a))

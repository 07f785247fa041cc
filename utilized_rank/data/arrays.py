"""Images and labels from `.npz` files, as the splits of a data set.

A file holds images, `(N, H, W)` or `(N, H, W, C)` uint8, or the bytes of N
encoded images one after the other with their `N + 1` offsets; and N labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import io
import os
import re
from typing import Any

import numpy as np

from utilized_rank.data.tfds import Opened
from utilized_rank.host.extras import extra

with extra('data'):
  from PIL import Image

# A sorted file would give a slice few of the classes.
ORDER_SEED = 0
OFFSETS = 'offsets'

_SPEC = re.compile(r'([^\[\]]+\.npz)(?:\[(\d+%?)?:(\d+%?)?\])?')


@dataclasses.dataclass(frozen=True)
class Arrays:
  """The opened file and the chosen images of it.

  `__getitems__` gives `{image_key: array or bytes, label_key: int}` each.
  """

  images: np.ndarray
  offsets: np.ndarray | None
  labels: np.ndarray
  indices: np.ndarray
  keys: tuple[str, str]

  def __len__(self) -> int:
    return len(self.indices)

  def __getitems__(self, wanted: Sequence[int]) -> list[dict[str, Any]]:
    image_key, label_key = self.keys
    return [
      {image_key: self.image(i), label_key: self.labels[i]}
      for i in self.indices[np.asarray(wanted)].tolist()
    ]

  def image(self, i: int) -> Any:
    if self.offsets is None:
      return self.images[i]
    return self.images[self.offsets[i] : self.offsets[i + 1]].tobytes()


def open_splits(
  folder: str | os.PathLike[str] | None,
  specs: Mapping[str, str],
  image_key: str,
  label_key: str,
) -> Opened:
  """Opens files, each once, for splits such as `train.npz[:90%]`.

  A slice is one of the file's images in an order drawn with `ORDER_SEED`,
  since files may be sorted by class; a file without a slice keeps its order.
  Encoded images of varying size count as having the size of the first.

  Args:
    folder: where the files are; None for the current one.
    specs: split to `FILE.npz`, or `FILE.npz[START:STOP]` with numbers of
      images or percentages.
    image_key: the file's array of images, or of bytes beside `offsets`.
    label_key: the file's array of labels.

  Raises:
    FileNotFoundError: a file is not there.
    ValueError: a spec that is no such slice, an array that is missing or has
      another shape or type, files that differ in the size of their images,
      an empty split, or splits that share images.
  """
  files: dict[str, tuple[np.ndarray, np.ndarray | None, np.ndarray]] = {}
  taken: dict[str, dict[str, np.ndarray]] = {}
  records = {}
  for split, spec in specs.items():
    match = _SPEC.fullmatch(spec)
    if match is None:
      raise ValueError(
        f'config.data.splits.{split}={spec!r}; of arrays it is FILE.npz or '
        'FILE.npz[START:STOP], in images or percent.'
      )
    name, start, stop = match.groups()
    if name not in files:
      path = os.path.join(folder or '', name)
      files[name] = _read(path, image_key, label_key)
    images, offsets, labels = files[name]
    count = len(labels)
    indices = np.arange(count)
    if spec != name:
      order = np.random.default_rng(ORDER_SEED).permutation(count)
      indices = order[_place(start, count, 0) : _place(stop, count, count)]
    if not len(indices):
      raise ValueError(
        f'config.data.splits.{split}={spec!r} selects none of the {count} '
        f'images of {name}.'
      )
    for other, theirs in taken.setdefault(name, {}).items():
      shared = len(np.intersect1d(theirs, indices))
      if shared:
        raise ValueError(
          f'config.data.splits.{other}={specs[other]!r} and '
          f'config.data.splits.{split}={spec!r} share {shared} images; '
          'choose slices that do not overlap.'
        )
    taken[name][split] = indices
    keys = (image_key, label_key)
    records[split] = Arrays(images, offsets, labels, indices, keys)
  shapes = {split: shape_of(part) for split, part in records.items()}
  if len(set(shapes.values())) > 1:
    raise ValueError(f'the images of the splits differ in shape: {shapes}')
  classes = 1 + max(int(labels.max()) for _, _, labels in files.values())
  return Opened(records, next(iter(shapes.values())), classes)


def open_images(path: str, image_key: str = 'image') -> Arrays:
  """All images of one file, whether it has labels or not.

  Raises:
    FileNotFoundError: there is no file.
    ValueError: it has no such array, or one of another shape or type.
  """
  images, offsets, labels = _read(path, image_key, None)
  keys = (image_key, 'label')
  return Arrays(images, offsets, labels, np.arange(len(labels)), keys)


def _read(
  path: str, image_key: str, label_key: str | None
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
  with np.load(path, allow_pickle=False) as file:
    for key in (image_key, label_key):
      if key is None:
        continue
      if key not in file:
        raise ValueError(
          f'{path} has the arrays {", ".join(file)}; {key!r} is none of them. '
          'Set config.data.image_key and config.data.label_key.'
        )
    images = file[image_key]
    labels = None if label_key is None else file[label_key]
    offsets = file[OFFSETS] if images.ndim == 1 else None
  if images.dtype != np.uint8 or images.ndim not in (1, 3, 4):
    raise ValueError(
      f'{path}: {image_key!r} is {images.dtype}{list(images.shape)}; it must '
      f'be uint8, (N, H, W), (N, H, W, C), or bytes with {OFFSETS!r}.'
    )
  count = len(images) if offsets is None else len(offsets) - 1
  if labels is None:
    return images, offsets, np.zeros(count, np.int32)
  if labels.shape != (count,) or labels.dtype.kind not in 'iu':
    raise ValueError(
      f'{path}: {label_key!r} is {labels.dtype}{list(labels.shape)}; it must '
      f'hold an integer for each of the {count} images.'
    )
  return images, offsets, labels


def _place(text: str | None, count: int, default: int) -> int:
  if text is None:
    return default
  if text.endswith('%'):
    return round(count * int(text[:-1]) / 100)
  return int(text)


def shape_of(records: Arrays) -> tuple[int, ...]:
  """`(H, W, C)` of the images; of encoded ones that of the first."""
  if records.offsets is None:
    shape = records.images.shape[1:]
    return shape if len(shape) == 3 else (*shape, 1)
  first = records.image(int(records.indices[0]))
  with Image.open(io.BytesIO(first)) as image:
    channels = 1 if image.mode == 'L' else 3
    return (image.height, image.width, channels)

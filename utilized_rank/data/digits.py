"""scikit-learn's bundled handwritten digits as a TFDS data set, offline.

1,797 real 8x8 images of ten classes from the UCI "Optical Recognition of
Handwritten Digits" test set (Alpaydin and Kaynak, 1998). Importing this
module registers the name `sk_digits` with tensorflow_datasets.
"""

from __future__ import annotations

from collections.abc import Iterator
import io
from typing import Any

import numpy as np

from utilized_rank.host.extras import extra

with extra('data'):
  import tensorflow_datasets as tfds

# The calibration images are drawn like the training images and are used for
# nothing else. With 16 tokens each they still give 8 times as many rows as the
# widest layer of configs/digits_vit.py has features.
SIZES = {'test': 360, 'validation': 128, 'calibration': 128}
SPLIT_SEED = 0


class SkDigits(tfds.core.GeneratorBasedBuilder):
  """Digits in the disjoint splits train, calibration, validation, test."""

  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES = {'1.0.0': 'First version.'}
  name = 'sk_digits'

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description=__doc__,
      features=tfds.features.FeaturesDict(
        {
          'image': tfds.features.Image(shape=(8, 8, 1), encoding_format='png'),
          'label': tfds.features.ClassLabel(num_classes=10),
        }
      ),
      supervised_keys=('image', 'label'),
    )

  def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
    images, labels = _digits()
    return {
      split: self._generate_examples(images, labels, indices)
      for split, indices in split_indices(labels).items()
    }

  def _generate_examples(
    self, images: np.ndarray, labels: np.ndarray, indices: np.ndarray
  ) -> Iterator[tuple[int, dict[str, Any]]]:
    for i in indices.tolist():
      yield i, {'image': _png(images[i]), 'label': int(labels[i])}


def split_indices(labels: np.ndarray) -> dict[str, np.ndarray]:
  """Draws disjoint splits with equal class proportions.

  Args:
    labels: `(N,)` integer classes.

  Returns:
    Indices into `labels`, sorted, by split name; together all of them.
  """
  order = np.random.default_rng(SPLIT_SEED).permutation(len(labels))
  # Each image's position within its class, as a fraction: sorted by it, every
  # contiguous run has nearly the proportions of the whole.
  fraction = np.empty(len(labels))
  for label in np.unique(labels):
    members = order[labels[order] == label]
    fraction[members] = (np.arange(len(members)) + 0.5) / len(members)
  ranked = order[np.argsort(fraction[order], kind='stable')]
  splits, start = {}, 0
  for split, size in SIZES.items():
    splits[split] = np.sort(ranked[start : start + size])
    start += size
  splits['train'] = np.sort(ranked[start:])
  return splits


def _digits() -> tuple[np.ndarray, np.ndarray]:
  with extra('data'):
    from sklearn.datasets import load_digits
  digits = load_digits()
  # 0..16 to 0..255; no two values meet, so nothing is lost.
  images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
  return images, digits.target


def _png(image: np.ndarray) -> io.BytesIO:
  # Encoded here because TFDS encodes an ndarray with TensorFlow only.
  with extra('data'):
    from PIL import Image

  file = io.BytesIO()
  Image.fromarray(image).save(file, 'PNG')
  file.seek(0)
  return file

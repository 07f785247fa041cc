"""Augmentation and resizing of uint8 images in numpy.

An augmentation takes images, the side of the result and a generator, and
returns `(B, size, size, C)` uint8. The images are one `(B, H, W, C)` array or
a sequence of `(H, W, C)` arrays whose sizes may differ. The generator alone
decides the outcome, so that a batch is a function of its seed and step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import io

import numpy as np

from utilized_rank.host.extras import extra

with extra('data'):
  from PIL import Image

Images = np.ndarray | Sequence[np.ndarray]
Augmentation = Callable[[Images, int, np.random.Generator], np.ndarray]


def decode(raw: bytes, channels: int) -> np.ndarray:
  """Decodes a PNG or JPEG file to `(H, W, channels)` uint8.

  Palettes, transparency, CMYK and grey are brought to the channels asked for,
  as TensorFlow does.

  Raises:
    ValueError: `channels` is not 1, 3 or 4.
  """
  modes = {1: 'L', 3: 'RGB', 4: 'RGBA'}
  if channels not in modes:
    raise ValueError(f'channels={channels}; images have 1, 3 or 4.')
  with Image.open(io.BytesIO(raw)) as image:
    array = np.asarray(image.convert(modes[channels]))
  return array.reshape(*array.shape[:2], channels)


def resize(images: Images, size: int, crop_fraction: float = 1.0) -> np.ndarray:
  """Scales the shorter side and cuts out the central square.

  Args:
    images: see the module.
    size: side of the result in pixels.
    crop_fraction: `size` over the length of the scaled shorter side; 0.875 is
      usual for ImageNet.

  Returns:
    `(B, size, size, C)` uint8.
  """
  if isinstance(images, np.ndarray) and images.shape[1:3] == (size, size):
    return images
  return np.stack([_resize_one(x, size, crop_fraction) for x in images])


def _resize_one(
  image: np.ndarray, size: int, crop_fraction: float
) -> np.ndarray:
  height, width = image.shape[:2]
  if (height, width) == (size, size) and crop_fraction == 1.0:
    return image
  side = min(height, width) * crop_fraction
  top, left = (height - side) / 2, (width - side) / 2
  return _cut(image, top, left, side, side, size)


def affine(images: Images, size: int, rng: np.random.Generator) -> np.ndarray:
  """Rotates, scales and shears a little, and moves by up to an eighth.

  Up to 15 degrees, a factor of 1.15 and a shear of 0.15; zeros come in from
  outside. It suits writing: strokes on an empty background, not mirrored.
  """
  images = resize(images, size)
  count = len(images)
  angle = np.deg2rad(rng.uniform(-15, 15, count))
  scale = np.exp(rng.uniform(-np.log(1.15), np.log(1.15), (2, count)))
  shear = rng.uniform(-0.15, 0.15, count)
  move = rng.uniform(-size / 8, size / 8, (2, count))
  sin, cos = np.sin(angle), np.cos(angle)
  # The inverse map: where in the source each pixel of the result comes from.
  matrix = np.array(
    [
      [cos * scale[0], (shear * cos - sin) * scale[0]],
      [sin * scale[1], (shear * sin + cos) * scale[1]],
    ]
  )
  grid = np.indices((size, size)).reshape(2, -1) - (size - 1) / 2
  places = np.einsum('ijb,jp->ibp', matrix, grid) + move[..., None]
  return _bilinear(images, places + (size - 1) / 2)


def crop_flip(
  images: Images, size: int, rng: np.random.Generator
) -> np.ndarray:
  """Pads by an eighth with reflection, crops at random, mirrors one in two."""
  images = resize(images, size)
  return _flip(_random_window(images, size // 8, rng), rng)


def inception(
  images: Images, size: int, rng: np.random.Generator
) -> np.ndarray:
  """Cuts out 8-100 % of the area at aspect 3/4-4/3; mirrors one in two."""
  return _flip(np.stack([_random_area(x, size, rng) for x in images]), rng)


AUGMENTATIONS: dict[str, Augmentation] = {
  'affine': affine,
  'crop_flip': crop_flip,
  'inception': inception,
}


def _bilinear(images: np.ndarray, places: np.ndarray) -> np.ndarray:
  """Reads images `(B, H, H, C)` at places `(2, B, H*H)`; zero outside."""
  count, size, _, channels = images.shape
  flat = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0))).reshape(
    count, -1, channels
  )
  # The border of zeros stands for everything outside.
  places = np.clip(places + 1, 0, size + 1 - 1e-6)
  corner = places.astype(np.int64)
  (row, column), (down, right) = corner, places - corner
  index = row * (size + 2) + column
  result = 0.0
  for step, weight in (
    (0, (1 - down) * (1 - right)),
    (1, (1 - down) * right),
    (size + 2, down * (1 - right)),
    (size + 3, down * right),
  ):
    pixels = np.take_along_axis(flat, (index + step)[..., None], axis=1)
    result = result + weight[..., None] * pixels
  return np.rint(result).astype(np.uint8).reshape(images.shape)


def _random_window(
  images: np.ndarray, pad: int, rng: np.random.Generator
) -> np.ndarray:
  count, height, width, _ = images.shape
  pads = ((0, 0), (pad, pad), (pad, pad), (0, 0))
  padded = np.pad(images, pads, mode='reflect')
  top, left = rng.integers(0, 2 * pad + 1, (2, count))
  rows = top[:, None] + np.arange(height)
  columns = left[:, None] + np.arange(width)
  return padded[
    np.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]
  ]


def _flip(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  mirrored = rng.integers(0, 2, len(images)).astype(bool)
  return np.where(mirrored[:, None, None, None], images[:, :, ::-1], images)


def _random_area(
  image: np.ndarray, size: int, rng: np.random.Generator
) -> np.ndarray:
  height, width = image.shape[:2]
  # Ten tries, as everywhere; the whole image where none fits.
  for _ in range(10):
    area = height * width * rng.uniform(0.08, 1.0)
    aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
    cut_width, cut_height = np.sqrt(area * aspect), np.sqrt(area / aspect)
    if cut_width <= width and cut_height <= height:
      top = rng.uniform(0, height - cut_height)
      left = rng.uniform(0, width - cut_width)
      return _cut(image, top, left, cut_height, cut_width, size)
  return _cut(image, 0, 0, height, width, size)


def _cut(
  image: np.ndarray,
  top: float,
  left: float,
  height: float,
  width: float,
  size: int,
) -> np.ndarray:
  from PIL import Image

  # PIL takes grey images without a channel axis.
  picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
  picture = picture.resize(
    (size, size),
    Image.Resampling.BILINEAR,
    box=(left, top, left + width, top + height),
  )
  return np.asarray(picture).reshape(size, size, image.shape[-1])

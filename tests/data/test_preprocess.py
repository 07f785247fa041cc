"""Preprocessing against torchvision's and TensorFlow's arithmetic, restated."""

import math

import numpy as np
from PIL import Image
import pytest

from utilized_rank.data.preprocess import PREPROCESS

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(0)
SHAPES = [(37, 61), (60, 41), (48, 48), (20, 33)]


def image_of(shape):
  """Smooth enough that a pixel's shift shows, with noise on top."""
  rows, columns = np.indices(shape)
  waves = np.sin(rows / 5)[..., None] + np.cos(columns / 7)[..., None] * [
    1,
    2,
    0.5,
  ]
  noise = RNG.uniform(-20, 20, waves.shape)
  return np.clip(128 + 30 * waves + noise, 0, 255).astype(np.uint8)


def torchvision(image, resize, size, method):
  """Resize(resize), CenterCrop(size): F.resize and F.center_crop on PIL."""
  picture = Image.fromarray(image)
  w, h = picture.size
  if w <= h:
    new = (resize, int(resize * h / w))
  else:
    new = (int(resize * w / h), resize)
  picture = picture.resize(new, method)
  w, h = picture.size
  top, left = int(round((h - size) / 2.0)), int(round((w - size) / 2.0))
  return np.asarray(picture.crop((left, top, left + size, top + size)))


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize(
  ('name', 'size', 'resize', 'method'),
  [
    ('torchvision', 28, 32, Image.Resampling.BILINEAR),
    ('mocov3', 28, 32, Image.Resampling.BILINEAR),
    ('dino', 28, 32, Image.Resampling.BICUBIC),
    ('dinov2', 28, 32, Image.Resampling.BICUBIC),
    ('mae', 28, 32, Image.Resampling.BICUBIC),
    ('deit', 28, 32, Image.Resampling.BICUBIC),
    ('clip', 28, 28, Image.Resampling.BICUBIC),
    # int(224 / 0.9) = 248 and int(224 / 0.95) = 235 at full size.
    ('timm_vit', 28, math.floor(28 / 0.9), Image.Resampling.BICUBIC),
    ('timm_resnet', 28, math.floor(28 / 0.95), Image.Resampling.BICUBIC),
    ('torchvision_v2', 28, 29, Image.Resampling.BILINEAR),
  ],
)
def test_pytorch_families(shape, name, size, resize, method):
  image = image_of(shape)
  found = PREPROCESS[name].resize(image, size)
  np.testing.assert_array_equal(found, torchvision(image, resize, size, method))


@pytest.mark.parametrize(
  ('name', 'resize'),
  [
    ('torchvision', 256),
    ('torchvision_v2', 232),
    ('timm_vit', 248),
    ('timm_resnet', 235),
    ('clip', 224),
  ],
)
def test_sides_at_224(name, resize):
  image = image_of((300, 450))
  method = Image.Resampling[PREPROCESS[name].resample.upper()]
  np.testing.assert_array_equal(
    PREPROCESS[name].resize(image, 224), torchvision(image, resize, 224, method)
  )


def lerp(image, y, x):
  """One pixel of tf.image.resize(bilinear, antialias=False)."""
  h, w, _ = image.shape
  top, left = math.floor(y), math.floor(x)
  down, right = y - top, x - left
  pixel = lambda i, j: image[min(max(i, 0), h - 1), min(max(j, 0), w - 1)]
  return (1 - down) * (
    (1 - right) * pixel(top, left) + right * pixel(top, left + 1)
  ) + down * (
    (1 - right) * pixel(top + 1, left) + right * pixel(top + 1, left + 1)
  )


@pytest.mark.parametrize('shape', SHAPES)
def test_augreg(shape):
  image = image_of(shape).astype(np.float64)
  h, w, _ = image.shape
  size = 24
  expected = [
    [lerp(image, (i + 0.5) * h / size - 0.5, (j + 0.5) * w / size - 0.5)
     for j in range(size)]
    for i in range(size)
  ]  # fmt: skip
  found = PREPROCESS['augreg'].resize(image.astype(np.uint8), size)
  # float32 sums of pixels up to 255.
  np.testing.assert_allclose(found, expected, atol=1e-4)


def area(image, height, width):
  """tf.image.resize(area): means over boxes with partial pixels, slowly."""
  h, w, _ = image.shape
  out = np.zeros((height, width, 3))
  for i in range(height):
    for j in range(width):
      y0, y1 = i * h / height, (i + 1) * h / height
      x0, x1 = j * w / width, (j + 1) * w / width
      for y in range(math.floor(y0), min(math.ceil(y1), h)):
        for x in range(math.floor(x0), min(math.ceil(x1), w)):
          share = (min(y1, y + 1) - max(y0, y)) * (min(x1, x + 1) - max(x0, x))
          out[i, j] += share * image[y, x]
  return out * (height / h) * (width / w)


@pytest.mark.parametrize('shape', SHAPES)
def test_big_vision(shape):
  """resize_small(32)|central_crop(28), the crop rounded down."""
  image = image_of(shape)
  factor = 32 / min(shape)
  scaled = area(image.astype(np.float64), *(round(s * factor) for s in shape))
  top, left = ((n - 28) // 2 for n in scaled.shape[:2])
  expected = scaled[top : top + 28, left : left + 28]
  found = PREPROCESS['big_vision'].resize(image, 28)
  assert found.dtype == np.uint8
  # Cut off; a mean that float32 holds as just below a whole number is not.
  assert (np.abs(found - np.floor(expected + 1e-3)) == 0).all()


def test_hugging_face_vit_squashes():
  image = image_of((37, 61))
  picture = Image.fromarray(image).resize((24, 24), Image.Resampling.BILINEAR)
  found = PREPROCESS['hf_vit'].resize(image, 24)
  np.testing.assert_array_equal(found, np.asarray(picture))


def test_grey_images():
  image = image_of((30, 40))[..., :1]
  for spec in PREPROCESS.values():
    assert spec.resize(image, 16).shape == (16, 16, 1)

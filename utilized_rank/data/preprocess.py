"""Resizing, cropping and normalising as each family of checkpoints expects.

What an image is fed as is part of a published model: the same weights lose up
to a few points under another crop or interpolation. Each entry of `PREPROCESS`
does what the evaluation code named beside it does.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import functools
import math

import numpy as np

from utilized_rank.host.extras import extra

with extra('data'):
  from PIL import Image

_IMAGENET = {'mean': (0.485, 0.456, 0.406), 'std': (0.229, 0.224, 0.225)}
_HALF = {'mean': (0.5,) * 3, 'std': (0.5,) * 3}
_CLIP = {
  'mean': (0.48145466, 0.4578275, 0.40821073),
  'std': (0.26862954, 0.26130258, 0.27577711),
}


@dataclasses.dataclass(frozen=True)
class Preprocess:
  """One family's evaluation preprocessing.

  Attributes:
    crop: share of the scaled shorter side that the central square takes;
      None scales both sides to the square, whatever the aspect.
    resample: a key of `RESAMPLE`.
    rounding: of the scaled and cropped sides, a key of `ROUNDING`.
    mean: per channel of pixels in [0, 1]; subtracted.
    std: likewise; divided by.
  """

  crop: float | None
  resample: str
  rounding: str
  mean: tuple[float, ...]
  std: tuple[float, ...]

  def resize(self, image: np.ndarray, size: int) -> np.ndarray:
    """Scales and crops; pixels stay in [0, 255].

    Args:
      image: `(H, W, C)` uint8.
      size: side of the result.

    Returns:
      `(size, size, C)` uint8, or float32 where the original does not round.

    >>> image = np.full((20, 30, 3), 255, np.uint8)
    >>> PREPROCESS['augreg'].resize(image, 4).shape
    (4, 4, 3)
    """
    resample = RESAMPLE[self.resample]
    if self.crop is None:
      return resample(image, size, size)
    sides = np.array(image.shape[:2])
    scale, start = ROUNDING[self.rounding]
    # timm's floor(224 / 0.9); a ratio such as 224 / 256 is meant exactly.
    short = math.floor(size / self.crop + 1e-9)
    height, width = (
      short if side == sides.min() else scale(side, short, int(sides.min()))
      for side in sides.tolist()
    )
    scaled = resample(image, height, width)
    top, left = start(height - size), start(width - size)
    return scaled[top : top + size, left : left + size]


def _pillow(
  method: Image.Resampling, image: np.ndarray, height: int, width: int
) -> np.ndarray:
  # PIL takes grey images without a channel axis.
  picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
  if picture.size != (width, height):
    picture = picture.resize((width, height), method)
  return np.asarray(picture).reshape(height, width, image.shape[-1])


def _tf_bilinear(image: np.ndarray, height: int, width: int) -> np.ndarray:
  """`tf.image.resize`: two taps, however much smaller the result is."""

  def weights(old: int, new: int) -> np.ndarray:
    at = (np.arange(new) + 0.5) * (old / new) - 0.5
    low = np.floor(at)
    taps = np.clip(np.stack([low, low + 1], 1).astype(int), 0, old - 1)
    result = np.zeros((new, old))
    share = np.stack([1 - (at - low), at - low], 1)
    np.add.at(result, (np.arange(new)[:, None], taps), share)
    return result

  return _separable(
    image, weights(len(image), height), weights(image.shape[1], width)
  )


def _tf_area(image: np.ndarray, height: int, width: int) -> np.ndarray:
  """`tf.image.resize(method='area')`, then the cast to uint8 of big_vision."""

  def weights(old: int, new: int) -> np.ndarray:
    edges = np.arange(new + 1) * (old / new)
    pixel = np.arange(old)
    overlap = np.minimum(edges[1:, None], pixel + 1) - np.maximum(
      edges[:-1, None], pixel
    )
    return np.clip(overlap, 0, None) * (new / old)

  mean = _separable(
    image, weights(len(image), height), weights(image.shape[1], width)
  )
  # A cast cuts off, but not what float32 only just missed.
  return np.floor(mean + 1e-3).astype(np.uint8)


def _separable(
  image: np.ndarray, rows: np.ndarray, columns: np.ndarray
) -> np.ndarray:
  rows, columns = rows.astype(np.float32), columns.astype(np.float32)
  half = np.tensordot(rows, image.astype(np.float32), (1, 0))
  return np.tensordot(half, columns, (1, 1)).transpose(0, 2, 1)


# `(image, height, width)` to pixels of that size, uint8 or float32.
RESAMPLE: dict[str, Callable[[np.ndarray, int, int], np.ndarray]] = {
  'bilinear': functools.partial(_pillow, Image.Resampling.BILINEAR),
  'bicubic': functools.partial(_pillow, Image.Resampling.BICUBIC),
  'tf_bilinear': _tf_bilinear,
  'tf_area': _tf_area,
}

# The longer side `(side, short, shortest)`, and where the crop starts.
ROUNDING: dict[
  str, tuple[Callable[[int, int, int], int], Callable[[int], int]]
] = {
  # torchvision.transforms: Resize cuts off, CenterCrop rounds half to even.
  'torchvision': (
    lambda side, short, shortest: int(short * side / shortest),
    lambda rest: round(rest / 2),
  ),
  # big_vision.pp.ops_image: the reverse.
  'big_vision': (
    lambda side, short, shortest: round(side * (short / shortest)),
    lambda rest: rest // 2,
  ),
}

_TORCHVISION = Preprocess(224 / 256, 'bilinear', 'torchvision', **_IMAGENET)
_BICUBIC = dataclasses.replace(_TORCHVISION, resample='bicubic')

PREPROCESS: dict[str, Preprocess] = {
  # vit_jax/input_pipeline.py: both sides to the model's size.
  'augreg': Preprocess(None, 'tf_bilinear', 'big_vision', **_HALF),
  # big_vision: resize_small(256)|central_crop(224)|value_range(-1, 1).
  'big_vision': Preprocess(224 / 256, 'tf_area', 'big_vision', **_HALF),
  # timm: crop_pct 0.9 of its ViTs (AugReg weights), 0.95 of its ResNets.
  'timm_vit': Preprocess(0.9, 'bicubic', 'torchvision', **_HALF),
  'timm_resnet': Preprocess(0.95, 'bicubic', 'torchvision', **_IMAGENET),
  # torchvision: 256 -> 224 of ResNet and VGG; 232 of the V2 weights.
  'torchvision': _TORCHVISION,
  'torchvision_v2': dataclasses.replace(_TORCHVISION, crop=224 / 232),
  # The evaluation transforms of their repositories.
  'deit': _BICUBIC,
  'dino': _BICUBIC,
  'dinov2': _BICUBIC,
  'mae': _BICUBIC,
  'mocov3': _TORCHVISION,
  'clip': Preprocess(1.0, 'bicubic', 'torchvision', **_CLIP),
  # ViTImageProcessor of Hugging Face's google/vit-*.
  'hf_vit': Preprocess(None, 'bilinear', 'torchvision', **_HALF),
}

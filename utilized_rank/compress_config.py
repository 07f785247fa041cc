"""The options of a run that concern its compression."""

from __future__ import annotations

import dataclasses

from utilized_rank import methods


@dataclasses.dataclass(frozen=True)
class CompressConfig:
  """What to shrink, and how far; the section `config.compress`.

  Attributes:
    select: ordered `(regex, bool)` rules over leaf paths: the kernels.
    fractions: shares of those kernels' parameters to keep, one model each;
      none to measure alone.
    energies: shares of energy to give the mean layer utilization at.
    energy: the one that the table of layers is at.
    centered: take the spectra about the mean.
    method: see `factorize`; 'loss' and 'fisher_rows' collect gradients too, of
      labels drawn from the model itself.
    compensate_mean: see `factorize`.
    allocation: 'uniform' (`uniform_ranks`), 'budget' (`budget_ranks`, in nats
      of loss where the method is 'loss'), or 'compress' (`ur.compress`, which
      tries ranks and both of 'output' and 'loss' on calibration images).
    heads: with 'compress', try narrower attention heads as well.
    batch_size: images per batch of calibration and evaluation.
    calibration_images: images to collect moments over, drawn at random with
      the run's seed; 0 for one pass over the split as it is.
    calibration_augment: augment the images that are drawn.
    memory_limit: bytes on one device while moments are collected, in as many
      passes over the calibration images as that takes; 0 for no limit.
    latency_batch_size: images per call when the speed is measured.
  """

  select: tuple[tuple[str, bool], ...]
  fractions: tuple[float, ...] = (0.5, 0.25)
  energies: tuple[float, ...] = (0.9, 0.95, 0.99, 0.999)
  energy: float = 0.99
  centered: bool = False
  method: str = 'loss'
  compensate_mean: bool = True
  allocation: str = 'budget'
  heads: bool = True
  batch_size: int = 64
  calibration_images: int = 0
  calibration_augment: bool = True
  memory_limit: int = 0
  latency_batch_size: int = 64

  def __post_init__(self):
    if any(not 0 < f < 1 for f in self.fractions):
      raise ValueError(
        f'config.compress.fractions={self.fractions}: shares in (0, 1)'
      )
    methods.check_method(self.method)
    if self.memory_limit < 0:
      raise ValueError(
        f'config.compress.memory_limit={self.memory_limit}: bytes, or 0'
      )
    if self.allocation not in ('uniform', 'budget', 'compress'):
      raise ValueError(
        f'config.compress.allocation={self.allocation!r}: '
        "'uniform', 'budget' or 'compress'"
      )
    if self.allocation == 'compress' and not (
      self.method == 'loss' and self.compensate_mean
    ):
      raise ValueError(
        "config.compress.allocation='compress' chooses the method itself, from "
        "moments of the loss: it takes method='loss' and compensate_mean=True, "
        f'got {self.method!r} and {self.compensate_mean}'
      )

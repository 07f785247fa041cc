"""A run's dense parameters made smaller, as its options say."""

from __future__ import annotations

from collections.abc import Callable, Iterable
import dataclasses
from typing import Any

from utilized_rank.compression.compress import compress
from utilized_rank.factorization import methods
from utilized_rank.factorization.factorize import factorize
from utilized_rank.moments.moments import Moments
from utilized_rank.ranks.budget import budget_ranks
from utilized_rank.ranks.uniform import uniform_ranks


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
    method: see `factorize`; 'loss', 'fisher_rows' and 'coupled' collect
      gradients too, of labels drawn from the model itself.
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


def shrink(
  fn: Callable[[Any, Any], Any],
  params: Any,
  moments: Moments,
  batches: Callable[[], Iterable[Any]],
  loss: Any,
  fraction: float,
  config: CompressConfig,
) -> tuple[Any, dict[str, int]]:
  """The dense tree with factors in it, and their ranks.

  Args:
    fn: `fn(params, batch) -> logits`.
    params: dense parameters.
    moments: of their kernels.
    batches: makes the calibration batches, for an allocation that tries ranks.
    loss: the one that the moments are of.
    fraction: share of the kernels' parameters to keep.
    config: the options.
  """
  if config.allocation == 'compress':
    small, report = compress(
      fn,
      params,
      batches(),
      moments=moments,
      params_fraction=fraction,
      loss=loss,
      heads=config.heads,
    )
    assert report.recipe is not None
    return small, dict(report.recipe.ranks)
  ranks = _ranks(params, moments, fraction, config)
  small = factorize(
    params,
    moments,
    ranks,
    method=config.method,
    compensate_mean=config.compensate_mean,
  )
  return small, ranks


def _ranks(
  params: Any, moments: Moments, fraction: float, config: CompressConfig
) -> dict[str, int]:
  if config.allocation == 'uniform':
    return uniform_ranks(params, moments, params_fraction=fraction)
  # The paper's form has no ranks of its own under a budget.
  method = config.method
  return budget_ranks(
    params,
    moments,
    params_fraction=fraction,
    method='output' if method == methods.UTILIZED else method,
    compensate_mean=config.compensate_mean,
  )

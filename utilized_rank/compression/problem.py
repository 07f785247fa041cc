"""What `compress` is asked to solve, in one value."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

import numpy as np

from utilized_rank.factorization.kernels import scarce
from utilized_rank.losses.divergence import Divergence
from utilized_rank.moments import masks
from utilized_rank.moments.gradients import LossFn
from utilized_rank.moments.masks import Mask
from utilized_rank.moments.masks import Masked
from utilized_rank.moments.moments import Moments
from utilized_rank.ranks.budget import one_fraction
from utilized_rank.ranks.trials import divergences


@dataclasses.dataclass(frozen=True)
class Budget:
  """What may be kept, and in which form; see `compress`.

  Raises:
    ValueError: not one fraction, or no share in (0, 1].

  >>> Budget(flops_fraction=0.5).fraction
  0.5
  """

  params_fraction: float | None = None
  flops_fraction: float | None = None
  multiple_of: int = 1
  gauge: str | None = None

  def __post_init__(self):
    one_fraction(self.params_fraction, self.flops_fraction)

  @property
  def fraction(self) -> float:
    """The share, whatever it is of."""
    return one_fraction(self.params_fraction, self.flops_fraction)

  def options(self) -> dict[str, Any]:
    """Keywords of `tune_ranks`."""
    return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Problem:
  """A function, the kernels to compress in it, and the data to judge by.

  Attributes:
    fn: `fn(params, batch) -> outputs`.
    params: dense parameters, whose outputs are to be stayed near to.
    start: the same, but kernels without moments may be compressed already.
    moments: of the kernels to compress.
    batches: the examples that are kept, to try ranks on and to anchor with.
    budget: what may be kept of the kernels that have moments.
    divergence: `divergence(dense outputs, outputs, batch) -> (B,)`.
    loss: what the gradients are of, if it is known.
    anchored: whether factors may be fitted anew behind compressed kernels.
    progress: whether to show progress bars.
    compensate_mean: as for `factorize`.
    mask: which examples or tokens of a batch are real; None if all are. It is
      set by `without_padding`, which hides the others as well.
    to_beat: mean divergence of the pairs that `loss` predicts to be best, as
      far as it is known: a kind that begins further off need not be searched.
  """

  fn: Callable[[Any, Any], Any]
  params: Any
  start: Any
  moments: Moments
  batches: list[Any]
  budget: Budget
  divergence: Divergence
  loss: LossFn | None
  anchored: bool
  progress: bool
  compensate_mean: bool = True
  mask: Mask | None = None
  to_beat: float | None = None

  @property
  def is_scarce(self) -> bool:
    """Whether a kernel has fewer than four rows for every feature."""
    return bool(scarce(self.moments, self.moments))

  def divergences(self, tree: Any, batches: Sequence[Any]) -> np.ndarray:
    """Of every example, (B,): how far a tree is from the dense parameters.

    Args:
      tree: for `low_rank(fn)`.
      batches: the examples.
    """
    return divergences(self.fn, self.params, tree, batches, self.divergence)

  def without_padding(self, mask: Mask | str) -> Problem:
    """The same, with zeros in place of what outputs say of padding.

    Its batches are pairs of a batch and its mask. Factors are not fitted anew:
    `anchor` knows no masks.

    Args:
      mask: as for `collect`.
    """
    masked = Masked(mask, 1)
    return dataclasses.replace(
      self,
      fn=masks.hidden(self.fn),
      batches=[masked(batch, i) for i, batch in enumerate(self.batches)],
      divergence=masks.of_batch(self.divergence),
      loss=None if self.loss is None else masks.of_batch(self.loss),
      mask=masks.mask_of,
      anchored=False,
    )

  def on_part(self, moments: Moments, batches: list[Any]) -> Problem:
    """The same on a part of the examples, in silence.

    Args:
      moments: of the part.
      batches: the part.
    """
    return dataclasses.replace(
      self, moments=moments, batches=batches, progress=False
    )

  def left(
    self, start: Any, moments: Moments, params_fraction: float
  ) -> Problem:
    """What is left to do where some kernels are compressed already.

    Args:
      start: dense parameters, but for those kernels.
      moments: of the other kernels.
      params_fraction: share of their parameters that may be kept.
    """
    budget = dataclasses.replace(self.budget, params_fraction=params_fraction)
    return dataclasses.replace(
      self, start=start, moments=moments, budget=budget
    )

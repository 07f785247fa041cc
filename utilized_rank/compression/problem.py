"""What `compress` is asked to solve, in one value."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import functools
from itertools import count
from typing import Any

import numpy as np

from utilized_rank.attention.find_attention import find_attention
from utilized_rank.attention.heads import Attention
from utilized_rank.compression import independence
from utilized_rank.compression.journal import Journal
from utilized_rank.hidden.find_hidden import find_hidden
from utilized_rank.hidden.layers import Hidden
from utilized_rank.losses.divergence import Divergence
from utilized_rank.moments import masks
from utilized_rank.moments.gradients import LossFn
from utilized_rank.moments.masks import Mask
from utilized_rank.moments.masks import Masked
from utilized_rank.moments.moments import Moments
from utilized_rank.ranks.budget import one_fraction
from utilized_rank.ranks.offers import Terms
from utilized_rank.ranks.trials import divergences
from utilized_rank.walk.interpret import UnsupportedError

# As many are kept to try ranks on, unless `compress` is told otherwise.
TRIAL_EXAMPLES = 1024


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

  def terms(self, moments: Moments, compensate_mean: bool) -> Terms:
    """What pairs of the kernels cost.

    Args:
      moments: of the kernels.
      compensate_mean: as for `factorize`.
    """
    return Terms(
      moments,
      metric='relative',
      gauge=self.gauge,
      by_flops=self.flops_fraction is not None,
      latency=None,
      compensate_mean=compensate_mean,
      multiple_of=self.multiple_of,
      limits={},
    )

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
    training: those that the chosen tree is trained on, more where there are.
    budget: what may be kept of the kernels that have moments.
    divergence: `divergence(dense outputs, outputs, batch) -> (B,)`.
    unit: of the divergence; '' if it is not known.
    few: whether data are few, if that is known.
    loss: what the gradients are of, if it is known.
    anchored: whether factors may be fitted anew behind compressed kernels.
    progress: whether to show progress bars.
    journal: where what is done is written down.
    compensate_mean: as for `factorize`.
    mask: which examples or tokens of a batch are real; None if all are. It is
      set by `without_padding`, which hides the others as well.
  """

  fn: Callable[[Any, Any], Any]
  params: Any
  start: Any
  moments: Moments
  batches: list[Any]
  training: list[Any]
  budget: Budget
  divergence: Divergence
  loss: LossFn | None
  anchored: bool
  progress: bool
  unit: str = ''
  few: bool | None = None
  journal: Journal = dataclasses.field(default_factory=Journal)
  compensate_mean: bool = True
  mask: Mask | None = None

  @functools.cached_property
  def is_scarce(self) -> bool:
    """Whether a kernel has under four independent rows for a feature."""
    if self.few is not None:
      return self.few
    return independence.few(self.fn, self.params, self.moments, self.batches)

  def divergences(self, tree: Any, batches: Sequence[Any]) -> np.ndarray:
    """Of every example, (B,): how far a tree is from the dense parameters.

    Args:
      tree: for `low_rank(fn)`.
      batches: the examples.
    """
    return divergences(self.fn, self.params, tree, batches, self.divergence)

  @functools.cached_property
  def attention(self) -> Attention:
    """Pairs of attention's kernels; none where the function hides them."""
    try:
      return find_attention(self.fn, self.params, self.batches[0])
    except UnsupportedError:
      return Attention({}, {})

  @functools.cached_property
  def hidden(self) -> Hidden:
    """Hidden layers of whose kernels there are moments."""
    found = find_hidden(self.fn, self.params, self.batches[0])
    return found.only(
      name
      for name, layer in found.items()
      if all(kernel.path in self.moments for kernel in layer.kernels)
    )

  def glance(self, tree: Any) -> float:
    """Mean divergence on the first quarter of the batches.

    Args:
      tree: for `low_rank(fn)`.
    """
    few = self.batches[: -(-len(self.batches) // 4)]
    return float(self.divergences(tree, few).mean())

  def without_padding(self, mask: Mask | str) -> Problem:
    """The same, with zeros in place of what outputs say of padding.

    Its batches are pairs of a batch and its mask. Factors are not fitted anew:
    `anchor` knows no masks.

    Args:
      mask: as for `collect`.
    """
    masked = lambda batches: list(map(Masked(mask, 1), batches, count()))
    return dataclasses.replace(
      self,
      fn=masks.hidden(self.fn),
      batches=masked(self.batches),
      training=masked(self.training),
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
      self,
      moments=moments,
      batches=batches,
      progress=False,
      journal=Journal(),
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

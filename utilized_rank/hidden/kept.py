"""Which units of a layer stay at each width, by its moments."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
import dataclasses
import functools
from typing import Any

import numpy as np

from utilized_rank.factorization import methods
from utilized_rank.factorization.kernels import Kernel
from utilized_rank.factorization.kernels import kernels
from utilized_rank.hidden import order
from utilized_rank.hidden.layers import HiddenLayer
from utilized_rank.moments.moments import Moments

METHODS = ('output', 'loss')


@dataclasses.dataclass(frozen=True)
class Member:
  """One layer's units (of one step of a stack), with what is known of them.

  Arrays over features have those of a unit side by side.

  Attributes:
    second: C, (d, d), about the mean if the layer's kernel has a bias to give
      it to.
    mean: (d,), what C is about.
    w: W2, (d, m).
    cost: A = W2 G W2^T, (d, d).
    judged: the same without damping.
    size: features of a unit.
    nats: what makes tr(A R) nats per example; 1 without gradients.
    places: (d,), where each feature is in the kernel's own order.
  """

  second: np.ndarray
  mean: np.ndarray
  w: np.ndarray
  cost: np.ndarray
  judged: np.ndarray
  size: int
  nats: float
  places: np.ndarray

  @functools.cached_property
  def units(self) -> np.ndarray:
    """All units, in the order in which they are kept."""
    return order.pivots(self.second, self.cost, self.size)

  def damages(self) -> np.ndarray:
    """(width + 1,): what each width costs."""
    return self.nats * order.damages(
      self.second, self.judged, self.units, self.size
    )

  def refit(self, width: int) -> order.Refit:
    """W2 in the kernel's own order, for so many units."""
    found = order.refit(
      self.second, self.mean, self.w, self.units[:width], self.size
    )
    w = np.empty_like(found.w)
    w[self.places] = found.w
    return found._replace(w=w)


def members(
  params: Any,
  moments: Moments,
  layers: Iterable[HiddenLayer],
  *,
  method: str,
  compensate_mean: bool,
  damping: float,
) -> Iterator[tuple[HiddenLayer, list[Member]]]:
  """Every layer with its members, in the order of the moments.

  Raises:
    ValueError: an unknown method, or moments that lack the kernel that reads
      the units, its inputs, or the gradients.
  """
  methods.check_method(method, METHODS)
  of = {layer.second.path: layer for layer in layers}
  for path, its in kernels(params, moments, only=of):
    bias = compensate_mean and moments[path].entry.bias is not None
    yield (
      of[path],
      [_member(of[path], k, method, bias, damping) for k in its],
    )


def _member(
  layer: HiddenLayer,
  kernel: Kernel,
  method: str,
  centered: bool,
  damping: float,
) -> Member:
  layout = layer.second.layout
  inputs = layout.inputs
  places = np.arange(len(kernel.w)).reshape(layout.input_shape)
  places = np.moveaxis(places, inputs.index(layer.second.atom), 0)
  size = len(kernel.w) // layer.width
  places = places.ravel()
  mean = kernel.mean if centered else np.zeros_like(kernel.mean)
  second = kernel.second - np.outer(mean, mean)
  w = kernel.w[places]
  cost, judged, nats = w @ w.T, None, 1.0
  if method == 'loss':
    gradient = kernel.gradient
    if gradient is None:
      raise methods.needs_gradients(kernel.path)
    judged = w @ gradient @ w.T
    m = len(gradient)
    cost = judged + damping * np.trace(gradient) / m * cost
    nats = kernel.rows_per_example / 2
  return Member(
    order.resolved(second[np.ix_(places, places)]),
    mean[places],
    w,
    cost,
    cost if judged is None else judged,
    size,
    nats,
    places,
  )

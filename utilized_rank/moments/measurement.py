"""What a collection sums over one batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
import dataclasses
from typing import Any

from utilized_rank.moments.capture import count
from utilized_rank.moments.capture import find_sites
from utilized_rank.moments.counting import Counting
from utilized_rank.moments.fisher import row_fisher_sums
from utilized_rank.moments.gradients import LossFn
from utilized_rank.moments.gradients import gradient_sums
from utilized_rank.moments.moments import Moments
from utilized_rank.moments.sides import INPUTS
from utilized_rank.moments.sides import Sides
from utilized_rank.moments.sites import Sites
from utilized_rank.tree import paths
from utilized_rank.tree.layout import Layout


@dataclasses.dataclass(frozen=True)
class Measurement:
  """What is summed; the attributes are arguments of `collect`, `sides` two.

  >>> what = Measurement(lambda params, x: x @ params['w'])
  >>> params, x = {'w': jnp.eye(2)}, jnp.ones((3, 2))
  >>> layouts = {p: site.layout for p, site in what.sites(params, x).items()}
  >>> int(what.sums(layouts)(params, (x, None))['w'].count)
  3
  """

  fn: Callable[[Any, Any], Any]
  loss: LossFn | None = None
  fisher_rows: bool = False
  coupled: bool = False
  select: paths.Rules | None = None
  on_opaque: str = 'error'
  sides: Sides = INPUTS

  def __post_init__(self):
    if self.fisher_rows and self.loss is None:
      raise ValueError(
        'fisher_rows=True squares gradients of a loss: give loss='
      )
    if self.coupled and self.loss is None:
      raise ValueError(
        'coupled=True weighs inputs by gradients of a loss: give loss='
      )
    if self.coupled and self.sides != INPUTS:
      raise ValueError(
        'coupled=True sums inputs as they are: not from_outputs=, sketch='
      )

  def key(self) -> tuple[Any, ...]:
    """What tells it from others of the same function and loss."""
    rules = self.select, self.sides.from_outputs, self.sides.sketch
    return self.fisher_rows, self.coupled, self.on_opaque, repr(rules)

  def only(self, members: Iterable[str]) -> Measurement:
    """The same for some kernels."""
    return dataclasses.replace(self, select=paths.only(members))

  def sites(self, params: Any, batch: Any) -> Sites:
    """The kernels.

    Raises:
      ValueError: there is none.
    """
    sites = find_sites(
      self.fn,
      params,
      batch,
      select=self.select,
      on_opaque=self.on_opaque,
      from_outputs=self.sides.from_outputs,
      sketch=self.sides.sketch,
    )
    if not sites:
      raise ValueError(
        'the function has no kernel: no parameter leaf meets a matrix product '
        f'or a convolution\n{sites}'
      )
    return sites

  def sums(
    self,
    layouts: dict[str, Layout],
    over: tuple[Any, tuple[str, ...]] | None = None,
  ) -> Callable[[Any, Any], Moments]:
    """`sums(params, (batch, mask)) -> Moments`, with a loss its gradient's.

    Args:
      layouts: of the kernels that are selected.
      over: as in `Counting`.
    """

    def sums(params, batch):
      batch, mask = batch
      counting = Counting(mask, over)
      rules = self.select, self.on_opaque, self.sides
      moments = count(self.fn, counting, params, batch, *rules)
      if self.loss is None:
        return moments
      gradients = gradient_sums(
        self.fn, self.loss, layouts, counting, self.coupled
      )
      grads, examples, coupled = gradients(params, batch)
      rows = None
      if self.fisher_rows:
        fisher = row_fisher_sums(self.fn, self.loss, layouts, counting)
        found = fisher(params, batch)
        rows = tuple(found[path] for path in moments)
      return Moments(
        moments.table,
        moments.sums,
        tuple(grads[path] for path in moments),
        examples,
        rows,
        moments.coverage,
        coupled and tuple(coupled[path] for path in moments),
      )

    return sums

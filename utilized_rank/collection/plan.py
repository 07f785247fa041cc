"""What a collection will cost, before it runs: from shapes alone."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from utilized_rank.collection import accumulation
from utilized_rank.host.columns import aligned
from utilized_rank.host.units import of_bytes
from utilized_rank.linalg import gram
from utilized_rank.linalg import sketch as sketches
from utilized_rank.moments.gradients import LossFn
from utilized_rank.moments.gradients import gradient_sums
from utilized_rank.moments.measurement import Measurement
from utilized_rank.moments.sides import Columns
from utilized_rank.moments.sides import Sides
from utilized_rank.moments.sites import Site
from utilized_rank.moments.sites import Sites
from utilized_rank.tree import paths
from utilized_rank.walk import cost
from utilized_rank.walk import tracing

# What stands behind an input's number where not all of S is summed.
_MEASURED = {'input': '', 'output': ' T', 'sketch': ' sketch'}


@dataclasses.dataclass(frozen=True)
class SitePlan:
  """What one kernel's moments cost.

  Attributes:
    site: the kernel.
    sums_bytes: of its input's sums; 0 where an earlier kernel has paid.
    grad_bytes: of its gradients' sums.
    flops: of its Gram matrices for one batch, upper triangles; that of its
      input is 0 where shared.
    least_flops: the same with half of the products, n d (d + 1); a sketch has
      no half.
    number: in which pass it is collected, from 0.
  """

  site: Site
  sums_bytes: int
  grad_bytes: int
  flops: int
  least_flops: int
  number: int


@dataclasses.dataclass(frozen=True)
class Plan:
  """Cost of a collection on one device; `print` it for a table.

  Attributes:
    kernels: by path.
    forward_flops: of the function's products for one batch.
    backward_flops: of those that gradients take; 0 without a loss.
    arguments_bytes: parameters and one batch.
    forward_bytes: peak of the plain function, its arguments with it, as XLA
      compiled it.
    pass_bytes: predicted peak of every pass over the batches.
    memory_limit: what the passes were made to fit, or None.
  """

  kernels: dict[str, SitePlan]
  forward_flops: int
  backward_flops: int
  arguments_bytes: int
  forward_bytes: int
  pass_bytes: tuple[int, ...]
  memory_limit: int | None

  @property
  def sums_bytes(self) -> int:
    return sum(k.sums_bytes + k.grad_bytes for k in self.kernels.values())

  @property
  def gram_flops(self) -> int:
    return sum(k.flops for k in self.kernels.values())

  @property
  def floor(self) -> float:
    """(all FLOPs, Gram matrices by half of their products) / forward FLOPs."""
    least = sum(k.least_flops for k in self.kernels.values())
    return self._over_forward(least)

  def _over_forward(self, of_grams: int) -> float:
    added = self.backward_flops + of_grams
    return 1 + added / max(self.forward_flops, 1)

  @property
  def peak_bytes(self) -> int:
    return max(self.pass_bytes)

  @property
  def passes(self) -> tuple[tuple[str, ...], ...]:
    """Paths of the kernels that each pass over the batches collects."""
    return members_of(self.kernels, len(self.pass_bytes))

  def __str__(self) -> str:
    rows = [('kernel', 'groups', 'matrix', 'input', 'sums', 'FLOPs', 'pass')]
    for path, k in self.kernels.items():
      shape = k.site.layout.group_shape
      rows.append(
        (
          path,
          '×'.join(map(str, shape)),
          '×'.join(map(str, k.site.matrix_shape)),
          f'#{k.site.index}{_MEASURED[k.site.side]}',
          of_bytes(k.sums_bytes + k.grad_bytes) if k.sums_bytes else 'shared',
          f'{k.flops:.2e}' if k.flops else '',
          str(k.number + 1),
        )
      )
    lines = aligned([(*row, '') for row in rows])
    limit = (
      'no limit'
      if self.memory_limit is None
      else f'limit {of_bytes(self.memory_limit)}'
    )
    lines += [
      f'sums {of_bytes(self.sums_bytes)}; plain function '
      f'{of_bytes(self.forward_bytes)}; predicted peak '
      f'{of_bytes(self.peak_bytes)} in {len(self.pass_bytes)} '
      f'pass{"es" if len(self.pass_bytes) > 1 else ""} ({limit})',
      f'forward {self.forward_flops:.2e} FLOPs per batch, backward '
      f'{self.backward_flops:.2e}, Gram matrices {self.gram_flops:.2e}: '
      f'{self._over_forward(self.gram_flops):.2f} x the forward pass (no less '
      f'than {self.floor:.2f} x)',
    ]
    return '\n'.join(lines)


def plan(
  fn: Callable[[Any, Any], Any],
  params: Any,
  batch: Any,
  *,
  loss: LossFn | None = None,
  fisher_rows: bool = False,
  coupled: bool = False,
  mask: Any = None,
  select: paths.Rules | None = None,
  on_opaque: str = 'error',
  from_outputs: paths.Rules | None = None,
  sketch: Columns | None = None,
  memory_limit: int | None = None,
  accumulate: str = 'float32',
) -> Plan:
  """Says what `collect` will cost, without running anything.

  Memory is what XLA reports for the compiled step (arguments, outputs and
  temporaries), so a plan takes the time of two or three compilations.

  Args:
    fn: `fn(params, batch) -> outputs`.
    params: its parameters, or their `ShapeDtypeStruct`s.
    batch: one batch, or its shapes; with several devices, one device's share.
    loss: as in `collect`.
    fisher_rows: as in `collect`.
    coupled: as in `collect`.
    mask: the batch's mask, or its shape; None without.
    select: as in `collect`.
    on_opaque: as in `collect`.
    from_outputs: as in `collect`.
    sketch: as in `collect`.
    memory_limit: bytes on one device; the kernels are split into as many
      passes over the batches as fit it.
    accumulate: as in `collect`; 'compensated' sums take twice the memory.

  Returns:
    A `Plan`.

  Raises:
    ValueError: the function alone, or with one kernel's sums, exceeds the
      limit; it has no kernel.

  >>> fn = lambda params, x: x @ params['w']
  >>> costs = plan(fn, {'w': jnp.zeros((4, 3))}, jnp.zeros((5, 4)))
  >>> costs.sums_bytes, costs.forward_flops, costs.passes
  (84, 120, (('w',),))
  """
  accumulation.check(accumulate)
  sides = Sides(from_outputs, sketch)
  what = Measurement(fn, loss, fisher_rows, coupled, select, on_opaque, sides)
  sites = what.sites(params, batch)
  peak = functools.partial(
    _step_bytes, what, params, (batch, mask), sites, accumulate
  )
  with_sums = loss is not None, fisher_rows, coupled
  kernels, pass_bytes = passes_within(sites, *with_sums, peak, memory_limit)
  plain = _plain_bytes(fn, params, batch)
  forward = cost.forward_flops(fn, params, batch)
  backward = 0
  if loss is not None:
    layouts = {path: site.layout for path, site in sites.items()}
    every = cost.forward_flops(gradient_sums(fn, loss, layouts), params, batch)
    backward = every - forward - sum(map(_gradient_flops, sites.values()))
  return Plan(
    kernels,
    forward,
    backward,
    _size((params, batch)),
    plain,
    pass_bytes,
    memory_limit,
  )


def passes_within(
  sites: Sites,
  with_loss: bool,
  with_fisher: bool,
  with_coupled: bool,
  peak: Callable[[list[str]], int],
  memory_limit: int | None,
) -> tuple[dict[str, SitePlan], tuple[int, ...]]:
  """Splits the kernels into as few passes as fit a limit.

  Args:
    sites: the kernels.
    with_loss: whether gradients' sums are taken.
    with_fisher: whether squared gradients of rows are.
    with_coupled: whether those of inputs and gradients together are.
    peak: bytes on one device of the step that sums some kernels, by path.
    memory_limit: bytes on one device; None for one pass of any size.

  Returns:
    Every kernel with its costs and its pass, and the peak of every pass.

  Raises:
    ValueError: the limit is too low for some kernel.
  """
  costs = _site_costs(sites, with_loss, with_fisher, with_coupled)
  inputs: dict[int, list[str]] = {}
  for path, site in sites.items():
    inputs.setdefault(site.index, []).append(path)
  weight = {
    i: sum(costs[p][0] + costs[p][1] for p in members)
    for i, members in inputs.items()
  }
  whole = peak(list(sites))
  number = dict.fromkeys(sites, 0)
  pass_bytes = [whole]
  if memory_limit is not None and whole > memory_limit:
    smallest = min(weight, key=weight.__getitem__)
    alone = peak(inputs[smallest])
    others = sum(weight.values()) - weight[smallest]
    # Bytes of the step for each byte of sums: the sums themselves, and what
    # of a batch's own exists at once.
    rate = max((whole - alone) / max(others, 1), 1.0)
    base = alone - rate * weight[smallest]
    room = (memory_limit - base) / rate
    largest = max(weight, key=weight.__getitem__)
    if weight[largest] > room:
      raise ValueError(
        f'{inputs[largest]} need {of_bytes(base + rate * weight[largest])}: '
        f'{of_bytes(base)} for the function on one batch and '
        f'{of_bytes(rate * weight[largest])} for sums of {weight[largest]} '
        f'bytes; memory_limit is {of_bytes(memory_limit)}. Take smaller '
        'batches, measure wide inputs from_outputs or by a sketch, or leave '
        'kernels out with select'
      )
    loads = _packed(weight, room, inputs, number)
    pass_bytes = [int(base + rate * load) for load in loads]
  kernels = {
    path: SitePlan(site, *costs[path], number[path])
    for path, site in sites.items()
  }
  return kernels, tuple(pass_bytes)


def members_of(
  kernels: dict[str, SitePlan], passes: int
) -> tuple[tuple[str, ...], ...]:
  """Paths of the kernels that each pass collects."""
  return tuple(
    tuple(p for p, k in kernels.items() if k.number == i) for i in range(passes)
  )


def _site_costs(
  sites: Sites, with_loss: bool, with_fisher: bool, with_coupled: bool
) -> dict[str, tuple[int, int, int, int]]:
  """Bytes of sums, of gradient sums, FLOPs and least FLOPs of each kernel."""
  costs: dict[str, tuple[int, int, int, int]] = {}
  paid: set[int] = set()
  for path, site in sites.items():
    d, m = site.matrix_shape
    groups = site.layout.num_groups
    wide = m if site.side == 'output' else d
    kept = gram.panel_entries(wide)
    flop = gram.panel_flops(site.rows, wide)
    least = site.rows * wide * (wide + 1)
    if site.columns:
      kept = d * (site.columns + 1)
      flop = least = sketches.flops(site.rows, d, site.columns)
    grads, own = gram.panel_entries(m), kept + d
    first = site.index not in paid
    paid.add(site.index)
    costs[path] = (
      first * groups * 4 * (kept + d + 1),
      groups
      * 4
      * (with_loss * grads + with_fisher * d + with_coupled * (grads + own)),
      first * groups * flop
      + (with_loss + with_coupled) * _gradient_flops(site)
      + with_coupled * groups * flop,
      groups
      * (
        (first + with_coupled) * least
        + (with_loss + with_coupled) * site.rows * m * (m + 1)
      ),
    )
  return costs


def _gradient_flops(site: Site) -> int:
  """Of the Gram matrices of the gradients at a kernel's outputs."""
  m = site.matrix_shape[1]
  return site.layout.num_groups * gram.panel_flops(site.rows, m)


def _packed(weight, room, inputs, number) -> list[int]:
  """First fit, in the order of computation: fills `number`; bytes by pass."""
  loads: list[int] = []
  for index, members in inputs.items():
    fits = [i for i, load in enumerate(loads) if load + weight[index] <= room]
    at = fits[0] if fits else len(loads)
    if not fits:
      loads.append(0)
    loads[at] += weight[index]
    number.update(dict.fromkeys(members, at))
  return loads


def _step_bytes(what, params, batch, sites, accumulate, members) -> int:
  """Peak of the program that adds a batch to the sums of some kernels."""
  sums = what.only(members).sums({p: sites[p].layout for p in members})
  on_arrays, arrays = _on_arrays(sums, params, batch)
  state = jax.eval_shape(on_arrays, *arrays)
  low = state if accumulate == 'compensated' else None

  def step(state, low, *arrays):
    return accumulation.add(state, low, on_arrays(*arrays))

  compiled = jax.jit(step, donate_argnums=(0, 1), keep_unused=True).lower(
    state, low, *arrays
  )
  return cost.peak_bytes(compiled.compile())


def _plain_bytes(fn, params, batch) -> int:
  on_arrays, arrays = _on_arrays(fn, params, batch)
  compiled = jax.jit(on_arrays, keep_unused=True).lower(*arrays).compile()
  return cost.peak_bytes(compiled)


def _on_arrays(fn: Any, *args: Any):
  """`fn` of the arguments' arrays alone, and the arrays' shapes."""
  arrays, join = tracing.split(args)
  shapes = [jax.ShapeDtypeStruct(jnp.shape(v), v.dtype) for v in arrays]
  return lambda *arrays: fn(*join(arrays)), shapes


def _size(tree: Any) -> int:
  return sum(
    v.size * v.dtype.itemsize
    for v in jax.tree.leaves(tree)
    if tracing.is_array(v)
  )

"""Running sums of a collection: on the devices, and on the host."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import functools
import math
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np

from utilized_rank.collection import accumulation
from utilized_rank.collection.devices import Devices
from utilized_rank.collection.devices import Measure
from utilized_rank.collection.snapshots import Snapshots
from utilized_rank.host.kept import Kept
from utilized_rank.linalg import gram
from utilized_rank.linalg.overflow import not_finite
from utilized_rank.linalg.sketch import Sketch
from utilized_rank.moments.moments import Moments
from utilized_rank.moments.sites import Site
from utilized_rank.walk import compat
from utilized_rank.walk import cost

# Rows that the devices may count before the host takes the sums over: int32
# ends at twice this.
_MOST_ROWS = 2**30
# Sums, and what they have rounded off (None for plain sums).
State = tuple[Moments, Moments | None]
M = TypeVar('M', bound=Callable[..., Any])


def _in_place(method: M) -> M:
  """A method of `RunningSums` that runs where its sums are."""

  @functools.wraps(method)
  def run(self, *args, **kwargs):
    with self.spread.within():
      return method(self, *args, **kwargs)

  return cast(M, run)


class RunningSums:
  """Each device's sums so far, and what the host took over from them."""

  def __init__(
    self,
    measure: Measure,
    spread: Devices,
    accumulate: str = 'float32',
    everywhere: bool = False,
    made: Kept | None = None,
  ):
    """`everywhere`: the result is that of all processes; `made`: makes the
    measure again, of functions for which its steps are kept."""
    self.spread = spread
    self._measure, self._made = measure, made
    self._accumulate = accumulate
    self._everywhere = everywhere
    self.state: State | None = None
    self.host: Moments | None = None
    self._pending: tuple[int, Any, Any] | None = None
    self._steps: dict[bool, Any] = {}

  def step(self, whole: bool = False) -> Any:
    """The program that adds a batch to the running sums."""
    if whole not in self._steps:
      run = lambda measure: self.spread.run(measure, _add, whole)
      self._steps[whole] = (
        run(self._measure)
        if self._made is None
        else self._made.into(whole, run)
      )
    return self._steps[whole]

  @_in_place
  def zeros(self, batch: Any) -> State:
    return self.spread.zeros(self._shapes(batch))

  def _shapes(self, batch: Any) -> Any:
    shapes = self.spread.shapes(self._measure, batch)
    is_kept = self._accumulate == 'compensated'
    return shapes, shapes if is_kept else None

  @_in_place
  def step_bytes(self, batch: Any) -> int:
    """What one device holds while the step adds a batch like this."""
    part, whole = self.spread.split(batch)[0]
    args = self.spread.states(self._shapes(part)), self.spread.params, part
    compiled = self.step(whole).lower(*args).compile()
    # Parameters that some kernels' sums do not need are no arguments, and stay.
    held = sum(map(_bytes_on_device, jax.tree.leaves(args)))
    used = cost.arguments_bytes(compiled)
    return cost.peak_bytes(compiled) + max(held - used, 0)

  @_in_place
  def add(self, batch: Any, number: int) -> None:
    for part, whole in self.spread.split(batch):
      if self.state is None:
        self.state = self.zeros(part)
      step = self.step(whole)
      self.state, finite, most = step(self.state, self.spread.params, part)
      # Looked at one batch later, so that the devices are never idle.
      self.look()
      self._pending = number, finite, most
      if self._accumulate == 'float64':
        self.look()
        self._flush()

  @compat.moves_data
  def look(self) -> None:
    """Sees to what the last batch left.

    Raises:
      FloatingPointError: NaN or infinity.
    """
    if self._pending is None:
      return
    number, finite, most = self._pending
    self._pending = None
    finite = np.asarray(finite).all(0)
    if not finite.all():
      assert self.state is not None
      raise FloatingPointError(
        f'{_not_finite(self.state[0], finite)} (batch {number})'
      )
    if np.asarray(most).max() > _MOST_ROWS:
      self._flush()

  @compat.moves_data
  def _flush(self) -> None:
    """Moves the sums to the host, in float64 and int64."""
    assert self.state is not None
    for sums in self.state:
      if sums is not None:
        new = self.spread.wide(sums)
        self.host = (
          new if self.host is None else jax.tree.map(np.add, self.host, new)
        )
    self.state = jax.tree.map(jnp.zeros_like, self.state)

  @_in_place
  @compat.moves_data
  def result(self) -> Moments:
    """The sums of all devices as host arrays."""
    self.look()
    assert self.state is not None
    if self.state[1] is not None:
      self._flush()
    return self.spread.total(self.state[0], self.host, self._everywhere)

  # --- interruption ---

  @_in_place
  def save(self, snapshots: Snapshots, done: int, place: Any) -> None:
    self.look()
    assert self.state is not None
    sums = {'state': self.state[0], 'low': self.state[1], 'host': self.host}
    snapshots.save(
      {name: s for name, s in sums.items() if s is not None}, done, place
    )

  @_in_place
  def restore(
    self,
    snapshots: Snapshots,
    sites: Mapping[str, Site],
    with_loss: bool,
    with_fisher: bool = False,
  ) -> tuple[int, Any]:
    """Takes up a snapshot: how many batches it has, and where they end.

    Raises:
      ValueError: it is of another collection than that of these kernels.
    """
    found = snapshots.latest()
    if found is None:
      return 0, None
    sums, done, place = found
    state, low = sums['state'], sums.get('low')
    have = {e.path: e.measured for e in state.table}
    want = {s.path: s.measured for s in sites.values()}
    parts = len(state.sums[0].count)
    if (
      have != want
      or (state.grads is not None) != with_loss
      or (state.row_grads is not None) != with_fisher
      or (low is not None) != (self._accumulate == 'compensated')
      or parts != self.spread.parts
    ):
      raise ValueError(
        f'{snapshots.folder!r} holds the sums of another collection '
        f'({len(have)} kernels, {parts} devices); this one has {len(want)} '
        f'kernels on {self.spread.parts} devices, with '
        f'accumulate={self._accumulate!r}'
      )
    self.state = self.spread.put((state, low))
    self.host = sums.get('host')
    return done, place


def _not_finite(state: Moments, finite: Any) -> str:
  """What is not finite, of what `_add` looked at."""
  bad = int(np.argmin(finite))
  inputs = len(state.sums)
  wrong = 'is NaN or infinite, or its squares overflow float32'
  if bad >= inputs:
    path = state.table[bad - inputs].path
    return f"the loss's gradient at the output of {path!r} {wrong}"
  users = [e for e in state.table if e.index == bad]
  if users[0].side == 'output':
    return f'the input or output of {[e.path for e in users]} {wrong}'
  wrong = not_finite(0.0 if finite[bad - inputs] else np.nan)
  return f'the input of {[e.path for e in users]} {wrong}'


def _bytes_on_device(array: Any) -> int:
  return math.prod(array.sharding.shard_shape(array.shape)) * (
    array.dtype.itemsize
  )


def _add(state: State, new: Moments):
  """state + new, whether the squares of each input and of each gradient of
  `new` are finite, then each input's plain sum, and the most rows."""
  trace = lambda second: jnp.sum(
    second.diagonal if isinstance(second, Sketch) else gram.trace(second)
  )
  finite = jnp.stack(
    [jnp.isfinite(jnp.sum(s.total) + trace(s.panels)) for s in new.sums]
    + [jnp.isfinite(trace(g)) for g in new.grads or ()]
    + [jnp.isfinite(s.total).all() for s in new.sums]
  )
  state = accumulation.add(*state, new)
  most = jnp.stack([jnp.max(s.count) for s in state[0].sums]).max()
  return state, finite, most

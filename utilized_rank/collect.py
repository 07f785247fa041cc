"""Streams batches through a function and sums what its kernels read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence, Sized
import itertools
import os
from typing import Any
import warnings

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from utilized_rank import paths
from utilized_rank import processes
from utilized_rank import tracing
from utilized_rank.capture import count
from utilized_rank.capture import find_sites
from utilized_rank.gradients import LossFn
from utilized_rank.gradients import gradient_sums
from utilized_rank.masks import Mask
from utilized_rank.masks import Masked
from utilized_rank.moments import Moments
from utilized_rank.progress import track
from utilized_rank.rows import Counting
from utilized_rank.snapshots import Preempted
from utilized_rank.snapshots import Snapshots
from utilized_rank.snapshots import go_to
from utilized_rank.snapshots import place_of
from utilized_rank.spread import Devices
from utilized_rank.spread import Pmapped
from utilized_rank.spread import Sharded

# Rows that the devices may count before the host takes the sums over: int32
# ends at twice this.
_MOST_ROWS = 2**30


def collect(
  fn: Callable[[Any, Any], Any],
  params: Any,
  batches: Iterable[Any],
  *,
  loss: LossFn | None = None,
  mask: Mask | str | None = None,
  select: paths.Rules | None = None,
  on_opaque: str = 'error',
  mesh: Mesh | None = None,
  batch_axes: Sequence[str] | None = None,
  pmap_axis: str | None = None,
  checkpoint_dir: str | os.PathLike[str] | None = None,
  checkpoint_every: int = 100,
  progress: bool = True,
) -> Moments:
  """Collects the moments of every kernel's input over a stream of batches.

  Data-parallel over the devices of all processes: each keeps running sums of
  its share of every batch, and they are added once, at the end. Examples that
  do not divide evenly among the devices go to the first one. Every process
  feeds batches of its own, as many as it has, and returns the moments of all.

  Args:
    fn: `fn(params, batch) -> outputs`; a forward function that treats examples
      independently.
    params: its parameters.
    batches: batches, each a pytree whose arrays lead with the batch axis.
    loss: `loss(outputs, batch) -> (B,)`, nats per example; adds the moments
      of its gradient at every kernel's output, which `method='loss'` needs.
      `sampled_cross_entropy()` needs no labels.
    mask: which examples, (B,), or tokens, (B, T), are real and not padding:
      a function of the batch, or the batch's key for it. What is padding is
      left out of every sum and count, of the gradients' too, exactly. Tokens
      are followed from axis 1 of the batch's arrays to the products' rows; a
      row per example counts if its token, or any token, is real. With a mask
      an uneven batch is filled up, so that one compiled step serves all.
    select: ordered `(regex, bool)` rules over leaf paths; default all kernels.
    on_opaque: 'error', or 'report' to pass over parameters that enter a
      primitive which hides its computation, with a warning that names them.
    mesh: devices to use, all axes flattened; default every device. Parameters
      that are spread over this mesh stay as they are (fully sharded, tensor
      parallel), and `fn` runs on whole arrays, as under `jax.jit`.
    batch_axes: for such parameters, the mesh axes over which batches are
      spread; default the mesh's first.
    pmap_axis: for code that is built on `jax.pmap`: the name of its axis.
      Parameters and batches then lead with an axis of this process's devices.
    checkpoint_dir: where to keep the running sums, and the state of the
      iterator if it has one (`get_state` and `set_state`, as grain's, or
      `state_dict` and `load_state_dict`). If it holds some, the iterator is
      set to it, or else the batches that the sums cover are skipped, and the
      result equals that of an uninterrupted run; removed when done.
    checkpoint_every: batches between two checkpoints.
    progress: show a progress bar.

  Returns:
    `Moments` as host arrays.

  Raises:
    ValueError: no batches; a batch that is empty or whose arrays disagree in
      their leading axis; parameters that do not fit the function; a checkpoint
      of another collection; a mask where a kernel's input mixes examples, or
      where its rows could not be followed to tokens.
    FloatingPointError: an activation is NaN or infinite; names the kernel and
      the batch.
    Preempted: with `checkpoint_dir`, when the scheduler takes the machines
      away (SIGTERM, if `jax.distributed` is initialized); all is saved.

  >>> fn = lambda params, x: x @ params['w']
  >>> batches = [jnp.ones((4, 2)), jnp.zeros((4, 2))]
  >>> moments = collect(fn, {'w': jnp.eye(2)}, batches, progress=False)
  >>> int(moments['w'].count), moments['w'].mean.tolist()
  (8, [0.5, 0.5])

  Padding does not count:

  >>> batches = [{'x': np.ones((4, 2)), 'real': np.array([1, 1, 1, 0])}]
  >>> fn = lambda params, batch: batch['x'] @ params['w']
  >>> params = {'w': jnp.eye(2)}
  >>> moments = collect(fn, params, batches, mask='real', progress=False)
  >>> int(moments['w'].count)
  3
  """
  total = len(batches) if isinstance(batches, Sized) else None
  everywhere = jax.process_count() > 1 and (mesh is None or _crosses(mesh))
  stream = iter(batches)
  first = next(stream, None)
  _agree_on_first(first is not None, everywhere)
  check_batch(first, 0)
  leaves, treedef = jax.tree.flatten(params)
  arrays = {i: v for i, v in enumerate(leaves) if tracing.is_array(v)}

  def tree_of(values):
    # Flags and functions among the leaves stay what they are.
    moving = dict(zip(arrays, values, strict=True))
    return jax.tree.unflatten(
      treedef, [moving.get(i, v) for i, v in enumerate(leaves)]
    )

  spread = _spread(list(arrays.values()), mesh, batch_axes, pmap_axis)
  joint = everywhere and spread.over is not None
  if joint and checkpoint_dir is not None:
    raise ValueError(
      'checkpoint_dir cannot be used with parameters that are spread over '
      'processes: collect without it, or with parameters on every process'
    )
  sites = spread.sites(
    lambda params, batch: find_sites(
      fn, tree_of(params), batch, select=select, on_opaque=on_opaque
    ),
    first,
  )
  if sites.holes:
    warnings.warn(
      f'the moments leave out {sorted(sites.holes)}, which enter primitives '
      'that hide what they compute',
      stacklevel=2,
    )
  if not sites:
    raise ValueError(
      'the function has no kernel: no parameter leaf meets a matrix product '
      f'or a convolution\n{sites}'
    )
  measure = _measure(fn, sites, select, on_opaque, loss, spread.over)
  run = _Run(
    lambda params, batch: measure(tree_of(params), batch), spread, everywhere
  )
  masked = Masked(mask, spread.shares, 0 if pmap_axis is None else 1)
  snapshots = None if checkpoint_dir is None else Snapshots(checkpoint_dir)
  done, place = 0, None
  if snapshots is not None:
    done, place = run.restore(snapshots, sites, loss is not None)
  if place is not None:
    go_to(stream, place)
  else:
    batches = itertools.chain([first], stream)
    for _ in itertools.islice(batches, done):
      pass
  bar: Iterable[Any] = stream if place is not None else batches
  if joint:
    bar = processes.in_step(bar, lambda batch: check_batch(batch, done))
  if progress:
    bar = track(bar, total=total, desc='collect', unit='batch', initial=done)
  for batch in bar:
    check_batch(batch, done)
    run.add(masked(batch, done), done)
    done += 1
    if snapshots is None:
      continue
    is_leaving = processes.is_leaving(done)
    if is_leaving or done % checkpoint_every == 0:
      run.save(snapshots, done, place_of(stream))
    if is_leaving:
      raise Preempted(
        f'the job is being preempted: the sums of {done} batches are in '
        f'{snapshots.folder!r}; collect again with this checkpoint_dir to go on'
      )
  if snapshots is not None and everywhere:
    # Others may take long to come here, or be killed.
    run.save(snapshots, done, place_of(stream))
  moments = run.result()
  if snapshots is not None:
    snapshots.remove()
  return moments


def _spread(params, mesh, batch_axes, pmap_axis) -> Devices:
  """Where a collection's steps run."""
  everyone = jax.devices() if mesh is None else list(mesh.devices.flat)
  mine = [d for d in everyone if d.process_index == jax.process_index()]
  if pmap_axis is not None:
    return Pmapped(params, mine, pmap_axis)
  if mesh is not None:
    is_spread = any(
      isinstance(v, jax.Array)
      and v.sharding.device_set == set(everyone)
      and not v.is_fully_replicated
      for v in params
    )
    if is_spread or batch_axes is not None:
      return Sharded(params, mesh, batch_axes or mesh.axis_names[:1])
  elif batch_axes is not None:
    raise ValueError('batch_axes are axes of a mesh; pass mesh= as well')
  return Devices(params, mine)


def _crosses(mesh: Mesh) -> bool:
  """Whether a mesh has devices of several processes."""
  return len({d.process_index for d in mesh.devices.flat}) > 1


def _agree_on_first(has_one: bool, everywhere: bool) -> None:
  told = [[has_one]]
  if everywhere:
    # All know, so that none waits for one that has stopped.
    told = processes.exchange([has_one]).tolist()
  without = [i for i, (has,) in enumerate(told) if not has]
  if without:
    who = f' in processes {without}' if everywhere else ''
    raise ValueError(f'collect needs at least one batch, got none{who}')


def _measure(fn, sites, select, on_opaque, loss, over):
  """`measure(params, (batch, mask)) -> Moments`, with a loss its gradient's."""
  layouts = {path: site.layout for path, site in sites.items()}

  def measure(params, batch):
    batch, mask = batch
    counting = Counting(mask, over)
    moments = count(fn, counting, params, batch, select, on_opaque)
    if loss is None:
      return moments
    gradients = gradient_sums(fn, loss, layouts, counting)
    grads, examples = gradients(params, batch)
    grads = tuple(grads[path] for path in moments)
    return Moments(moments.table, moments.sums, grads, examples)

  return measure


def check_batch(batch: Any, number: int) -> int:
  """The number of examples in a batch.

  Raises:
    ValueError: it has none, or its arrays disagree.
  """
  named, _ = paths.flatten(batch)
  sizes = {p: np.shape(v)[:1] for p, v in named.items()}
  if not sizes or any(s == () for s in sizes.values()):
    raise ValueError(
      f'batch {number} must be a pytree of arrays that lead with the batch '
      f'axis, got {sizes or batch!r}'
    )
  if len(set(sizes.values())) > 1:
    raise ValueError(
      f'the arrays of batch {number} disagree in their leading axis: '
      f'{ {p: s[0] for p, s in sizes.items()} }'
    )
  size = next(iter(sizes.values()))[0]
  if not size:
    raise ValueError(f'batch {number} is empty')
  return size


class _Run:
  """Running sums on the devices, and what overflowed them on the host."""

  def __init__(self, measure, spread, everywhere=False):
    self.spread = spread
    self._measure = measure
    self._everywhere = everywhere
    self.state: Moments | None = None
    self.host: Moments | None = None
    self._pending: tuple[int, Any, Any] | None = None
    self._steps: dict[bool, Any] = {}

  def step(self, whole: bool = False) -> Any:
    """The program that adds a batch to the running sums."""
    if whole not in self._steps:
      self._steps[whole] = self.spread.run(self._measure, _accumulate, whole)
    return self._steps[whole]

  def zeros(self, batch: Any) -> Moments:
    return self.spread.zeros(self.spread.shapes(self._measure, batch))

  def add(self, batch: Any, number: int) -> None:
    for part, whole in self.spread.split(batch):
      if self.state is None:
        self.state = self.zeros(part)
      step = self.step(whole)
      self.state, finite, most = step(self.state, self.spread.params, part)
      # Looked at one batch later, so that the devices are never idle.
      self.look()
      self._pending = number, finite, most

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
      bad = int(np.argmin(finite))
      assert self.state is not None
      table, inputs = self.state.table, len(self.state.sums)
      what, users = 'input', [e.path for e in table if e.index == bad]
      if bad >= inputs:
        what = "loss's gradient at the output"
        users = [table[bad - inputs].path]
      raise FloatingPointError(
        f'the {what} of {users} is NaN or infinite in batch {number}'
      )
    if np.asarray(most).max() > _MOST_ROWS:
      self._flush()

  def _flush(self) -> None:
    """Moves the sums to the host, in float64 and int64."""
    assert self.state is not None
    new = self.spread.wide(self.state)
    self.host = (
      new if self.host is None else jax.tree.map(np.add, self.host, new)
    )
    self.state = jax.tree.map(jnp.zeros_like, self.state)

  def result(self) -> Moments:
    self.look()
    return self.spread.total(self.state, self.host, self._everywhere)

  # --- interruption ---

  def save(self, snapshots: Snapshots, done: int, place: Any) -> None:
    self.look()
    assert self.state is not None
    snapshots.save(self.state, self.host, done, place)

  def restore(
    self, snapshots: Snapshots, sites: Any, with_loss: bool
  ) -> tuple[int, Any]:
    """Takes up a snapshot: how many batches it has, and where they end."""
    found = snapshots.latest()
    if found is None:
      return 0, None
    state, self.host, done, place = found
    have = {e.path: e.layout for e in state.table}
    want = {s.path: s.layout for s in sites.values()}
    parts = len(state.sums[0].count)
    if (
      have != want
      or (state.grads is not None) != with_loss
      or parts != self.spread.parts
    ):
      raise ValueError(
        f'{snapshots.folder!r} holds the sums of another collection '
        f'({len(have)} kernels, {parts} devices); this one has {len(want)} '
        f'kernels on {self.spread.parts} devices'
      )
    self.state = self.spread.put(state)
    return done, place


def _accumulate(state: Moments, new: Moments):
  """state + new, whether each input (then each gradient) of `new` is finite,
  and the most rows."""
  trace = lambda a: jnp.sum(jnp.diagonal(a, axis1=-2, axis2=-1))
  finite = jnp.stack(
    [jnp.isfinite(jnp.sum(s.total) + trace(s.second)) for s in new.sums]
    + [jnp.isfinite(trace(g)) for g in new.grads or ()]
  )
  state = jax.tree.map(jnp.add, state, new)
  most = jnp.stack([jnp.max(s.count) for s in state.sums]).max()
  return state, finite, most

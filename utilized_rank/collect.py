"""Streams batches through a function and sums what its kernels read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sized
import itertools
import os
import shutil
from typing import Any
import warnings

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

from utilized_rank import accumulation
from utilized_rank import checkpoint
from utilized_rank import passes
from utilized_rank import paths
from utilized_rank import tracing
from utilized_rank.capture import capture
from utilized_rank.capture import find_sites
from utilized_rank.fisher import row_fisher_sums
from utilized_rank.gradients import LossFn
from utilized_rank.gradients import gradient_sums
from utilized_rank.moments import Moments
from utilized_rank.plan import plan
from utilized_rank.plan import rules_for
from utilized_rank.progress import track

# Rows that the devices may count before the host takes the sums over: int32
# ends at twice this.
_MOST_ROWS = 2**30


def collect(
  fn: Callable[[Any, Any], Any],
  params: Any,
  batches: Iterable[Any],
  *,
  loss: LossFn | None = None,
  fisher_rows: bool = False,
  select: paths.Rules | None = None,
  on_opaque: str = 'error',
  from_outputs: paths.Rules | None = None,
  mesh: Mesh | None = None,
  checkpoint_dir: str | os.PathLike[str] | None = None,
  checkpoint_every: int = 100,
  accumulate: str = 'float32',
  memory_limit: int | None = None,
  progress: bool = True,
) -> Moments:
  """Collects the moments of every kernel's input over a stream of batches.

  Data-parallel over the devices: each keeps running sums of its share of every
  batch, and they are added once, at the end. Examples that do not divide
  evenly among the devices go to the first one.

  Args:
    fn: `fn(params, batch) -> outputs`; a forward function that treats examples
      independently.
    params: its parameters.
    batches: batches, each a pytree whose arrays lead with the batch axis.
    loss: `loss(outputs, batch) -> (B,)`, nats per example; adds the moments
      of its gradient at every kernel's output, which `method='loss'` needs.
      `sampled_cross_entropy()` needs no labels.
    fisher_rows: add the squared gradients of every kernel's rows, which
      `method='fisher_rows'` needs; one example at a time, so it takes about
      three more forward passes.
    select: ordered `(regex, bool)` rules over leaf paths; default all kernels.
    on_opaque: 'error', or 'report' to pass over parameters that enter a
      primitive which hides its computation, with a warning that names them.
    from_outputs: ordered `(regex, bool)` rules over leaf paths: kernels that
      are measured from the output side, by T (m, m) in place of S (d, d),
      for inputs much wider than outputs. 'output' factors need no more;
      what needs S (k_S, the other methods) raises an error.
    mesh: devices to use, all axes flattened; default every local device.
    checkpoint_dir: where to keep the running sums. If it holds some, the
      batches that they cover are skipped, and the result equals that of an
      uninterrupted run; removed when done.
    checkpoint_every: batches between two checkpoints.
    accumulate: how batches are added. 'float32'; 'compensated', float32 with
      what each addition rounds off kept beside it (twice the memory, no
      drift over millions of batches); 'float64', on the host, which every
      batch's sums are moved to. Within a batch sums are float32 always.
    memory_limit: bytes on one device. Where all sums do not fit, the batches
      are run through several times, as `plan(..., memory_limit=)` says, some
      kernels at a time; the sums are the same.
    progress: show a progress bar.

  Returns:
    `Moments` as host arrays; float64 unless sums are plain float32.

  Raises:
    ValueError: no batches; `fisher_rows` without a loss; a batch that is empty
      or whose arrays disagree in their leading axis; parameters that do not fit
      the function; a checkpoint of another collection; an unknown way to
      accumulate.
    ValueError: the batches are an iterator and have to be run through twice;
      the limit is too low for one kernel.
    FloatingPointError: an activation is NaN or infinite; names the kernel and
      the batch.

  >>> fn = lambda params, x: x @ params['w']
  >>> batches = [jnp.ones((4, 2)), jnp.zeros((4, 2))]
  >>> moments = collect(fn, {'w': jnp.eye(2)}, batches, progress=False)
  >>> int(moments['w'].count), moments['w'].mean.tolist()
  (8, [0.5, 0.5])
  """
  if fisher_rows and loss is None:
    raise ValueError('fisher_rows=True squares gradients of a loss: give loss=')
  accumulation.check(accumulate)
  devices = jax.local_devices() if mesh is None else list(mesh.devices.flat)
  total = len(batches) if isinstance(batches, Sized) else None
  whole, batches = batches, iter(batches)
  first = next(batches, None)
  if first is None:
    raise ValueError('collect needs at least one batch, got none')
  check_batch(first, 0)
  if memory_limit is not None:
    share = lambda a: jax.ShapeDtypeStruct(
      (-(-a.shape[0] // len(devices)), *a.shape[1:]), a.dtype
    )
    options: dict[str, Any] = dict(
      loss=loss,
      on_opaque=on_opaque,
      from_outputs=from_outputs,
      accumulate=accumulate,
    )
    costs = plan(
      fn,
      params,
      jax.tree.map(share, first),
      select=select,
      memory_limit=memory_limit,
      **options,
    )
    if len(costs.passes) > 1:
      passes.check_repeatable(whole, len(costs.passes))
      if checkpoint_dir is not None:
        raise ValueError(
          f'the sums fit memory_limit in {len(costs.passes)} passes, and '
          'checkpoint_dir resumes a single one: collect the kernels of each '
          'of plan(...).passes by itself, with select and a directory each'
        )
      options |= dict(mesh=mesh, progress=progress)
      parts = [
        collect(fn, params, whole, select=rules_for(members), **options)
        for members in costs.passes
      ]
      return passes.join(parts, costs.kernels)
  sites = find_sites(
    fn,
    params,
    first,
    select=select,
    on_opaque=on_opaque,
    from_outputs=from_outputs,
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
  captured = capture(
    fn, select=select, on_opaque=on_opaque, from_outputs=from_outputs
  )
  run = _Run(
    captured, fn, params, sites, devices, loss, accumulate, fisher_rows
  )
  done = 0
  if checkpoint_dir is not None and os.path.isdir(checkpoint_dir):
    done = run.restore(checkpoint_dir, sites)
  stream = itertools.chain([first], batches)
  for _ in itertools.islice(stream, done):
    pass
  bar: Iterable[Any] = stream
  if progress:
    bar = track(stream, total=total, desc='collect', unit='batch', initial=done)
  for i, batch in enumerate(bar, done):
    if i:
      check_batch(batch, i)
    run.add(batch, i)
    if checkpoint_dir is not None and (i + 1) % checkpoint_every == 0:
      run.save(checkpoint_dir, i + 1)
  moments = run.result()
  if checkpoint_dir is not None and os.path.isdir(checkpoint_dir):
    shutil.rmtree(checkpoint_dir)
  return moments


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

  def __init__(
    self,
    captured,
    fn,
    params,
    sites,
    devices,
    loss=None,
    accumulate='float32',
    fisher_rows=False,
  ):
    self._accumulate = accumulate
    self._devices = devices
    self._captured = captured
    self._gradients = self._row_fisher = None
    if loss is not None:
      layouts = {path: site.layout for path, site in sites.items()}
      self._gradients = gradient_sums(fn, loss, layouts)
      if fisher_rows:
        self._row_fisher = row_fisher_sums(fn, loss, layouts)
    self._mesh = Mesh(np.array(devices), ('examples',))
    replicated = NamedSharding(self._mesh, PartitionSpec())
    # Flags and functions among the leaves stay what they are.
    leaves, self._treedef = jax.tree.flatten(params)
    self._static = {
      i: v for i, v in enumerate(leaves) if not tracing.is_array(v)
    }
    self._params = jax.device_put(
      [v for v in leaves if tracing.is_array(v)], replicated
    )
    self._split = NamedSharding(self._mesh, PartitionSpec('examples'))
    self._state: Moments | None = None
    self._low: Moments | None = None
    self._host: Moments | None = None
    self._pending: tuple[int, Any, Any] | None = None
    self._step = jax.jit(self._add_shards, donate_argnums=(0, 3))
    self._step_rest = jax.jit(self._add_rest, donate_argnums=(0, 3))

  def _moments_of(self, arrays, batch):
    arrays = iter(arrays)
    params = jax.tree.unflatten(
      self._treedef,
      [
        self._static[i] if i in self._static else next(arrays)
        for i in range(self._treedef.num_leaves)
      ],
    )
    moments = self._captured(params, batch)[1]
    if self._gradients is None:
      return moments
    grads, examples = self._gradients(params, batch)
    grads = tuple(grads[path] for path in moments)
    rows = None
    if self._row_fisher is not None:
      fisher = self._row_fisher(params, batch)
      rows = tuple(fisher[path] for path in moments)
    return Moments(moments.table, moments.sums, grads, examples, rows)

  def _add_shards(self, state, params, batch, low=None):
    def local(params, batch):
      moments = self._moments_of(params, batch)
      return jax.tree.map(lambda a: a[None], moments)

    spec = PartitionSpec('examples')
    new = jax.shard_map(
      local,
      mesh=self._mesh,
      in_specs=(PartitionSpec(), spec),
      out_specs=spec,
      check_vma=False,
    )(params, batch)
    return _accumulate(state, low, new)

  def _add_rest(self, state, params, batch, low=None):
    """Adds a batch that all devices see to the first device's sums."""
    moments = self._moments_of(params, batch)
    pad = lambda a: (
      jnp.zeros((len(self._devices), *a.shape), a.dtype).at[0].set(a)
    )
    return _accumulate(state, low, jax.tree.map(pad, moments))

  def add(self, batch: Any, number: int) -> None:
    size = jax.tree.leaves(batch)[0].shape[0]
    even = size - size % len(self._devices)
    parts = []
    if even:
      parts.append((self._step, jax.tree.map(lambda a: a[:even], batch)))
    if even < size:
      parts.append((self._step_rest, jax.tree.map(lambda a: a[even:], batch)))
    for step, part in parts:
      if step is self._step:
        part = jax.device_put(part, self._split)
      if self._state is None:
        self._state = self._zeros(part)
      if self._low is None and self._accumulate == 'compensated':
        self._low = jax.tree.map(jnp.zeros_like, self._state)
      self._state, self._low, finite, most = step(
        self._state, self._params, part, self._low
      )
      # Looked at one batch later, so that the devices are never idle.
      self._look()
      self._pending = number, finite, most
      if self._accumulate == 'float64':
        self._look()
        self._flush()

  def _zeros(self, batch: Any) -> Moments:
    shapes = jax.eval_shape(
      lambda p, b: self._moments_of(p, b), self._params, batch
    )
    n = len(self._devices)
    return jax.tree.map(
      lambda s: jax.device_put(jnp.zeros((n, *s.shape), s.dtype), self._split),
      shapes,
    )

  def _look(self) -> None:
    if self._pending is None:
      return
    number, finite, most = self._pending
    self._pending = None
    finite = np.asarray(finite)
    if not finite.all():
      bad = int(np.argmin(finite))
      assert self._state is not None
      table, inputs = self._state.table, len(self._state.sums)
      what, users = 'input', [e.path for e in table if e.index == bad]
      if bad >= inputs:
        what = "loss's gradient at the output"
        users = [table[bad - inputs].path]
      raise FloatingPointError(
        f'the {what} of {users} is NaN or infinite in batch {number}'
      )
    if int(most) > _MOST_ROWS:
      self._flush()

  def _flush(self) -> None:
    """Moves the sums to the host, in float64 and int64."""
    assert self._state is not None
    new = accumulation.total(self._state, self._low)
    self._host = (
      new if self._host is None else jax.tree.map(np.add, self._host, new)
    )
    self._state = jax.tree.map(jnp.zeros_like, self._state)
    self._low = jax.tree.map(jnp.zeros_like, self._low)

  def result(self) -> Moments:
    self._look()
    if self._host is not None or self._low is not None:
      self._flush()
      assert self._host is not None
      return self._host
    if len(self._devices) == 1:  # no second copy of the sums
      return jax.tree.map(lambda a: np.asarray(a)[0], self._state)
    reduced = jax.jit(
      lambda state: jax.tree.map(lambda a: a.sum(0, dtype=a.dtype), state)
    )(self._state)
    return jax.tree.map(np.asarray, reduced)

  # --- interruption ---

  def save(self, folder, done: int) -> None:
    self._look()
    tree = {'state': jax.tree.map(np.asarray, self._state)}
    if self._low is not None:
      tree['low'] = jax.tree.map(np.asarray, self._low)
    if self._host is not None:
      tree['host'] = self._host
    checkpoint.save(folder, tree, metadata={'batches': done}, overwrite=True)

  def restore(self, folder, sites) -> int:
    tree = checkpoint.load(folder)
    state = tree.get('state') if isinstance(tree, dict) else None
    if not isinstance(state, Moments):
      raise ValueError(f'{folder!r} holds no running sums of a collection')
    have = {e.path: e.layout for e in state.table}
    want = {s.path: s.layout for s in sites.values()}
    low, host = tree.get('low'), tree.get('host')
    same_loss = (state.grads is None) == (self._gradients is None) and (
      (state.row_grads is None) == (self._row_fisher is None)
    )
    same_sums = (low is not None) == (self._accumulate == 'compensated')
    if (
      have != want
      or not same_loss
      or not same_sums
      or state.sums[0].count.shape[0] != len(self._devices)
    ):
      raise ValueError(
        f'{folder!r} holds the sums of another collection ({len(have)} '
        f'kernels, {state.sums[0].count.shape[0]} devices); this one has '
        f'{len(want)} kernels on {len(self._devices)} devices, with '
        f'accumulate={self._accumulate!r}'
      )
    self._state = jax.device_put(state, self._split)
    self._low = None if low is None else jax.device_put(low, self._split)
    self._host = host
    return checkpoint.load_metadata(folder)['batches']


def _accumulate(state: Moments, low: Moments | None, new: Moments):
  """(state, low) + new, whether each input (then each gradient) of `new` is
  finite, and the most rows."""
  trace = lambda a: jnp.sum(jnp.diagonal(a, axis1=-2, axis2=-1))
  finite = jnp.stack(
    [jnp.isfinite(jnp.sum(s.total) + trace(s.second)) for s in new.sums]
    + [jnp.isfinite(trace(g)) for g in new.grads or ()]
  )
  state, low = accumulation.add(state, low, new)
  most = jnp.stack([jnp.max(s.count) for s in state.sums]).max()
  return state, low, finite, most

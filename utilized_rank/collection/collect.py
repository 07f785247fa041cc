"""Streams batches through a function and sums what its kernels read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
import dataclasses
import os
from typing import Any
import zlib

from jax.sharding import Mesh

from utilized_rank.collection import accumulation
from utilized_rank.collection import passes
from utilized_rank.collection.one_pass import Feeding
from utilized_rank.collection.one_pass import started
from utilized_rank.collection.placement import placement
from utilized_rank.collection.plan import members_of
from utilized_rank.collection.plan import passes_within
from utilized_rank.collection.running_sums import RunningSums
from utilized_rank.host import processes
from utilized_rank.host.kept import Kept
from utilized_rank.host.progress import say
from utilized_rank.host.progress import wrapped
from utilized_rank.host.warning import warn
from utilized_rank.moments.gradients import LossFn
from utilized_rank.moments.masks import Mask
from utilized_rank.moments.masks import Masked
from utilized_rank.moments.masks import unused
from utilized_rank.moments.measurement import Measurement
from utilized_rank.moments.moments import Moments
from utilized_rank.moments.sides import Columns
from utilized_rank.moments.sides import Sides
from utilized_rank.tree import paths
from utilized_rank.walk import tracing
from utilized_rank.walk.tracing import Form

_JOINT = 'parameters that are spread over processes'


@tracing.remembered()
def collect(
  fn: Callable[[Any, Any], Any],
  params: Any,
  batches: Iterable[Any],
  *,
  loss: LossFn | None = None,
  fisher_rows: bool = False,
  coupled: bool = False,
  mask: Mask | str | None = None,
  select: paths.Rules | None = None,
  on_opaque: str = 'error',
  from_outputs: paths.Rules | None = None,
  sketch: Columns | None = None,
  mesh: Mesh | None = None,
  batch_axes: Sequence[str] | None = None,
  pmap_axis: str | None = None,
  checkpoint_dir: str | os.PathLike[str] | None = None,
  checkpoint_every: int = 100,
  accumulate: str = 'float32',
  memory_limit: int | None = None,
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
    fisher_rows: add the squared gradients of every kernel's rows, which
      `method='fisher_rows'` needs; one example at a time, so it takes about
      three more forward passes.
    coupled: add the second moments of inputs weighed by |g|^2, g the gradient
      at the same row of outputs, and of gradients weighed by |x|^2, which
      `method='coupled'` needs: as many products as all other sums together.
    mask: which examples, (B,), or tokens, (B, T), are real and not padding:
      a function of the batch, or the batch's key for it. What is padding is
      left out of every sum and count, of the gradients' too, exactly: the loss
      sees zeros in place of padded outputs. Tokens are followed from axis 1 of
      the batch's arrays to the products' rows and the outputs; a row per
      example counts if its token, or any token, is real. With a mask an uneven
      batch is filled up, so that one compiled step serves all. Where it is
      forgotten, and a batch holds what looks like one, there is a warning.
    select: ordered `(regex, bool)` rules over leaf paths; default all kernels.
    on_opaque: 'error', or 'report' to pass over parameters that enter a
      primitive which hides its computation, with a warning that names them.
    from_outputs: ordered `(regex, bool)` rules over leaf paths: kernels that
      are measured from the output side, by T (m, m) in place of S (d, d),
      for inputs much wider than outputs. 'output' factors need no more;
      what needs S (k_S, the other methods) raises an error.
    sketch: ordered `(regex, columns)` rules over leaf paths: kernels of which
      the product of S with so many random vectors is summed, in place of S
      (d, d), for inputs that are very wide; as in `capture`.
    mesh: devices to use, all axes flattened; default the mesh that parameters
      are spread over, else that of `jax.set_mesh`, else one that `fn` itself
      names, else every device. Parameters that are spread over this mesh stay
      as they are (fully sharded, tensor parallel). With them, under
      `jax.set_mesh`, and where `fn` names a mesh, `fn` runs on whole arrays
      and sees what it would under `jax.jit`; else it runs on a share of the
      batch and sees no mesh.
    batch_axes: where `fn` runs on whole arrays, the mesh axes over which
      batches are spread; default the mesh's first if parameters are spread,
      else all. On axes of `AxisType.Explicit` a batch that is on the mesh
      keeps its type, and without spread parameters others get none unless
      this is given: `fn` then sees them as `jax.jit` shows them, and devices
      repeat each other's work.
    pmap_axis: for code that is built on `jax.pmap`: the name of its axis.
      Parameters and batches then lead with an axis of this process's devices.
    checkpoint_dir: where to keep the running sums, and the state of the
      iterator if it has one (`get_state` and `set_state`, as grain's, or
      `state_dict` and `load_state_dict`). If it holds some, the iterator is
      set to it, or else the batches that the sums cover are skipped, and the
      result equals that of an uninterrupted run; removed when done. Of
      several passes (`memory_limit`) those that are done are kept as well.
    checkpoint_every: batches between two checkpoints.
    accumulate: how batches are added. 'float32'; 'compensated', float32 with
      what each addition rounds off kept beside it (twice the memory, no
      drift over millions of batches); 'float64', on the host, which every
      batch's sums are moved to. Within a batch sums are float32 always.
    memory_limit: bytes on one device, by XLA's account of the very step that
      runs there. Where all sums do not fit, the batches are run through several
      times, as `plan(..., memory_limit=)` says, some kernels at a time; the
      sums are the same.
    progress: show a progress bar, and which share of the parameters the
      kernels hold.

  Returns:
    `Moments` as host arrays; float64 unless sums are plain float32. A warning
    says so where kernels hold less than half of the parameters, unless `select`
    asked for some.

  Raises:
    ValueError: no batches; a batch that is empty or whose arrays disagree in
      their leading axis; parameters that are shapes alone, or do not fit the
      function; a checkpoint of another collection, or of other passes; a mask
      where a kernel's input mixes examples, or where its rows could not be
      followed to tokens.
    ValueError: `fisher_rows` or `coupled` without a loss; an unknown way to
      accumulate; two arguments that do not go together.
    ValueError: the batches are an iterator and have to be run through twice;
      the limit is too low for one kernel.
    FloatingPointError: an activation is NaN or infinite, or its squares are
      in float32; names the kernel and the batch.
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
  sides = Sides(from_outputs, sketch)
  what = Measurement(fn, loss, fisher_rows, coupled, select, on_opaque, sides)
  accumulation.check(accumulate)
  tracing.check_values(params)
  values, _ = tracing.split(params)
  place = placement(values, mesh, batch_axes, pmap_axis)
  everywhere = place.everywhere
  stream = started(batches, everywhere)
  place = place.named_by(fn, params, stream.first)
  joint = everywhere and place.whole
  _check_together(
    [
      ('batch_axes', batch_axes, 'pmap_axis', pmap_axis),
      ('checkpoint_dir', checkpoint_dir is not None, _JOINT, joint),
      (f'accumulate={accumulate!r}', accumulate != 'float32', _JOINT, joint),
      (
        'fisher_rows',
        fisher_rows,
        'parameters on a mesh of AxisType.Explicit (AxisType.Auto can)',
        place.is_typed,
      ),
    ]
  )
  form = Form(params)
  names = [
    p for p, v in paths.flatten(params)[0].items() if tracing.is_array(v)
  ]
  tree_of = lambda arrays: form.filled(dict(zip(names, arrays, strict=True)))
  spread = place.devices(values)
  with spread.within():
    sites = spread.sites(
      lambda params, batch: what.sites(tree_of(params), batch), stream.first
    )
  if sites.holes:
    warn(
      f'the moments leave out {sorted(sites.holes)}, which enter primitives '
      'that hide what they compute'
    )
  elif select is None and sites.coverage.is_low:
    # Who selects a part asked for it.
    warn(f'most is not measured: {sites.coverage}')
  if mask is None and pmap_axis is None:
    for path, share in unused(stream.first).items():
      warn(
        f'the first batch has {path!r}, which hides {share:.0%} of the tokens '
        'as padding, and they are measured like the others; give collect '
        'that array as mask=, or a mask of ones if they are to count'
      )
  if progress:
    say(wrapped(str(sites.coverage)))

  def sums_of(members):
    """The running sums of some kernels."""
    layouts = {path: sites[path].layout for path in members}
    # All of them are what the caller's own rules select.
    part = what if len(layouts) == len(sites) else what.only(layouts)
    over = spread.over

    def make(fn, loss=None):
      measure = dataclasses.replace(part, fn=fn, loss=loss).sums(layouts, over)
      return lambda params, batch: measure(tree_of(params), batch)

    made = Kept(
      [fn] if loss is None else [fn, loss],
      (form, *part.key(), tuple(layouts.items()), spread.key()),
      make,
    )
    measure = make(fn, loss)
    return RunningSums(measure, spread, accumulate, everywhere, made)

  masked = Masked(mask, spread.shares, 0 if pmap_axis is None else 1)
  with_sums = loss is not None, fisher_rows, coupled
  feeding = Feeding(
    batches, masked, everywhere, joint, *with_sums, checkpoint_every, progress
  )
  members: Sequence[Sequence[str]] = [list(sites)]
  if memory_limit is not None:
    example = masked(stream.first, 0)
    kernels, pass_bytes = passes_within(
      sites,
      *with_sums,
      lambda members: sums_of(members).step_bytes(example),
      memory_limit,
    )
    members = members_of(kernels, len(pass_bytes))
    if everywhere:
      _agree_on_passes(members)
  if len(members) == 1:
    moments = feeding.run(
      sums_of(sites), sites, stream, checkpoint_dir, 'collect'
    )
    return moments.covering(sites.coverage)
  passes.check_repeatable(batches, len(members))

  def collect_pass(number, folder):
    again = started(batches, everywhere) if number else stream
    some = {path: sites[path] for path in members[number]}
    said = f'collect {number + 1}/{len(members)}'
    return feeding.run(sums_of(some), some, again, folder, said)

  parts = passes.each(members, sites, collect_pass, checkpoint_dir, everywhere)
  return passes.join(parts, kernels).covering(sites.coverage)


def _check_together(pairs: Iterable[tuple[str, Any, str, Any]]) -> None:
  """Raises ValueError for two arguments that are both given."""
  for one, has_one, other, has_other in pairs:
    if has_one and has_other:
      raise ValueError(f'{one} cannot be used with {other}')


def _agree_on_passes(members: Sequence[Sequence[str]]) -> None:
  mine = zlib.crc32(repr(members).encode())
  if len(set(processes.exchange([mine])[:, 0].tolist())) > 1:
    raise ValueError(
      'memory_limit splits the kernels differently on the processes; give all '
      'of them one limit, and first batches of one size'
    )

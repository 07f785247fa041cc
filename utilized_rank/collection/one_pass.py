"""One pass over the batches: into running sums, with snapshots on the way."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sized
import dataclasses
import itertools
import os
from typing import Any

import jax
import numpy as np

from utilized_rank.collection.running_sums import RunningSums
from utilized_rank.collection.snapshots import Snapshots
from utilized_rank.collection.snapshots import go_to
from utilized_rank.collection.snapshots import place_of
from utilized_rank.host import processes
from utilized_rank.host.progress import track
from utilized_rank.host.stopping import Preempted
from utilized_rank.moments.masks import Masked
from utilized_rank.moments.moments import Moments
from utilized_rank.moments.sites import Site
from utilized_rank.tree import paths
from utilized_rank.walk import compat


@dataclasses.dataclass(frozen=True)
class Started:
  """A stream of batches of which one has been read.

  Attributes:
    first: that one.
    rest: the stream.
  """

  first: Any
  rest: Iterator[Any]


@dataclasses.dataclass(frozen=True)
class Feeding:
  """How batches are fed to sums, the same in every pass over them.

  Attributes:
    batches: an iterator can be gone through once.
    masked: gives a batch its mask.
    everywhere: the result is that of all processes.
    joint: they make every step together.
    with_loss: gradients' sums are taken.
    with_fisher: squared gradients of rows are.
    with_coupled: sums of inputs and gradients together are.
    checkpoint_every: batches between two snapshots.
    progress: show a progress bar.
  """

  batches: Iterable[Any]
  masked: Masked
  everywhere: bool
  joint: bool
  with_loss: bool
  with_fisher: bool
  with_coupled: bool
  checkpoint_every: int
  progress: bool

  def run(
    self,
    sums: RunningSums,
    sites: Mapping[str, Site],
    stream: Started,
    folder: str | os.PathLike[str] | None,
    what: str,
  ) -> Moments:
    """The moments of all batches.

    Args:
      sums: of no batch yet.
      sites: the kernels that they are of.
      stream: the batches.
      folder: where snapshots are, or None.
      what: what the progress bar says.

    Raises:
      ValueError: a batch is none; a snapshot of another collection.
      FloatingPointError: NaN or infinity.
      Preempted: the machines are taken away, or a signal asked; all is saved.
    """
    snapshots = None if folder is None else Snapshots(folder)
    done, place = 0, None
    if snapshots is not None:
      done, place = sums.restore(
        snapshots, sites, self.with_loss, self.with_fisher, self.with_coupled
      )
    if place is not None:
      go_to(stream.rest, place)
      left: Iterable[Any] = stream.rest
    else:
      left = itertools.chain([stream.first], stream.rest)
      for _ in itertools.islice(left, done):
        pass
    if self.joint:
      left = processes.in_step(left, lambda batch: check_batch(batch, done))
    if self.progress:
      total = len(self.batches) if isinstance(self.batches, Sized) else None
      left = track(left, total=total, desc=what, unit='batch', initial=done)
    for batch in left:
      check_batch(batch, done)
      sums.add(self.masked(batch, done), done)
      done += 1
      if snapshots is None:
        continue
      is_leaving = processes.is_leaving(done)
      if is_leaving or done % self.checkpoint_every == 0:
        sums.save(snapshots, done, place_of(stream.rest))
      if is_leaving:
        raise Preempted(
          f'the job is being preempted: the sums of {done} batches are in '
          f'{snapshots.folder!r}; collect again with the same checkpoint_dir'
        )
    if snapshots is not None and self.everywhere:
      # Others may take long to come here, or be killed.
      sums.save(snapshots, done, place_of(stream.rest))
    moments = sums.result()
    if snapshots is not None:
      snapshots.remove()
    return moments


def started(batches: Iterable[Any], everywhere: bool) -> Started:
  """Batches from their start, the first one read and checked.

  Raises:
    ValueError: there is none, on any process if all collect together.
  """
  stream = iter(several(batches))
  first = next(stream, None)
  told = [[first is not None]]
  if everywhere:
    # All know, so that none waits for one that has stopped.
    told = processes.exchange([first is not None]).tolist()
  without = [i for i, (has,) in enumerate(told) if not has]
  if without:
    who = f' in processes {without}' if everywhere else ''
    raise ValueError(f'collect needs at least one batch, got none{who}')
  check_batch(first, 0)
  return Started(first, stream)


def several(batches: Iterable[Any]) -> Iterable[Any]:
  """The batches, if they are not one batch.

  Raises:
    ValueError: they are an array, a dictionary or a string.
  """
  if hasattr(batches, 'shape') and hasattr(batches, 'dtype'):
    one = f'an array of shape {tuple(batches.shape)}'
  elif isinstance(batches, (Mapping, str, bytes)):
    one = f'a {type(batches).__name__}'
  else:
    return batches
  raise ValueError(
    f'batches is {one}, not several batches: pass a list of them, or [batch] '
    'for a single one'
  )


def check_batch(batch: Any, number: int) -> int:
  """The number of examples in a batch.

  Raises:
    ValueError: it has none, an entry is no array of numbers, or its arrays
      disagree.
  """
  named, _ = paths.flatten(batch)
  for path, entry in named.items():
    if wrong := _no_array(entry):
      where = f'at {path!r} ' if path else ''
      raise ValueError(
        f'batch {number} must be a pytree of arrays that lead with the batch '
        f'axis, and {where}there is {wrong}'
      )
  if not named:
    raise ValueError(
      f'batch {number} must be a pytree of arrays that lead with the batch '
      f'axis, and this {type(batch).__name__} holds none'
    )
  sizes = {p: np.shape(v)[:1] for p, v in named.items()}
  if len(set(sizes.values())) > 1:
    raise ValueError(
      f'the arrays of batch {number} disagree in their leading axis: '
      f'{ {p: s[0] for p, s in sizes.items()} }'
    )
  size = next(iter(sizes.values()))[0]
  if not size:
    raise ValueError(f'batch {number} is empty')
  return size


def _no_array(entry: Any) -> str:
  """What an entry of a batch is, if it is no array of numbers; '' if it is."""
  kind = type(entry).__name__
  if isinstance(entry, (str, bytes)):
    return f'a {kind}: make numbers of it, or leave it out'
  if isinstance(entry, (bool, int, float, complex)):
    return f'the {kind} {entry}: make one array of a list, as np.array does'
  is_array = isinstance(entry, (jax.Array, np.ndarray, np.generic))
  if not is_array and not hasattr(entry, '__jax_array__'):
    module = type(entry).__module__.partition('.')[0]
    return f'a {kind} of {module}: make a numpy array of it'
  if not np.shape(entry):
    return f'an array without axes, {entry.dtype}'
  if isinstance(entry, np.ndarray) and not compat.is_known(entry.dtype):
    return f'an array of {entry.dtype}, which JAX does not have'
  return ''

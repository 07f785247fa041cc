"""What the processes of one job tell each other, and the one reduction."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
import contextlib
import functools
import itertools
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

from utilized_rank.host import meshes
from utilized_rank.host import stopping

# A count travels as digits of this many bits, which float32 adds up exactly
# over 2**(24 - 11) devices: counts and sums are then reduced as one.
_BITS = 11
# Bytes that all processes together tell each other in one round; every device
# of every process holds them meanwhile.
_ROUND = 1 << 26
# What an error in one process is on the others; the last stands for the rest.
_ERRORS = FloatingPointError, ValueError, RuntimeError

R = TypeVar('R')


def exchange(numbers: Sequence[int]) -> np.ndarray:
  """Tells every process these numbers, (processes, len(numbers)) int64."""
  if jax.process_count() == 1:
    return np.asarray([numbers], np.int64)
  mask = (1 << 24) - 1  # int64 does not exist on the devices by default
  words = [[n & mask, n >> 24 & mask, n >> 48] for n in numbers]
  told = _tell(np.asarray(words, np.int32)).astype(np.int64)
  return told[..., 0] | told[..., 1] << 24 | told[..., 2] << 48


def together(work: Callable[[], R]) -> R:
  """What `work` returns here, once it has returned in every process.

  None waits for one that has failed, and all end alike: the error of the first
  process that failed is raised on all of them, with its number.

  Raises:
    FloatingPointError, ValueError: as `work` does in some process.
    RuntimeError: `work` raised something else.

  >>> together(lambda: 3)
  3
  """
  if jax.process_count() == 1:
    return work()
  error, result = None, []
  try:
    result.append(work())
  except Exception as raised:
    error = raised
  text, kind = b'', len(_ERRORS)
  if error is not None:
    is_known = [isinstance(error, known) for known in _ERRORS]
    kind = [*is_known, True].index(True)
    text = (str(error) if any(is_known) else repr(error)).encode()
  told = exchange([error is not None, kind, len(text)])
  failed = np.flatnonzero(told[:, 0])
  if not failed.size:
    return result[0]
  first, longest = int(failed[0]), int(told[:, 2].max())
  texts = _tell(np.frombuffer(text.ljust(longest), np.uint8))
  _, kind, size = told[first].tolist()
  said = texts[first, :size].tobytes().decode()
  raise (*_ERRORS, RuntimeError)[kind](
    f'in process {first} of {jax.process_count()}: {said}'
  ) from error


def gathered(
  messages: Iterable[bytes], senders: Sequence[int]
) -> Iterator[bytes]:
  """Yields every process's messages on every process, in one order.

  All processes take all messages, or none of them. They travel in rounds of a
  fixed number of bytes, whatever their own sizes, and as bytes: nothing is
  added up or rounded on the way.

  Args:
    messages: what this process sends, in the common order.
    senders: of all messages, in the common order, the process that sends it;
      the same everywhere.
  """
  if not senders:
    return
  index, count = jax.process_index(), jax.process_count()
  leaving = deque(messages)
  own = iter([len(message) for message in leaving])
  sizes = exchange([next(own) if s == index else 0 for s in senders]).sum(0)
  most = int(np.bincount(senders, sizes, count).max())
  rounds = -(-most // max(1, _ROUND // count))
  chunk = -(-most // max(1, rounds))  # all rounds are as large
  outgoing, arrived = bytearray(), [bytearray() for _ in range(count)]
  for sender, size in zip(senders, sizes.tolist(), strict=True):
    while len(arrived[sender]) < size:
      while leaving and len(outgoing) < chunk:
        outgoing += leaving.popleft()
      part = bytes(outgoing[:chunk]).ljust(chunk, b'\0')
      del outgoing[:chunk]
      told = _tell(np.frombuffer(part, np.uint8))
      for stream, piece in zip(arrived, told, strict=True):
        stream += piece.tobytes()
    yield bytes(arrived[sender][:size])
    del arrived[sender][:size]


def own_name() -> str:
  """This process's name for its files: its number, and of how many."""
  return f'process-{jax.process_index()}-of-{jax.process_count()}'


def is_leaving(step: int) -> bool:
  """Whether the job is being preempted, and all processes are at this step.

  JAX takes the scheduler's SIGTERM where `jax.distributed.initialize` was
  called, of one process too; elsewhere `stopping.on_signals` does.
  """
  if not jax.distributed.is_initialized():
    return stopping.asked()
  return _multihost().reached_preemption_sync_point(step)


def in_step(
  batches: Iterable[Any], size_of: Callable[[Any], int]
) -> Iterator[Any]:
  """Batches for steps that all processes make together.

  Raises:
    ValueError: on every process, if one has no batch or another size of it
      than the others; otherwise they would wait for each other for ever.
  """
  iterator = iter(batches)
  for number in itertools.count():
    batch = next(iterator, None)
    sizes = exchange([0 if batch is None else size_of(batch)])[:, 0].tolist()
    if len(set(sizes)) > 1:
      raise ValueError(
        f'the processes have {sizes} examples in batch {number}; parameters '
        'that are spread over processes need equal batches on all of them'
      )
    if batch is None:
      return
    yield batch


def reducer(mesh: Mesh, specs: Any, over: Sequence[str]) -> Any:
  """The program that adds up running sums over mesh axes.

  Args:
    mesh: the devices.
    specs: pytree of the sums' partition specs; their first axis is spread over
      `over`, one part on each device.
    over: mesh axes to add up over.

  Returns:
    A jitted function from a pytree of (parts, ...) to one of (...), integers
    as digits that `decoded` reads. XLA joins its reductions into one.
  """

  leaves, treedef = jax.tree.flatten(specs, is_leaf=_is_spec)
  return _reducer(mesh, treedef, tuple(leaves), tuple(over))


def _is_spec(value: Any) -> bool:
  return isinstance(value, PartitionSpec)


@functools.lru_cache(maxsize=64)
def _reducer(mesh: Mesh, treedef: Any, leaves: Any, over: Any) -> Any:
  """One for each mesh and structure: compiled once."""
  specs = jax.tree.unflatten(treedef, leaves)

  def local(state):
    state = jax.tree.map(lambda a: _encoded(a[0]), state)
    return jax.lax.psum(state, over)

  # Digits are one more axis, which is not spread.
  cut = lambda spec: PartitionSpec(*spec[1:])
  outs = jax.tree.unflatten(treedef, map(cut, leaves))
  return jax.jit(
    jax.shard_map(
      local, mesh=mesh, in_specs=(specs,), out_specs=outs, check_vma=False
    )
  )


def _encoded(array: jax.Array) -> jax.Array:
  if not jnp.issubdtype(array.dtype, jnp.integer):
    return array
  mask = (1 << _BITS) - 1
  bits = np.iinfo(array.dtype).bits
  digits = [array >> at & mask for at in range(0, bits, _BITS)]
  return jnp.stack(digits, -1).astype(jnp.float32)


def decoded(reduced: Any, like: Any) -> Any:
  """Host arrays of what a `reducer` returned for sums like `like`."""

  def one(array, was):
    array = whole(array)
    if not jnp.issubdtype(was.dtype, jnp.integer):
      return array
    weights = np.int64(1) << _BITS * np.arange(array.shape[-1], dtype=np.int64)
    number = (array.astype(np.int64) * weights).sum(-1)
    fits = number.max(initial=0) <= np.iinfo(was.dtype).max
    return number.astype(was.dtype) if fits else number

  return jax.tree.map(one, reduced, like)


def whole(array: jax.Array) -> np.ndarray:
  """A host copy, of an array that is spread over processes as well."""
  if array.is_fully_addressable or array.is_fully_replicated:
    return np.asarray(array)
  return np.asarray(_multihost().process_allgather(array, tiled=True))


def add_over_processes(state: Any, devices: Sequence[Any]) -> Any:
  """Adds up the sums of every device of every process, in one reduction.

  Args:
    state: pytree of this process's sums, (devices, ...): arrays with one part
      on each of its `devices`, or host arrays.
    devices: this process's devices that hold parts.

  Returns:
    The same pytree of (...) host arrays, equal on every process.
  """
  everyone = jax.devices()
  mesh = Mesh(np.array(everyone), ('examples',))
  spread = NamedSharding(mesh, PartitionSpec('examples'))
  mine = [d for d in everyone if d.process_index == jax.process_index()]

  def lift(array):
    parts = {}
    if isinstance(array, jax.Array):
      parts = {s.device: s.data for s in array.addressable_shards}
    else:
      parts = {
        d: jax.device_put(part[None], d)
        for d, part in zip(devices, array, strict=True)
      }
    zero = np.zeros((1, *array.shape[1:]), array.dtype)
    return jax.make_array_from_single_device_arrays(
      (len(everyone), *array.shape[1:]),
      spread,
      [parts[d] if d in parts else jax.device_put(zero, d) for d in mine],
    )

  specs = jax.tree.map(lambda _: PartitionSpec('examples'), state)
  # Sums that went through the host are in float64 and int64.
  is_wide = any(isinstance(a, np.ndarray) for a in jax.tree.leaves(state))
  wide = jax.enable_x64(True) if is_wide else contextlib.nullcontext()
  with wide, meshes.within(None):
    lifted = jax.tree.map(lift, state)
    reduced = reducer(mesh, specs, ('examples',))(lifted)
    return decoded(reduced, state)


def _tell(mine: np.ndarray) -> np.ndarray:
  """(processes, ...): an array of one shape and dtype from every process."""
  with meshes.within(None):
    return np.asarray(_multihost().process_allgather(mine))


def _multihost():
  from jax.experimental import multihost_utils  # `import jax` is without it

  return multihost_utils

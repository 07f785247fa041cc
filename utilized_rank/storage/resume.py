"""Checkpoints of an interrupted loop: any pytree, by step, verified."""

from __future__ import annotations

from collections.abc import Mapping
import os
import types
from typing import Any
import zlib

import jax
import numpy as np

from utilized_rank.host.extras import extra


class Checkpoints:
  """The two newest states of one loop under a directory.

  A state is stored as a flat dict from path to array, so that nodes of any
  type can be restored, and with a checksum per array, because orbax loads a
  file with a flipped bit without an error.

  Example:
    >>> import tempfile
    >>> with Checkpoints(tempfile.mkdtemp(), {'seed': 0}) as checkpoints:
    ...   checkpoints.save(3, {'w': np.ones(2)})
    ...   checkpoints.restore({'w': np.zeros(2)})
    (3, {'w': array([1., 1.])})

  Args:
    directory: made when it is not there.
    identity: JSON values that a state to be restored must have been saved
      with, such as the configuration.
  """

  def __init__(
    self, directory: str | os.PathLike[str], identity: Mapping[str, Any]
  ):
    # Imported here: whoever trains without a directory needs no orbax.
    with extra('save'):
      from orbax.checkpoint import v1 as ocp

    self._directory = os.path.abspath(directory)
    self._identity = dict(identity)
    self._manager = ocp.training.Checkpointer(
      self._directory,
      preservation_policy=ocp.training.preservation_policies.LatestN(2),
      cleanup_tmp_directories=True,
    )

  def __enter__(self) -> Checkpoints:
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    traceback: types.TracebackType | None,
  ) -> None:
    self._manager.close()

  def save(self, step: int, state: Any) -> None:
    """Copies `state` to the host and writes it in the background."""
    # A copy: on CPU np.asarray is a view, and the buffers get donated.
    arrays = {k: np.array(v) for k, v in _flatten(state).items()}
    metadata = {
      'identity': self._identity,
      'leaves': {k: [*_kind(v), _crc32(v)] for k, v in arrays.items()},
    }
    self._manager.save_async(step, arrays, custom_metadata=metadata, force=True)

  def restore(self, template: Any) -> tuple[int, Any] | None:
    """Returns the newest step and its state, or None when there is none.

    Args:
      template: a state of the same structure, shapes and types.

    Raises:
      ValueError: the state was saved under another identity, does not fit
        the template, or is damaged.
    """
    # A save that is still under way is listed already.
    self._manager.wait()
    latest = self._manager.latest
    if latest is None:
      return None
    step = latest.step
    where = f'the checkpoint of step {step} in {self._directory}'
    try:
      metadata = self._manager.metadata(step).custom_metadata
      identity, saved = metadata['identity'], metadata['leaves']
    except Exception as error:
      raise ValueError(_damaged(where, error)) from error
    self._check_identity(where, identity)
    target = {
      k: np.zeros(v.shape, v.dtype) for k, v in _flatten(template).items()
    }
    _check_kinds(where, target, saved)
    try:
      arrays = self._manager.load(step, target)
    except Exception as error:
      raise ValueError(_damaged(where, error)) from error
    for key, value in arrays.items():
      if _crc32(np.asarray(value)) != saved[key][-1]:
        raise ValueError(_damaged(where, f'wrong checksum of {key}'))
    leaves = [arrays[key] for key in target]
    return step, jax.tree.unflatten(jax.tree.structure(template), leaves)

  def _check_identity(self, where: str, saved: Mapping[str, Any]) -> None:
    for key in sorted({*saved, *self._identity}):
      was, now = saved.get(key), self._identity.get(key)
      if was != now:
        raise ValueError(
          f'{where} was saved with {key}={was!r}; this run has {key}={now!r}. '
          'Use another directory, or the same options.'
        )


def _check_kinds(
  where: str, target: Mapping[str, np.ndarray], saved: Mapping[str, Any]
) -> None:
  if set(target) != set(saved):
    differ = sorted(set(target) ^ set(saved))
    raise ValueError(
      f'{where} holds another tree: {differ[0]} and {len(differ) - 1} more '
      'paths are only in one of the two. Use another directory.'
    )
  for key, value in target.items():
    was, now = saved[key][:2], _kind(value)
    if was != now:
      raise ValueError(
        f'{where} holds {key} as {was[0]}{was[1]}; this run has it as '
        f'{now[0]}{now[1]}. Use another directory.'
      )


def _damaged(where: str, reason: Any) -> str:
  text = str(reason).strip().split('\n')[0][:200]
  return (
    f'{where} is damaged ({text}); delete that step to go on from the one '
    'before it.'
  )


def _flatten(state: Any) -> dict[str, Any]:
  leaves, _ = jax.tree_util.tree_flatten_with_path(state)
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): leaf
    for path, leaf in leaves
  }


def _kind(array: np.ndarray) -> list[Any]:
  return [str(array.dtype), list(array.shape)]


def _crc32(array: np.ndarray) -> int:
  return zlib.crc32(np.ascontiguousarray(array).tobytes())

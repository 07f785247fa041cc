"""What may be done to a dense network before it is cut, by training it.

Each takes a task, the share that it will be cut to, and how a tree is trained,
and returns dense parameters whose cut may be nearer.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
from typing import Any

import numpy as np

from benchmarks.shared import tasks
import utilized_rank as ur
from utilized_rank.tree import paths

# Trains a tree in a part of its own of the run, which has the given name.
Tune = Callable[[Any, str], Any]
# Cuts before the last one, and how often singular values are lowered.
ROUNDS = 2
LOWERED = 5
# Of the root mean square of a kernel's singular values, all times together.
LOWERED_BY = 0.5


@dataclasses.dataclass(frozen=True)
class Preparation:
  """How, in how many rounds, and the share of all updates that these get."""

  prepare: Callable[[tasks.Task, float, Tune], Any]
  rounds: int
  share: float

  def updates(self, steps: int) -> tuple[int, int]:
    """Of a round, and of what is trained after the cut."""
    each = int(self.share * steps / self.rounds)
    return each, steps - self.rounds * each


def in_rounds(task: tasks.Task, fraction: float, tune: Tune) -> Any:
  """Cut by the same factor and trained, again and again, as pairs alone."""
  params = task.params
  for i in range(1, ROUNDS + 1):
    small, _ = ur.compress(
      task.fn,
      params,
      task.calibration(),
      params_fraction=fraction ** (i / (ROUNDS + 1)),
      loss=ur.sampled_cross_entropy(),
      select=task.select,
      # The next round is of the dense tree again.
      heads=False,
      layers=False,
      compensate_mean=False,
    )
    params = ur.merge(tune(small, f'round{i}'))
  return params


def with_low_spectra(task: tasks.Task, fraction: float, tune: Tune) -> Any:
  """Trained with the nuclear norm of what kernels give on the data as penalty.

  Its proximal step, singular values lowered by a constant, after every part.
  """
  del fraction
  params = task.params
  for i in range(LOWERED):
    moments = ur.collect(
      task.fn, params, task.calibration(), select=task.select, progress=False
    )
    params = lowered(params, moments, LOWERED_BY / LOWERED)
    params = tune(params, f'lowered{i}')
  return params


def lowered(params: Any, moments: ur.Moments, share: float) -> Any:
  """Kernels with lower singular values of S^(1/2) W.

  Args:
    params: dense parameters.
    moments: of the kernels.
    share: of the values' root mean square, by which each is lowered, to 0 at
      the least.

  >>> fn = lambda params, x: x @ params['w']
  >>> params = {'w': np.diag([3.0, 1.0]).astype(np.float32)}
  >>> x = np.eye(2, dtype=np.float32)
  >>> moments = ur.collect(fn, params, [x], progress=False)
  >>> lowered(params, moments, 1 / 5**0.5)['w'].round(4).tolist()
  [[2.0, 0.0], [0.0, 0.0]]
  """
  named, treedef = paths.flatten(params)
  for path in moments:
    layout, moment = moments[path].layout, moments[path]
    d, m = layout.matrix_shape
    kernels = np.asarray(layout.to_matrices(np.asarray(named[path])))
    second = np.asarray(moment.second, np.float64).reshape(-1, d, d)
    values, vectors = np.linalg.eigh(second)
    roots = np.sqrt(np.maximum(values, 0))
    # What inputs never have is left as it is.
    inverse = np.where(roots > 1e-6 * roots.max(-1, keepdims=True), roots, 0)
    inverse[inverse > 0] = 1 / inverse[inverse > 0]
    turned = np.swapaxes(vectors, -1, -2) @ kernels.reshape(-1, d, m)
    u, s, vt = np.linalg.svd(roots[..., None] * turned, full_matrices=False)
    less = share * np.sqrt(np.mean(s**2, axis=-1, keepdims=True))
    fall = (u * np.minimum(s, less)[..., None, :]) @ vt
    fall = vectors @ (inverse[..., None] * fall)
    leaf = layout.from_matrices(kernels - fall.reshape(kernels.shape))
    named[path] = leaf.astype(np.asarray(named[path]).dtype)
  return paths.unflatten(treedef, named)


PREPARATIONS = {
  'gradual': Preparation(in_rounds, ROUNDS, ROUNDS / (ROUNDS + 1)),
  'low_spectra': Preparation(with_low_spectra, LOWERED, 0.5),
}

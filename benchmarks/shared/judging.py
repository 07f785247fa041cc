"""What calibrates a network, and what its compressed trees are judged on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from benchmarks.networks import common
import utilized_rank as ur
from utilized_rank.lowrank.store import stored_pairs
from utilized_rank.tree import paths


class Judge:
  """Measures trees of any ranks on one fold, with one compilation."""

  def __init__(self, network: common.Network, moments: ur.Moments, batch):
    self._network, self._moments, self._batch = network, moments, batch
    self._run = jax.jit(ur.low_rank(network.fn))
    self._dense = self._scores(network.params)

  def _scores(self, tree):
    if not _is_narrower_pair(tree, self._network.params):
      tree = _padded(tree, self._moments, self._network.params)
    return common.scores(self._run, tree, self._batch, self._network.batch_size)

  def __call__(self, tree) -> dict[str, np.ndarray]:
    """Per label: whether it is right, its nats, and KL(dense || tree)."""
    log_p, y = self._scores(tree), self._batch['y'].astype(np.int64)
    real = y >= 0
    picked = np.take_along_axis(log_p, np.maximum(y, 0)[..., None], -1)[..., 0]
    kl = np.sum(np.exp(self._dense) * (self._dense - log_p), -1)
    return {
      'accuracy': (log_p.argmax(-1) == y)[real].astype(float),
      'cross_entropy': -picked[real],
      'kl': kl[real],
    }

  def check_padding(self, tree) -> None:
    """Raises unless padding leaves the function as it is."""
    few = {k: v[:4] for k, v in self._batch.items()}
    plain = jax.jit(ur.low_rank(self._network.fn))(tree, few)
    ours = self._run(_padded(tree, self._moments, self._network.params), few)
    np.testing.assert_allclose(plain, ours, rtol=1e-3, atol=1e-3)


def _is_narrower_pair(tree, dense) -> bool:
  """Whether a pair stands for a kernel of a narrower layer."""
  named, _ = paths.flatten(tree, lambda v: isinstance(v, ur.LowRank))
  whole, _ = paths.flatten(dense)
  return any(
    isinstance(leaf, ur.LowRank) and leaf.shape != np.shape(whole[path])
    for path, leaf in named.items()
  )


def _padded(tree, moments, dense):
  """The same function with every kernel a pair of full rank, of zeros mostly.

  All trees then have the same shapes.
  """
  named, treedef = paths.flatten(tree, lambda v: isinstance(v, ur.LowRank))
  for path, whole in paths.flatten(dense)[0].items():
    if (shape := np.shape(named[path])) != np.shape(whole):
      # Of a narrower hidden layer: units of zeros.
      more = zip(np.shape(whole), shape, strict=True)
      named[path] = np.pad(named[path], [(0, wide - n) for wide, n in more])
  for path in moments:
    leaf, layout = named[path], moments[path].layout
    if isinstance(leaf, ur.NarrowHeads):
      leaf = leaf.dense()
    d, m = layout.matrix_shape
    c = None
    if isinstance(leaf, ur.LowRank):
      ((a, b),) = stored_pairs(leaf)
      more = layout.full_rank - leaf.rank
      a, b = np.pad(a, [(0, 0), (0, more)]), np.pad(b, [(0, more), (0, 0)])
      c = leaf.c
    else:
      w = np.asarray(layout.to_matrices(np.asarray(leaf)))
      one = np.eye(min(d, m))
      a, b = (w, one) if d >= m else (one, w)
    if c is None and moments[path].entry.bias is None:
      c = np.zeros(layout.output_shape, leaf.dtype)
    named[path] = ur.LowRank(
      a.reshape(*layout.input_shape, -1).astype(leaf.dtype),
      b.reshape(-1, *layout.output_shape).astype(leaf.dtype),
      c,
      layout,
    )
  return paths.unflatten(treedef, named)


def calibrate(network: common.Network, batch: common.Batch) -> ur.Moments:
  """Moments of the network's kernels, with what every method needs."""
  return ur.collect(
    network.fn,
    network.params,
    network.batches(batch),
    loss=ur.sampled_cross_entropy(),
    fisher_rows=True,
    select=network.select,
    progress=False,
  )


class Fold:
  """What calibrates and what judges, and the families made of the former."""

  def __init__(self, network: common.Network, calibration, judged):
    self.network = network
    self.batches = network.batches(calibration)
    self.moments = calibrate(network, calibration)
    self.judge = Judge(network, self.moments, judged)
    self._families: dict[tuple[str, bool], ur.Families] = {}

  def compress(self, share: float, **options: Any) -> tuple[Any, ur.Report]:
    """What `ur.compress` makes of the network with what calibrates it."""
    return ur.compress(
      self.network.fn,
      self.network.params,
      self.batches,
      moments=self.moments,
      params_fraction=share,
      loss=ur.sampled_cross_entropy(),
      progress=False,
      **options,
    )

  def families(self, method: str, mean: bool) -> ur.Families:
    """Those of a method, with the mean compensated or not; made once."""
    if (method, mean) not in self._families:
      self._families[method, mean] = ur.decompose(
        self.network.params,
        self.moments,
        method=method,
        compensate_mean=mean,
        progress=False,
      )
    return self._families[method, mean]


def folds(network: common.Network) -> list[Fold]:
  return [Fold(network, *fold) for fold in network.folds]


def share_kept(tree, kernels: Mapping[str, Any]) -> float:
  """Numbers in the kernels' place, as a share of the kernels'."""
  named, _ = paths.flatten(tree, lambda v: isinstance(v, ur.LowRank))
  left = sum(ur.count_params(named[p]) for p in kernels)
  return left / sum(int(np.prod(kernels[p].layout.shape)) for p in kernels)


def pool(parts: list[dict]) -> dict[str, np.ndarray]:
  """Judgements of several folds as those of one."""
  return {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}


def means(scores: dict[str, np.ndarray]) -> dict[str, float]:
  return {k: round(float(v.mean()), 5) for k, v in scores.items()}


def excess(scores, reference) -> tuple[float, float]:
  """Cross-entropy over the reference's, and its standard error; paired."""
  over = scores['cross_entropy'] - reference['cross_entropy']
  error = over.std(ddof=1) / len(over) ** 0.5
  return round(float(over.mean()), 5), round(float(error), 5)

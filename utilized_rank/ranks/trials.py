"""Measures what ranks do to a function, with one compilation for all of them.

The factors of every kernel stay on the device at full rank and a mask says
which of their columns count, so that another set of ranks is another mask: no
array is made anew and nothing is compiled again. Masks are arrays, so several
sets are tried in one call, and the divergence has a derivative with respect to
them: what each direction of each kernel is worth, by one backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from utilized_rank.factorization.decompose import Families
from utilized_rank.losses.divergence import Divergence
from utilized_rank.lowrank.leaf import LowRank
from utilized_rank.lowrank.leaf import is_low_rank
from utilized_rank.lowrank.low_rank import low_rank
from utilized_rank.lowrank.stack import pad_factors
from utilized_rank.moments.moments import Moments
from utilized_rank.tree import paths
from utilized_rank.walk import tracing

# Path to (num_groups, R): 1 for the directions that count.
Masks = dict[str, Any]


# Path to factors of full rank, A (groups, d, R) and B (groups, R, m), and
# mu A (groups, R): each direction's mean, or zeros where it is not given back.
OnDevice = dict[str, tuple[jax.Array, jax.Array, jax.Array]]


class Trials:
  """The divergence of any ranks from the dense function.

  Ranks are a mapping from path to rank; absent paths are dense.
  """

  def __init__(
    self,
    fn: Callable[[Any, Any], Any],
    params: Any,
    moments: Moments,
    batches: Sequence[Any],
    divergence: Divergence,
    *,
    reference: Any = None,
    at_once: int = 1,
  ):
    """Evaluates the dense function on the batches.

    Args:
      fn: `fn(params, batch) -> outputs`.
      params: dense parameters.
      moments: moments of the kernels.
      batches: the data to judge by; batches of one size compile once.
      divergence: `divergence(dense, outputs, batch) -> (B,)`.
      reference: parameters of the dense function; default `params`.
      at_once: sets of ranks that are tried in one call; more need more memory
        and fill a large accelerator.
    """
    self._named, self._treedef = paths.flatten(params, is_low_rank)
    self._moments = moments
    self._at_once = at_once
    of, join = tracing.split(params if reference is None else reference)
    dense = jax.jit(lambda arrays, batch: fn(join(arrays), batch))
    self._data = [(batch, dense(of, batch)) for batch in batches]
    self._examples = sum(len(jax.tree.leaves(b)[0]) for b in batches)
    small = low_rank(fn)

    def each(masks, family, batch, outputs):
      tree = self._tree(masks, family)
      return divergence(outputs, small(tree, batch), batch)

    def total(*args):
      return jnp.sum(each(*args))

    def one_by_one(masks, *args):
      return jax.lax.map(lambda m: each(m, *args), masks)

    self._each = jax.jit(jax.vmap(each, in_axes=(0, None, None, None)))
    self._one_by_one = jax.jit(one_by_one)
    self._run: Callable[..., jax.Array] | None = None
    self._slopes = jax.jit(jax.grad(total))

  def on_device(self, families: Families) -> OnDevice:
    """Puts factors of full rank on the device."""
    made: OnDevice = {}
    for path in self._moments:
      found = families[path]
      moment, dtype = self._moments[path], self._named[path].dtype
      a, b = pad_factors([f.factors for f in found if f.factors is not None])
      mean = np.asarray(moment.mean, np.float64).reshape(len(found), 1, -1)
      shift = (mean @ a)[:, 0] * families.compensate_mean
      made[path] = (
        jnp.asarray(a, dtype),
        jnp.asarray(b, dtype),
        jnp.asarray(shift, dtype),
      )
    return made

  def masks(self, ranks: Mapping[str, int]) -> Masks:
    """The masks of a set of ranks."""
    out = {}
    for path in self._moments:
      layout = self._moments[path].layout
      rank = ranks.get(path, layout.full_rank)
      row = np.arange(layout.full_rank) < rank
      out[path] = np.tile(row, (layout.num_groups, 1)).astype(np.float32)
    return out

  def measure(
    self, candidates: Sequence[Mapping[str, int]], family: OnDevice
  ) -> np.ndarray:
    """The divergence of every example under each set of ranks.

    Returns:
      (candidates, examples), float64.
    """
    rows = [self.masks(ranks) for ranks in candidates]
    found = []
    for start in range(0, len(rows), self._at_once):
      part = rows[start : start + self._at_once]
      # Always as many masks, so that one program serves.
      filled = part + part[-1:] * (self._at_once - len(part))
      stacked = jax.tree.map(lambda *m: np.stack(m), *filled)
      run = self._several(stacked, family)
      each = [
        np.asarray(run(stacked, family, batch, outputs), np.float64)
        for batch, outputs in self._data
      ]
      found.append(np.concatenate(each, axis=1)[: len(part)])
    return np.concatenate(found)

  def _several(self, masks: Masks, family: OnDevice) -> Callable[..., Any]:
    """`each` of several masks: one by one where a part has no batching rule."""
    if self._run is None:
      fails = self._fails(self._each, masks, family)
      self._run = self._one_by_one if fails else self._each
    return self._run

  def no_slopes(
    self, ranks: Mapping[str, int], family: OnDevice
  ) -> Exception | None:
    """Why there is no derivative by the masks; None where there is one."""
    return self._fails(self._slopes, self.masks(ranks), family)

  def _fails(
    self, fn: Callable[..., Any], masks: Masks, family: OnDevice
  ) -> Exception | None:
    """What tracing `fn` raises, if anything; nothing is computed."""
    try:
      jax.eval_shape(fn, masks, family, *self._data[0])
    except Exception as error:  # each primitive's author raises another
      return error
    return None

  def slopes(
    self, ranks: Mapping[str, int], family: OnDevice
  ) -> dict[str, np.ndarray]:
    """The derivative of the mean divergence by the mask of every direction.

    Returns:
      Path to (num_groups, R); below zero where giving a direction back would
      lower the divergence.
    """
    masks = self.masks(ranks)
    parts = [
      self._slopes(masks, family, batch, outputs)
      for batch, outputs in self._data
    ]
    total = lambda *g: sum(np.asarray(v, np.float64) for v in g)
    return {
      path: g / self._examples
      for path, g in jax.tree.map(total, *parts).items()
    }

  def _tree(self, masks: Masks, family: OnDevice) -> Any:
    named = dict(self._named)
    for path, (a, b, shift) in family.items():
      layout = self._moments[path].layout
      groups = layout.group_shape
      mask = masks[path].astype(a.dtype)
      constant = jnp.einsum('gr,grm->gm', shift * (1 - mask), b)
      bias = self._moments[path].entry.bias
      c = None
      if bias is None:
        c = constant.reshape(groups + layout.output_shape)
      else:
        old = named[bias]
        constant *= self._moments[path].entry.bias_scale
        named[bias] = old + constant.reshape(old.shape).astype(old.dtype)
      named[path] = LowRank(
        (a * mask[:, None]).reshape(groups + layout.input_shape + (-1,)),
        b.reshape(groups + (-1,) + layout.output_shape),
        c,
        layout,
      )
    return paths.unflatten(self._treedef, named)


def divergences(
  fn: Callable[[Any, Any], Any],
  params: Any,
  tree: Any,
  batches: Sequence[Any],
  divergence: Divergence,
) -> np.ndarray:
  """Of every example, (B,): how far `tree` is from the dense function."""
  small = low_rank(fn)
  dense, join = tracing.split(params)
  pairs, join_pairs = tracing.split(tree)
  each = jax.jit(
    lambda dense, pairs, batch: divergence(
      fn(join(dense), batch), small(join_pairs(pairs), batch), batch
    )
  )
  return np.concatenate([np.asarray(each(dense, pairs, b)) for b in batches])

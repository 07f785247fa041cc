"""Measures what ranks do to a function, with one compilation for all of them.

The kernels of a set of ranks are multiplied out on the host and given to the
dense function's own program: whatever the ranks and the method are, nothing is
compiled again, in a later search over the same function neither. The backward
pass gives the divergence's derivative by every kernel, and with it, on the
host, what each direction of each kernel is worth.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from utilized_rank.factorization.decompose import Families
from utilized_rank.host.kept import kept
from utilized_rank.losses.divergence import Divergence
from utilized_rank.lowrank.leaf import is_low_rank
from utilized_rank.lowrank.leaf import with_left
from utilized_rank.lowrank.low_rank import low_rank
from utilized_rank.lowrank.place import place_like
from utilized_rank.lowrank.store import multiplied_out
from utilized_rank.lowrank.store import on_host
from utilized_rank.moments.moments import Moments
from utilized_rank.tree import paths
from utilized_rank.walk import tracing
from utilized_rank.walk.tracing import Form

# Leaves that differ from trial to trial, by path.
Leaves = dict[str, Any]


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
    self._named, treedef = paths.flatten(params, is_low_rank)
    self._moments = moments
    self._at_once = at_once
    self._programs = programs(fn, divergence)
    dense = params if reference is None else reference
    of, form = tracing.on_device(paths.flatten(dense)[0]), Form(dense)
    with tracing.explained(fn, dense, *batches[:1]):
      self._data = [
        (batch, self._programs.outputs(form, of, batch)) for batch in batches
      ]
    self._sizes = [len(jax.tree.leaves(b)[0]) for b in batches]
    start = {**self._named, **self._leaves({}, None)}
    self._form = Form(paths.unflatten(treedef, start), is_low_rank)
    own = self._changing()
    self._rest = tracing.on_device(
      {p: v for p, v in start.items() if p not in own}
    )
    self._run: Callable[..., jax.Array] | None = None

  @property
  def examples(self) -> int:
    """How many there are."""
    return sum(self._sizes)

  @property
  def few(self) -> list[int]:
    """Numbers of the first batches, which hold a quarter of the examples."""
    ends = np.cumsum(self._sizes)
    return list(range(int(np.searchsorted(ends, ends[-1] / 4)) + 1))

  @property
  def others(self) -> list[int]:
    """Numbers of the batches behind these."""
    return list(range(len(self.few), len(self._sizes)))

  def measure(
    self,
    candidates: Sequence[Mapping[str, int]],
    families: Families,
    batches: Sequence[int] | None = None,
  ) -> np.ndarray:
    """The divergence of every example under each set of ranks.

    Args:
      candidates: sets of ranks.
      families: the factors.
      batches: numbers of the batches to look at; default all.

    Returns:
      (candidates, examples), float64.
    """
    found = []
    for start in range(0, len(candidates), self._at_once):
      part = candidates[start : start + self._at_once]
      made = [self._leaves(ranks, families) for ranks in part]
      found.append(self._measured(made, batches)[: len(part)])
    return np.concatenate(found)

  def _measured(
    self, made: list[Leaves], batches: Sequence[int] | None
  ) -> np.ndarray:
    numbers = range(len(self._data)) if batches is None else batches
    run: Callable[..., Any]
    if self._at_once == 1:
      leaves = {**self._rest, **made[0]}
      one = functools.partial(self._programs.each, self._form, leaves)
      run = lambda *data: np.asarray(one(*data))[None]
    else:
      # Always as many, so that one program serves.
      filled = made + made[-1:] * (self._at_once - len(made))
      stacked = jax.tree.map(lambda *v: np.stack(v), *filled)
      many = self._several(stacked)
      run = functools.partial(many, self._form, stacked, self._rest)
    each = [run(*self._data[i]) for i in numbers]
    return np.concatenate([np.asarray(e, np.float64) for e in each], axis=1)

  def _several(self, stacked: Leaves) -> Callable[..., Any]:
    """`each` of several trees: one by one where a part has no batching rule."""
    if self._run is None:
      many = self._programs.many
      fails = self._fails(many, stacked)
      self._run = self._programs.one_by_one if fails else many
    return self._run

  def no_slopes(
    self, ranks: Mapping[str, int], families: Families
  ) -> Exception | None:
    """Why there is no derivative by the kernels; None where there is one."""
    return self._fails(self._programs.slopes, self._leaves(ranks, families))

  def _fails(self, fn: Callable[..., Any], leaves: Leaves) -> Exception | None:
    """What tracing `fn` raises, if anything; nothing is computed."""
    run = functools.partial(fn, self._form)
    return tracing.failure(run, leaves, self._rest, *self._data[0])

  def slopes(
    self, ranks: Mapping[str, int], families: Families
  ) -> dict[str, np.ndarray]:
    """The derivative of the mean divergence by how much of a direction is kept.

    Returns:
      Path to (num_groups, R); below zero where giving a direction back would
      lower the divergence.
    """
    leaves = self._leaves(ranks, families)
    parts = [
      self._programs.slopes(self._form, leaves, self._rest, *data)
      for data in self._data
    ]
    total = lambda *g: sum(np.asarray(v, np.float64) for v in g)
    by_leaf = jax.tree.map(total, *parts)
    return {
      path: self._by_direction(path, by_leaf, families) / self.examples
      for path in self._moments
    }

  def _by_direction(
    self, path: str, by_leaf: Leaves, families: Families
  ) -> np.ndarray:
    layout, entry = self._moments[path].layout, self._moments[path].entry
    d, m = layout.matrix_shape
    mine = by_leaf[path]
    by_constant = np.zeros((layout.num_groups, m))
    if is_low_rank(mine):
      by_kernel = mine.b if layout.is_wide else mine.a
      by_constant = mine.c
    else:
      by_kernel = layout.to_matrices(mine)
      if entry.bias is not None and families.compensate_mean:
        by_constant = entry.bias_scale * by_leaf[entry.bias]
    by_kernel = by_kernel.reshape(-1, d, m)
    by_constant = by_constant.reshape(-1, m)
    found = []
    for i, (a, b, shift) in enumerate(self._factors(path, families)):
      slope = np.sum((a.T @ by_kernel[i]) * b, axis=1)
      found.append(slope - shift * (b @ by_constant[i]))
    return np.stack(found)

  def _factors(self, path: str, families: Families):
    """For each matrix A, B, and each direction's mean, which is given back."""
    moment = self._moments[path]
    means = np.asarray(moment.mean, np.float64).reshape(
      moment.layout.num_groups, -1
    )
    for family, mean in zip(families[path], means, strict=True):
      assert family.factors is not None
      a, b = family.factors
      yield a, b, (mean @ a) * families.compensate_mean

  def _changing(self) -> set[str]:
    """Paths of the leaves that ranks decide."""
    entries = [self._moments[path].entry for path in self._moments]
    biases = {e.bias for e in entries if e.bias is not None}
    return {*self._moments, *biases}

  def _leaves(
    self, ranks: Mapping[str, int], families: Families | None
  ) -> Leaves:
    """The kernels of a set of ranks multiplied out, and their biases."""
    made: Leaves = {p: self._named[p] for p in self._changing()}
    constants: dict[str, np.ndarray] = {}
    for path in self._moments:
      layout, entry = self._moments[path].layout, self._moments[path].entry
      d, m = layout.matrix_shape
      w = layout.to_matrices(np.asarray(made[path])).reshape(-1, d, m)
      constant = np.zeros((len(w), m))
      rank = ranks.get(path, layout.full_rank)
      if families is not None and path in ranks:
        w = np.empty((len(w), d, m))
        for i, (a, b, shift) in enumerate(self._factors(path, families)):
          w[i] = a[:, :rank] @ b[:rank]
          constant[i] = shift[rank:] @ b[rank:]
      if entry.bias is not None:
        old = constants.get(entry.bias, 0.0)
        constants[entry.bias] = old + entry.bias_scale * constant.reshape(-1)
      made[path] = self._leaf(path, w, constant)
    for path, constant in constants.items():
      bias = np.asarray(self._named[path], np.float64)
      new = bias + constant.reshape(bias.shape)
      made[path] = place_like(new, self._named[path])
    return made

  def _leaf(self, path: str, w: np.ndarray, constant: np.ndarray) -> Any:
    """A kernel: as it is where a bias takes its constant, else with a `c`."""
    moment, old = self._moments[path], self._named[path]
    alone = moment.entry.bias is None
    return multiplied_out(w, constant if alone else None, moment.layout, old)


class Programs:
  """Compiled functions of `fn` and a divergence; their arguments are all.

  In place of parameters they take a form and the leaves by path.
  """

  def __init__(self, fn: Callable[[Any, Any], Any], divergence: Divergence):
    small = low_rank(fn)

    def outputs(form, leaves, batch):
      run = small if any(map(is_low_rank, leaves.values())) else fn
      return run(form.filled(leaves), batch)

    def each(form, leaves, batch, dense):
      return divergence(dense, outputs(form, leaves, batch), batch)

    def total(form, leaves, rest, batch, dense):
      return jnp.sum(each(form, {**rest, **leaves}, batch, dense))

    def one_by_one(form, leaves, rest, *data):
      return jax.lax.map(lambda v: each(form, {**rest, **v}, *data), leaves)

    def many(form, leaves, rest, *data):
      over = jax.vmap(lambda v: each(form, {**rest, **v}, *data))
      return over(leaves)

    compiled = functools.partial(jax.jit, static_argnums=0)
    self.outputs = compiled(outputs)
    self.each = compiled(each)
    self.many = compiled(many)
    self.one_by_one = compiled(one_by_one)
    self.slopes = compiled(jax.grad(total, argnums=1))


def programs(fn: Callable[[Any, Any], Any], divergence: Divergence) -> Programs:
  """The programs of a function and a divergence, made once."""
  return kept([fn, divergence], 'trials', Programs)


def divergences(
  fn: Callable[[Any, Any], Any],
  params: Any,
  tree: Any,
  batches: Sequence[Any],
  divergence: Divergence,
) -> np.ndarray:
  """Of every example, (B,): how far `tree` is from the dense function."""
  run = programs(fn, divergence)
  named, treedef = paths.flatten(tree, is_low_rank)
  if not any(is_low_rank(v) and v.c is not None for v in named.values()):
    # Multiplied out it needs no program of its own.
    named = {p: on_host(v) for p, v in with_left(named).items()}
  form = Form(paths.unflatten(treedef, named), is_low_rank)
  leaves = {
    path: v if is_low_rank(v) else jax.device_put(v)
    for path, v in named.items()
    if is_low_rank(v) or tracing.is_array(v)
  }
  of, dense = tracing.on_device(paths.flatten(params)[0]), Form(params)
  found = []
  for batch in batches:
    outputs = run.outputs(dense, of, batch)
    found.append(np.asarray(run.each(form, leaves, batch, outputs)))
  return np.concatenate(found)

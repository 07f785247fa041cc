"""The Fisher information of every row of a kernel, from gradients per example.

Hsu, Hua, Chang, Lou, Shen, Jin, *Language model compression with weighted
low-rank factorization*, https://arxiv.org/abs/2207.00112 (FWSVD), weighs row i
of W by the square root of sum_j E[(dL/dW_ij)^2]. That needs the gradient of
each example, squared before it is averaged. The moments S and G cannot stand in
for it: with E[dW^2] = S_ii G_jj row i would get S_ii tr(G), which is the weight
that ASVD gives it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

from utilized_rank.host.meshes import is_explicit
from utilized_rank.moments.counting import EVERY
from utilized_rank.moments.counting import Counting
from utilized_rank.moments.gradients import LossFn
from utilized_rank.moments.rows import first_part
from utilized_rank.tree import paths
from utilized_rank.tree.layout import Layout


def row_fisher_sums(
  fn: Callable[[Any, Any], Any],
  loss: LossFn,
  layouts: dict[str, Layout],
  counting: Counting = EVERY,
) -> Callable[[Any, Any], dict[str, jax.Array]]:
  """Makes a function that sums the squared gradients of every kernel's rows.

  One example at a time, so that no more than one gradient is ever held; the
  rows of an example (positions, patches) add up before they are squared, as
  they do in dL/dW.

  Args:
    fn: `fn(params, batch) -> outputs`; examples must not mix.
    loss: `loss(outputs, batch) -> (B,)`, one number of nats per example.
    layouts: kernels by path, as `find_sites` or `capture` found them.
    counting: which examples count; default all.

  Returns:
    `sums(params, batch) -> sums`: per path the sum over examples of
    sum_j (dL/dW_ij)^2, (*groups, d) float32.

  Raises (when called):
    ValueError: the mask is of tokens: an example's gradient is of all of them.
  """

  def sums(params, batch):
    mask = counting.mask
    if mask is not None and mask.ndim > 1:
      raise ValueError(
        f'fisher_rows=True needs a mask of examples, (B,), and mask= is of '
        f"tokens, {mask.shape}: an example's gradient is of all its tokens"
      )
    named, treedef = paths.flatten(params)

    def nats(kernels, example):
      one = jax.tree.map(lambda a: a[None], example)
      tree = paths.unflatten(treedef, {**named, **kernels})
      return jnp.sum(loss(fn(tree, one), one))

    def add(total, one):
      example, is_real = one
      grads = jax.grad(nats)({p: named[p] for p in layouts}, example)
      for path, layout in layouts.items():
        squares = layout.to_matrices(grads[path]).astype(jnp.float32) ** 2
        if is_real is not None:
          squares = jnp.where(is_real, squares, 0.0)
        total[path] += jnp.sum(squares, axis=-1)
      return total, None

    zeros = {
      path: jnp.zeros(y.group_shape + y.matrix_shape[:1], jnp.float32)
      for path, y in layouts.items()
    }
    every = lambda examples: jax.lax.scan(add, zeros, examples)[0]
    return _in_parts(every, (batch, mask), counting.over)

  return sums


def _in_parts(
  sums: Callable[[Any], jax.Array],
  arrays: Any,
  over: tuple[Any, tuple[str, ...]] | None,
) -> Any:
  """`sums` of arrays that lead with the examples, over each share of them.

  Args:
    sums: sums over examples, each (*groups, d).
    arrays: pytree of arrays of the same examples.
    over: as in `Counting`.

  Returns:
    What `sums` returns, with the parts in front of the features. Examples that
    do not divide evenly are all in the first part, and so are those whose
    types say how they are spread: a function may not cut them.
  """
  parts = Counting(None, over).parts
  if not parts:
    return sums(arrays)
  assert over is not None
  size = len(jax.tree.leaves(arrays)[0])
  explicit = is_explicit(over[0])
  if explicit:
    whole = NamedSharding(over[0], PartitionSpec())
    arrays = jax.tree.map(lambda a: jax.sharding.reshard(a, whole), arrays)
  if size % parts or explicit:
    return jax.tree.map(lambda a: first_part(a, 1, parts), sums(arrays))
  spread = NamedSharding(over[0], PartitionSpec(over[1]))

  def cut(array):
    array = jnp.asarray(array).reshape(parts, size // parts, *array.shape[1:])
    return jax.lax.with_sharding_constraint(array, spread)

  found = jax.vmap(sums)(jax.tree.map(cut, arrays))
  return jax.tree.map(lambda a: jnp.moveaxis(a, 0, -2), found)

"""Finds the kernels of attention that act in pairs, by the flow of data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from utilized_rank.attention import heads
from utilized_rank.attention.follow import Follower
from utilized_rank.attention.follow import Recorder
from utilized_rank.attention.pairing import Projection
from utilized_rank.moments.capture import eval_shape
from utilized_rank.tree.layout import View
from utilized_rank.walk import compat
from utilized_rank.walk import tracing
from utilized_rank.walk.values import Dense
from utilized_rank.walk.values import Param


def find_attention(
  fn: Callable[..., Any], params: Any, *args: Any, **kwargs: Any
) -> heads.Attention:
  """Finds query and key, value and output kernels, from shapes alone.

  A pair is found by what the traced function does, never by names: two
  kernels whose outputs, behind nothing but layout, their biases and scalars,
  meet in one product over the features of each head; and a kernel whose
  output is summed over rows (by attention's weights, say), and then
  contracted by a second kernel. Anything in between (a rotation by position,
  a norm of queries, dropout, a second use) means that the pair is none.

  Args:
    fn: `fn(params, *args, **kwargs)`.
    params: dense parameters, or their `ShapeDtypeStruct`s.
    *args: the other arguments (arrays or shapes).
    **kwargs: keyword arguments.

  Returns:
    The pairs by the path of their left kernel, for `factorize_heads`; `print`
    it to see, for every kernel, what it is or why it is in no pair.

  >>> import jax, jax.numpy as jnp
  >>> def fn(p, x):
  ...   weights = jax.nn.softmax((x @ p['q']) @ (x @ p['k']).T / 2)
  ...   return jnp.tanh(weights @ (x @ p['v'])) @ p['o']
  >>> params = {name: jnp.ones((4, 4)) for name in 'qkvo'}
  >>> print(find_attention(fn, params, jnp.ones((3, 4))))
  kernel  shape  heads  width  notes
  q         4×4      1      4  query, with k
  k         4×4      1      4  key, with q
  v                            - its output, summed over rows, meets tanh
  o                            - its output ends in the function's output
  2 of 4 kernels in pairs
  """
  found: list[heads.Attention] = []

  def shapes(params, args, kwargs):
    traced = tracing.trace(fn, params, args, kwargs)
    recorder = Recorder(list(traced.params))
    walk = Follower(recorder, traced.rescaling)
    values = [
      Param(View.of_leaf(path, leaf.shape, leaf.dtype), Dense(leaf))
      for path, leaf in traced.params.items()
    ]
    outs = walk.run(traced.jaxpr, traced.consts, [*values, *traced.args])
    arrays = [walk.materialise(v, "the function's output") for v in outs]
    found.append(_finish(recorder, traced.params))
    return arrays

  eval_shape(shapes, params, args, kwargs)
  return found[-1]


def _finish(recorder: Recorder, params: dict[str, Any]) -> heads.Attention:
  products: dict[str, list[Projection]] = {}
  owners: dict[str, set[str]] = {}
  for projection in recorder.projections:
    products.setdefault(projection.path, []).append(projection)
    if projection.bias is not None:
      owners.setdefault(projection.bias, set()).add(projection.path)
  places: dict[str, int] = {}
  for candidate in recorder.candidates:
    for side in candidate.sides:
      places[side.path] = places.get(side.path, 0) + 1

  def trouble(path: str) -> str | None:
    """Why a kernel may not be changed, whatever its partner."""
    (first, *more), drops = products[path], recorder.drops[path]
    if more:
      return f'it is the kernel of {1 + len(more)} products'
    if drops:
      return f'it is also used by {", ".join(drops)}'
    if not compat.is_floating(params[path].dtype):
      return f'it is {params[path].dtype}'
    if places.get(path, 0) > 1:
      return 'it would be in two pairs'
    bias = first.bias
    if bias is not None and (
      owners[bias] != {path} or recorder.drops[bias] or bias in products
    ):
      return f'its bias {bias!r} is used elsewhere too'
    return None

  order = {path: i for i, path in enumerate(products)}
  pairs: dict[str, heads.HeadPair] = {}
  unseen: dict[str, str] = {}
  for candidate in recorder.candidates:
    pair = candidate.pair()
    paths = pair.left.path, pair.right.path
    reasons = {path: trouble(path) for path in paths}
    if not any(reasons.values()):
      if order[paths[0]] > order[paths[1]]:
        pair = heads.HeadPair(pair.kind, pair.right, pair.left)
      pairs[pair.left.path] = pair
      continue
    for path, other in (paths, paths[::-1]):
      unseen[path] = reasons[path] or f'its partner {other}: {reasons[other]}'
  paired = {s.path for p in pairs.values() for s in (p.left, p.right)}
  for path, uses in products.items():
    if path not in paired and path not in unseen:
      ends = [use.end for use in uses if use.end is not None]
      unseen[path] = trouble(path) or ends[0]
  return heads.Attention(pairs, unseen)

"""AA-SVD for the encoder of `networks/minilm.py`; shares no code with ours.

A. K. Sinha, F. Fleuret, "AA-SVD: Anchored and Adaptive SVD for Large Language
Model Compression", arXiv 2604.02119, written from the paper. Numbers of the
training (rate, schedule, decay, clipping) are the defaults of the published
code, github.com/atulkumarin/AA-SVD, where 25 epochs of eight batches make 200
updates. Rows are inputs here, y = x W, where the paper has columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.linalg import solve_triangular
from threadpoolctl import threadpool_limits

from benchmarks.networks import minilm
from benchmarks.shared import svd_llm

# Kernels of a layer that read one value, in the order in which they are cut:
# what the later ones read is of a network where the earlier ones are.
GROUPS = (('query', 'key', 'value'), ('output',), ('up',), ('down',))
UPDATES, RATE = 200, 1e-4
# Shares of the updates over which the rate rises, and of it that is left.
WARMUP, LAST = 0.1, 0.1
DECAY, LARGEST_GRADIENT = 0.01, 1.0


class Pair(NamedTuple):
  """A (d, r) and B (r, m) in place of a kernel."""

  a: Any
  b: Any


def factors(
  w: np.ndarray,
  white: svd_llm.Whitening,
  cross: np.ndarray,
  rank: int,
  dtype: Any = np.float64,
) -> Pair:
  """The pair of least |X W - X^ A B|_F ("objective 4").

  X are the inputs in the dense network, X^ those in the compressed one. With
  L L^T = X^^T X^, the squared error is |L^-1 X^^T X W - L^T A B|_F^2 and what
  no pair can change.

  Args:
    w: (d, m).
    white: L, of the sums of x^ x^^T.
    cross: sums of x^ x^T, (d, d).
    rank: r.
    dtype: of the SVD; the published code has float32.
  """
  root = white.factor
  target = solve_triangular(root, cross @ np.asarray(w, np.float64), lower=True)
  u, s, v = np.linalg.svd(target.astype(dtype), full_matrices=False)
  half = np.sqrt(s[:rank])
  a = solve_triangular(root, u[:, :rank] * half, lower=True, trans='T')
  return Pair(a, half[:, None] * v[:rank])


def compress(
  params: Any,
  batches: Sequence[Any],
  fraction: float,
  *,
  updates: int = UPDATES,
  rate: float = RATE,
) -> Any:
  """Layer after layer: its kernels as pairs, then all of it trained.

  Args:
    params: of `minilm.embed`.
    batches: token ids, (B, T) each. None is held out.
    fraction: of each kernel's parameters to keep; pairs have the rank
      floor(fraction d m / (d + m)).
    updates: of each layer, on one batch each, in turns; 0 for no training.
    rate: the highest.

  Returns:
    The tree with a `Pair` in place of every kernel of a layer.
  """
  tree = dict(params)
  real = [minilm.is_real(tokens) for tokens in batches]
  dense = [_embedded(params, tokens) for tokens in batches]
  small = dense
  train = _trainer(updates, rate) if updates else None
  for name in minilm.layers(params):
    p = _cut(params[name], dense, small, real, fraction)
    dense = [_layer(params[name], *args) for args in zip(dense, real)]
    if train is not None:
      p = train(p, list(zip(small, dense, real)))
    small = [_layer(p, *args) for args in zip(small, real)]
    tree[name] = p
  return tree


def _cut(p, dense, small, real, fraction: float):
  """A layer with pairs of closed form, each group behind those before it."""
  new = dict(p)
  for group in GROUPS:
    sums = [
      _sums(p, new, *args, name=group[0]) for args in zip(dense, small, real)
    ]
    cross, second = (
      np.sum([np.asarray(s, np.float64) for s in parts], axis=0)
      for parts in zip(*sums)
    )
    # On one thread: those that wait would count as CPU seconds.
    with threadpool_limits(1):
      white = svd_llm.whitening(second)
      for name in group:
        w = np.asarray(p[name]['kernel'])
        rank = int(fraction * w.size / sum(w.shape))
        a, b = factors(w, white, cross, rank, np.float32)
        pair = Pair(*(jnp.asarray(f, jnp.float32) for f in (a, b)))
        new[name] = p[name] | {'kernel': pair}
  return new


def _apply(p, name: str, x: jax.Array) -> jax.Array:
  kernel = p[name]['kernel']
  made = x @ kernel.a @ kernel.b if isinstance(kernel, Pair) else x @ kernel
  return made + p[name]['bias']


_embedded = jax.jit(minilm.embedded)
_layer = jax.jit(functools.partial(minilm.layer, dense=_apply))


@functools.partial(jax.jit, static_argnames='name')
def _sums(p, new, dense, small, real, name: str):
  """Sums of x^ x^T and of x^ x^^T over what a kernel reads, padding left out.

  Of the layer only what comes before that kernel is run.
  """

  def rows(p, x):
    read = {}

    def dense(p, name, x):
      read[name] = x
      return _apply(p, name, x)

    minilm.layer(p, x, real, dense)
    found = read[name] * real[..., None]
    return found.reshape(-1, found.shape[-1])

  x, x_hat = rows(p, dense), rows(new, small)
  return x_hat.T @ x, x_hat.T @ x_hat


def _trainer(updates: int, peak: float) -> Callable[[Any, list[Any]], Any]:
  """Trains a layer, compiled once for all of them."""
  rates = optax.warmup_cosine_decay_schedule(
    0.0, peak, int(WARMUP * updates), updates, LAST * peak
  )
  optimizer = optax.chain(
    optax.clip_by_global_norm(LARGEST_GRADIENT),
    optax.adamw(rates, weight_decay=DECAY),
  )

  def loss(p, x, target, real):
    off = jnp.mean(jnp.square(minilm.layer(p, x, real, _apply) - target), -1)
    return jnp.sum(off * real) / jnp.sum(real)

  @jax.jit
  def update(p, state, *batch):
    change, state = optimizer.update(jax.grad(loss)(p, *batch), state, p)
    return optax.apply_updates(p, change), state

  def train(p, batches):
    state = optimizer.init(p)
    for batch in itertools.islice(itertools.cycle(batches), updates):
      p, state = update(p, state, *batch)
    return p

  return train

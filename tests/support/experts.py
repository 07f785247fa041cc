"""A mixture of experts without dropped tokens, and references for it."""

import functools

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import wrappers

D, H, E, N, TOP = 6, 10, 4, 96, 2
KERNELS = ('gate', 'up', 'down')
f64 = functools.partial(np.asarray, dtype=np.float64)


def draw(seed, *shape):
  """Normal numbers over the square root of the last axis but one."""
  rng = np.random.default_rng(seed)
  return (rng.normal(size=shape) / np.sqrt(shape[-2])).astype(np.float32)


def parameters():
  return {
    'router': 3 * draw(0, D, E),
    'bias': np.zeros(E, np.float32),
    'gate': draw(1, E, D, H),
    'up': draw(2, E, D, H),
    'down': draw(3, E, H, D),
  }


def inputs():
  return (draw(4, N, D) * np.sqrt(N) + 0.3).astype(np.float32)


def choose(params, x):
  """Of every row, its experts and their weights."""
  logits = x @ params['router'] + params['bias']
  weights, chosen = lax.top_k(jax.nn.softmax(logits), TOP)
  return chosen, weights


def moe(params, x):
  """Rows are sorted by expert, multiplied, and put back."""
  chosen, weights = choose(params, x)
  order = jnp.argsort(chosen.reshape(-1))
  sizes = jnp.bincount(chosen.reshape(-1), length=E)
  rows = jnp.repeat(x, TOP, axis=0)[order]
  h = jax.nn.silu(lax.ragged_dot(rows, params['gate'], sizes))
  h = h * lax.ragged_dot(rows, params['up'], sizes)
  y = lax.ragged_dot(h, params['down'], sizes)[jnp.argsort(order)]
  return jnp.einsum('nkd,nk->nd', y.reshape(len(x), TOP, -1), weights)


def dense_moe(params, x, taps=(0.0, 0.0, 0.0)):
  """The same, every row through every expert; taps add to their outputs."""
  chosen, weights = choose(params, x)
  gate = jnp.einsum('nd,edh->neh', x, params['gate']) + taps[0]
  up = jnp.einsum('nd,edh->neh', x, params['up']) + taps[1]
  y = jnp.einsum('neh,ehd->ned', jax.nn.silu(gate) * up, params['down'])
  y = jnp.take_along_axis(y + taps[2], chosen[..., None], axis=1)
  return jnp.einsum('nkd,nk->nd', y, weights)


def reference_rows(params, x):
  """Path to the rows that each expert's kernel reads, float64."""
  p, found = jax.tree.map(f64, params), {name: [] for name in KERNELS}
  chosen, _ = choose(params, x)
  for e in range(E):
    mine = f64(x)[(np.asarray(chosen) == e).any(1)]
    gate, up = mine @ p['gate'][e], mine @ p['up'][e]
    found['gate'].append(mine)
    found['up'].append(mine)
    found['down'].append(gate / (1 + np.exp(-gate)) * up)
  return found


def check(moments, path, rows):
  """Moments of a leaf against a list of each kernel's rows."""
  np.testing.assert_array_equal(moments[path].count, [len(r) for r in rows])
  for e, mine in enumerate(rows):
    if not len(mine):
      assert not np.asarray(moments[path].second[e]).any()
      continue
    wrappers.close(moments[path].mean[e], mine.mean(0), f'mean of {path}')
    second = mine.T @ mine / len(mine)
    wrappers.close(moments[path].second[e], second, f'second of {path}')

"""Random functions built of the pieces, against sums taken beside them.

A program is a list of steps, run twice: by JAX under `capture`, with whatever
control flow the step asks for; and by plain float64 numpy loops, which note
the rows that each kernel reads. 500 programs by default; the number is
UTILIZED_RANK_EXAMPLES (20000 for the long run).
"""

import functools
import os

import evaluate
from hypothesis import HealthCheck
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

import utilized_rank as ur

D = 4  # every step maps (n, 4) to (n, 4)
N = 3


class Step:
  """`shape` of the kernel, `jax(w, x)`, and `plain(w, x)` -> (y, X)."""

  def __init__(self, shape, run, plain):
    self.shape, self.run, self.plain = shape, run, plain


def _heads(w, x):
  rows = x.reshape(-1, 2, 2).transpose(0, 2, 1).reshape(-1, 4)
  return rows @ w.reshape(4, 4), rows


def _conv_rows(x):
  padded = np.pad(x, ((1, 1), (0, 0)))
  return np.stack([padded[i : i + 3].ravel() for i in range(len(x))])


def _experts(w, x):
  parts = np.stack([x[:, :2], x[:, 2:]])
  return np.concatenate([parts[0] @ w[0], parts[1] @ w[1]], -1), parts


def _gates(array, zr, new):
  return array.tanh(zr[:, :4]) * zr[:, 4:] + new


def _sliced(w, x):
  return x @ w[0] + np.cos(x) @ w[1], np.stack([x, np.cos(x)])


def _spectral(w, x):
  """By a number that a power iteration makes of the kernel alone."""
  unit = lambda v: v / jnp.linalg.norm(v)
  u = lax.fori_loop(
    0, 2, lambda _, u: unit(unit(u @ w.T) @ w), jnp.ones(D, w.dtype)
  )
  return x @ w / (1 + unit(u @ w.T) @ w @ u)


def _spectral_plain(w, x):
  unit, u = lambda v: v / np.linalg.norm(v), np.ones(D)
  for _ in range(2):
    u = unit(unit(u @ w.T) @ w)
  return x @ w / (1 + unit(u @ w.T) @ w @ u), x


STEPS = {
  'dot': Step((4, 4), lambda w, x: x @ w, lambda w, x: (x @ w, x)),
  'transposed': Step(
    (4, 4), lambda w, x: (w @ x.T).T, lambda w, x: (x @ w.T, x)
  ),
  'cast': Step(
    (2, 2, 4),
    lambda w, x: x @ w.astype(jnp.bfloat16).astype(x.dtype).reshape(4, 4),
    lambda w, x: (x @ _bf16(w).reshape(4, 4), x),
  ),
  'heads': Step(
    (2, 2, 4),
    lambda w, x: jnp.einsum('ndh,hde->ne', x.reshape(-1, 2, 2), w),
    _heads,
  ),
  'heads_left': Step(
    (2, 2, 4),
    lambda w, x: jnp.einsum('hde,ndh->ne', w, x.reshape(-1, 2, 2)),
    _heads,
  ),
  'conv': Step(
    (3, 4, 4),
    lambda w, x: lax.conv_general_dilated(
      x[None], w, (1,), 'SAME', dimension_numbers=('NWC', 'WIO', 'NWC')
    )[0],
    lambda w, x: (_conv_rows(x) @ w.reshape(12, 4), _conv_rows(x)),
  ),
  'experts': Step(
    (2, 2, 2),
    lambda w, x: jnp.einsum('neb,ebm->nem', x.reshape(-1, 2, 2), w).reshape(
      -1, 4
    ),
    _experts,
  ),
  'flipped': Step(
    (4, 4),
    lambda w, x: x @ w[::-1, ::-1],
    lambda w, x: (x @ w[::-1, ::-1], x[:, ::-1]),
  ),
  'flipped_heads': Step(
    (2, 2, 4),
    lambda w, x: x @ jnp.flip(w, (1, 2)).reshape(4, 4),
    lambda w, x: (
      x @ w[:, ::-1, ::-1].reshape(4, 4),
      x.reshape(-1, 2, 2)[:, :, ::-1].reshape(-1, 4),
    ),
  ),
  'flipped_experts': Step(
    (2, 2, 2),
    lambda w, x: jnp.einsum(
      'neb,ebm->nem', x.reshape(-1, 2, 2), w[::-1]
    ).reshape(-1, 4),
    lambda w, x: (_experts(w[::-1], x)[0], _experts(w, x)[1][::-1]),
  ),
  'scaled': Step(
    (4, 4),
    lambda w, x: x @ (-w / np.sqrt(4)),
    lambda w, x: (x @ (-w / 2), x),
  ),
  'scale_of_itself': Step(
    (4, 4),
    lambda w, x: x @ (w * jnp.cos(w[0, 0])),
    lambda w, x: (x @ (w * np.cos(w[0, 0])), x),
  ),
  'parts': Step(
    (4, 12),
    lambda w, x: _gates(jnp, x @ w[:, :8], jnp.cos(x) @ w[:, 8:]),
    lambda w, x: (
      _gates(np, x @ w[:, :8], np.cos(x) @ w[:, 8:]),
      np.stack([x, x, np.cos(x)]),
    ),
  ),
  'spectral': Step((4, 4), _spectral, _spectral_plain),
  'sliced': Step((2, 4, 4), lambda w, x: x @ w[0] + jnp.cos(x) @ w[1], _sliced),
  'split': Step(
    (4, 8),
    lambda w, x: sum(
      f(x) @ v for f, v in zip((lambda v: v, jnp.cos), jnp.split(w, 2, 1))
    ),
    lambda w, x: _sliced(np.stack(np.split(w, 2, 1)), x),
  ),
}


def _bf16(w):
  return np.asarray(jnp.asarray(w, jnp.bfloat16), np.float64)


# Each wrapper has a JAX side, and a list of (layer, repeats) for numpy: which
# of a stack's kernels run, one after the other.
def _chain(f):
  return lambda w, x: jnp.sin(f(w, x))


def _scan(reverse, unroll, inner=lambda f: f):
  return lambda f: (
    lambda w, x: lax.scan(
      lambda x, w: (inner(_chain(f))(w, x), None),
      x,
      w,
      reverse=reverse,
      unroll=unroll,
    )[0]
  )


def _while(f):
  def run(w, x):
    stop = jnp.argmax(jnp.zeros(2)) + 2
    return lax.while_loop(
      lambda s: s[0] < stop, lambda s: (s[0] + 1, _chain(f)(w, s[1])), (0, x)
    )[1]

  return run


def _rule(f):
  g = jax.custom_vjp(_chain(f))
  g.defvjp(lambda w, x: (g(w, x), None), lambda _, t: (None, t))
  return g


def _indexed(f):
  return lambda w, x: lax.fori_loop(0, 2, lambda i, x: _chain(f)(w[i], x), x)


def _nested(f):
  step = lambda x, w: (_chain(f)(w, x), None)
  twice = lambda x, w: (lax.scan(lambda x, _: step(x, w), x, None, 2)[0], None)
  return lambda w, x: lax.scan(twice, x, w)[0]


WRAPS = {
  'plain': (False, _chain, [0]),
  'jit': (False, lambda f: jax.jit(_chain(f)), [0]),
  'remat': (False, lambda f: jax.checkpoint(_chain(f)), [0]),
  'custom_vjp': (False, _rule, [0]),
  'cond': (
    False,
    lambda f: (
      lambda w, x: lax.cond(
        x[0, 0] < 99, _chain(f), lambda w, x: f(w, x + 1), w, x
      )
    ),
    [0],
  ),
  'switch': (
    False,
    lambda f: lambda w, x: lax.switch(1, [f, _chain(f)], w, x),
    [0],
  ),
  'tied': (
    False,
    lambda f: lambda w, x: lax.fori_loop(0, 2, lambda _, x: _chain(f)(w, x), x),
    [0, 0],
  ),
  'while': (False, _while, [0, 0]),
  'scan': (True, _scan(False, 1), [0, 1]),
  'reversed': (True, _scan(True, 1), [1, 0]),
  'unrolled': (True, _scan(False, 2), [0, 1]),
  'scan_remat': (True, _scan(False, 1, jax.checkpoint), [0, 1]),
  'nested': (True, _nested, [0, 0, 1, 1]),
  'indexed': (True, _indexed, [0, 1]),
}

PIECES = st.tuples(
  st.sampled_from(sorted(STEPS)),
  st.sampled_from(sorted(WRAPS)),
  st.integers(0, 3),  # which of the kernels of that kind: they are shared
)


def kernel_of(step, stacked, number):
  return f'{step}_{"stack" if stacked else "one"}_{number % 2}'


def draw(program, seed):
  rng = np.random.default_rng(seed)
  params = {}
  for step, wrap, number in program:
    stacked = WRAPS[wrap][0]
    shape = (2,) * stacked + STEPS[step].shape
    name = kernel_of(step, stacked, number)
    if name not in params:
      # Numbers of float32, so that the cast to bfloat16 rounds once.
      params[name] = np.float64(np.float32(rng.normal(size=shape) * 0.7))
  return params, rng.normal(size=(N, D))


def run(program, params, x):
  for step, wrap, number in program:
    stacked, wrapper, _ = WRAPS[wrap]
    name = kernel_of(step, stacked, number)
    x = wrapper(STEPS[step].run)(params[name], x)
  return x


def reference(program, params, x):
  """Outputs and, by kernel, the rows of each group, in float64."""
  x = np.float64(x)
  rows: dict = {}
  for step, wrap, number in program:
    stacked, _, layers = WRAPS[wrap]
    name = kernel_of(step, stacked, number)
    for layer in layers:
      w = np.float64(params[name])
      y, read = STEPS[step].plain(w[layer] if stacked else w, x)
      rows.setdefault(name, {}).setdefault(layer, []).append(read)
      x = np.sin(y)
  return x, {
    name: np.stack([np.concatenate(by_layer[i], -2) for i in sorted(by_layer)])
    if '_stack_' in name
    else np.concatenate(by_layer[0], -2)
    for name, by_layer in rows.items()
  }


EXAMPLES = int(os.environ.get('UTILIZED_RANK_EXAMPLES', '500'))


@settings(
  max_examples=EXAMPLES,
  deadline=None,
  database=None,
  derandomize=True,
  suppress_health_check=list(HealthCheck),
)
@given(st.lists(PIECES, min_size=1, max_size=4), st.integers(0, 2**16))
def test_moments_of_random_programs(program, seed):
  params, x = draw(program, seed)
  want, rows = reference(program, params, x)
  captured = ur.capture(functools.partial(run, program))
  # In float64: a chain of a dozen layers amplifies what float32 rounds.
  with jax.enable_x64(True):
    out, moments = evaluate.call(captured, params, x)
    moments = jax.tree.map(np.asarray, moments)
  np.testing.assert_allclose(out, want, rtol=1e-7, atol=1e-9)
  assert set(moments) == set(rows)
  for name, r in rows.items():
    assert (moments[name].count == r.shape[-2]).all()
    sums = moments[name].sums
    np.testing.assert_allclose(sums.total, r.sum(-2), rtol=1e-7, atol=1e-8)
    np.testing.assert_allclose(
      sums.second, np.einsum('...nd,...ne->...de', r, r), rtol=1e-7, atol=1e-8
    )

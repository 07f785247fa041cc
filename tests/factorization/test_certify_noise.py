"""Certificates where float32 sums are mostly rounding: wrong factors are
rejected, and nothing else is."""

import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references

import utilized_rank as ur
from utilized_rank.factorization import certify
from utilized_rank.factorization import kernels
from utilized_rank.factorization import methods
from utilized_rank.linalg import best_pairs
from utilized_rank.linalg.best_pairs import Pair

pytestmark = pytest.mark.slow

# The others need sums that are not made up here.
METHODS = [m for m in methods.METHODS if m not in ('fisher_rows', 'coupled')]
few_rows = pytest.mark.filterwarnings('ignore:.* was measured on .* rows')


def blind_to(mu, w):
  return w - np.outer(mu, mu @ w) / (mu @ mu)


def float32_sums(rows, batches, dtype='float32'):
  """sum x and sum x x^T, batch after batch in float32, of rounded rows."""
  total, second = np.zeros(rows.shape[1], 'f'), np.zeros((rows.shape[1],) * 2)
  second = second.astype('f')
  for batch in np.array_split(rows, batches):
    batch = np.asarray(jnp.asarray(batch, dtype), np.float32)
    total, second = total + batch.sum(0), second + batch.T @ batch
  return total, second


@functools.cache
def table(shape, from_outputs):
  return ur.collect(
    lambda p, x: x @ p['w'],
    {'w': np.ones(shape, 'f')},
    [np.ones((4, shape[0]), 'f')],
    from_outputs=[('w', True)] if from_outputs else None,
    progress=False,
  )


def moments_of(shape, rows, total, second, gradient=None, from_outputs=False):
  known = table(shape, from_outputs)
  count = np.int32(len(rows))
  sums = dataclasses.replace(
    known.sums[0], count=count, total=total, panels=(second,)
  )
  grads = None if gradient is None else ((gradient,),)
  examples = None if gradient is None else count
  return ur.Moments(known.table, (sums,), grads, examples)


def random_problem(rng):
  """A kernel and moments that float32 sums hold badly, or not at all."""
  d, m = rng.choice([3, 8, 16, 48], 2)
  n = int(rng.choice([1, 5, 40, 4000]))
  scale = 10.0 ** rng.choice([0, 0, -15, 12, -6, 6])
  dtype = 'bfloat16' if rng.random() < 0.3 else 'float32'
  x = rng.normal(size=(n, d)) * np.geomspace(
    1, 10.0 ** -rng.choice([0, 3, 6]), d
  )
  x = x + rng.normal(size=d) * rng.choice([0, 1, 30, 1000])
  kind = rng.choice(['plain', 'deficient', 'zero', 'dead', 'turned'])
  if kind == 'deficient':
    r = int(rng.integers(1, d + 1))
    x = x[:, :r] @ rng.normal(size=(r, d))
  elif kind == 'zero':
    x = 0 * x
  elif kind == 'dead':
    x = x * (rng.random(d) < 0.5)
  elif kind == 'turned':
    x = x @ np.linalg.qr(rng.normal(size=(d, d)))[0]
  x = x * scale
  if scale == 1 and rng.random() < 0.5:
    dtype, x = 'float16', x / max(1.0, np.abs(x).max() / 1e3)
  w = rng.normal(size=(d, m)) / np.sqrt(d)
  what = rng.choice(['random', 'blind', 'deficient', 'large', 'small'])
  if what == 'blind' and np.any(x):
    w = blind_to(x.mean(0), w)
  elif what == 'deficient':
    r = int(rng.integers(1, min(d, m) + 1))
    w = w[:, :r] @ rng.normal(size=(r, m))
  elif what in ('large', 'small'):
    w = w * {'large': 1e6, 'small': 1e-6}[what]
  # float16 holds no constant of inputs of 1e6.
  fits = scale <= 1 and what not in ('large', 'small')
  stored = 'float16' if fits else 'float32'
  w = jnp.asarray(w, rng.choice(['float32', 'bfloat16', stored]))
  batches = min(n, int(rng.choice([1, 8, 64])))
  total, second = float32_sums(x, batches, dtype)
  if rng.random() < 0.2:
    _, second = float32_sums(x @ np.asarray(w, np.float64), batches)
    return w, moments_of((d, m), x, total, second, None, True)
  gradient = None
  if rng.random() < 0.5:
    g = rng.normal(size=(n, m)) * 10.0 ** rng.choice([0, -6, 6])
    _, gradient = float32_sums(g * rng.choice([0, 1, 1, 1]), batches)
  return w, moments_of((d, m), x, total, second, gradient)


@few_rows
@pytest.mark.parametrize('seed', range(60))
def test_good_factors_are_never_rejected(seed):
  """Large means, no data, less data than features, any scale, any dtype."""
  w, moments = random_problem(np.random.default_rng(seed))
  from_outputs = moments['w'].entry.side == 'output'
  for method in ('output', 'weight') if from_outputs else METHODS:
    if method == 'loss' and moments.grads is None:
      continue
    for rank in {1, (min(w.shape) + 1) // 2, min(w.shape)}:
      for mean in (True, False):
        ur.factorize(
          {'w': w},
          moments,
          {'w': rank},
          method=method,
          compensate_mean=mean,
          gauge='identity' if rank % 2 else None,
          progress=False,
        )


def mean_problem(share, is_blind, shape, seed=0):
  """Rows of which a mean holds all but a `share` squared, in eight batches."""
  rng = np.random.default_rng(seed)
  d, m = shape
  mu = rng.normal(size=d)
  rows = mu + share * rng.normal(size=(4096, d)) * np.geomspace(1, 1e-3, d)
  w = rng.normal(size=shape) / np.sqrt(d)
  w = np.float32(blind_to(mu, w) if is_blind else w)
  return w, moments_of(shape, rows, *float32_sums(rows, 8)), rows


@pytest.mark.parametrize('centered', [False, True])
@pytest.mark.parametrize('shape', [(32, 128), (32, 32), (48, 16)])
@pytest.mark.parametrize('is_blind', [False, True])
@pytest.mark.parametrize('share', [0.3, 0.1, 0.03])
def test_factors_of_a_large_mean_are_the_best(share, is_blind, shape, centered):
  w, moments, rows = mean_problem(share, is_blind, shape)
  small = ur.factorize(
    {'w': w}, moments, {'w': 8}, compensate_mean=centered, progress=False
  )['w']
  made = np.asarray(small.a, np.float64) @ np.asarray(small.b, np.float64)
  x = rows - rows.mean(0) if centered else rows
  best = references.whitened(w.astype(np.float64), x.T @ x / len(x), 8)
  error, least = (references.squared_error(x, w, v) for v in (made, best))
  # What float32 sums do not resolve of S, eps tr(S), on all of W.
  blur = np.finfo('f').eps * np.mean(np.sum(rows**2, 1)) * np.sum(w**2)
  assert least * (1 - 1e-9) <= error <= least + blur


KINDS = {
  'sign': lambda a, b: Pair(-a, b),
  'columns': lambda a, b: Pair(a[:, [1, 0, *range(2, a.shape[1])]], b),
  'rows': lambda a, b: Pair(a[::-1], b),
  'outputs': lambda a, b: Pair(a, b[:, ::-1]),
  'scale': lambda a, b: Pair(a * 1.01, b),
  'one direction': lambda a, b: Pair(a, np.vstack([0 * b[:1], b[1:]])),
  'NaN': lambda a, b: Pair(a, np.where(b == b[0, 0], np.nan, b)),
  'infinity': lambda a, b: Pair(a, np.where(b == b[0, 0], np.inf, b)),
  'zeros': lambda a, b: Pair(0 * a, b),
}


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('shape', [(32, 128), (32, 32), (48, 16)])
@pytest.mark.parametrize('is_blind', [False, True])
@pytest.mark.parametrize('share', [3.0, 0.1, 0.03])
def test_wrong_factors_of_a_large_mean_are_rejected(
  share, is_blind, shape, kind
):
  w, moments, _ = mean_problem(share, is_blind, shape)
  for centered in (False, True):
    ((_, (kernel,)),) = kernels.kernels({'w': w}, moments, centered=centered)
    pair, error, energy = methods.output(kernel, 8)
    pair = best_pairs.balanced(pair)
    pair = Pair(*(f.astype('f').astype(np.float64) for f in pair))
    certify.check(kernel, pair, error, 'float32', False, energy)
    with (
      np.errstate(invalid='ignore'),
      pytest.raises(FloatingPointError, match="rank-8 factors of 'w'"),
    ):
      certify.check(kernel, KINDS[kind](*pair), error, 'float32', False, energy)


@pytest.mark.parametrize('method', ['output', 'loss', 'weight', 'utilized'])
def test_one_wrong_matrix_of_a_stack_is_noticed_by_name(monkeypatch, method):
  """The others of the leaf are right."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(3, 400, 12)).astype('f') + 5
  params = {'w': rng.normal(size=(3, 12, 10)).astype('f')}
  moments = ur.collect(
    lambda p, x: jnp.einsum('bge,gem->bgm', x, p['w']),
    params,
    [x.swapaxes(0, 1)],
    loss=lambda y, x: jnp.sum(jnp.sin(y), (1, 2)),
    progress=False,
  )
  run = lambda: ur.factorize(
    params, moments, {'w': 5}, method=method, progress=False
  )
  run()
  real, calls = best_pairs.balanced, []

  def corrupted(factors):
    calls.append(None)
    a, b = real(factors)
    return Pair(a, b[::-1] if len(calls) == 2 else b)

  monkeypatch.setattr(best_pairs, 'balanced', corrupted)
  with pytest.raises(FloatingPointError, match=r"rank-5 factors of 'w\["):
    run()


def unreached(kind, shape):
  """A function with a kernel that no example reaches, and its path."""
  rng = np.random.default_rng(int(np.prod(shape)))
  normal = lambda *s: jnp.asarray(rng.normal(size=s), jnp.float32)
  p = {'a': normal(*shape), 'b': normal(*shape)}
  x = normal(64, shape[0])
  if kind == 'branch':
    fn = lambda p, x: jax.lax.cond(
      x.sum() > 1e9, lambda: x @ p['a'], lambda: x @ p['b']
    )
  elif kind == 'switch':
    fn = lambda p, x: jax.lax.switch(
      jnp.int32(x.sum() > 1e9), [lambda: x @ p['b'], lambda: x @ p['a']]
    )
  elif kind == 'loop':
    fn = lambda p, x: (
      x @ p['b']
      + jax.lax.fori_loop(
        0,
        jnp.int32(x.sum() > 1e9),
        lambda i, y: y + x @ p['a'],
        jnp.zeros((len(x), shape[1])),
      )
    )
  elif kind == 'zeros':
    fn = lambda p, x: (0 * x) @ p['a'] + x @ p['b']
  else:  # an expert without tokens
    p = {'e': jnp.stack([p['a'], p['b']])}
    fn = lambda p, x: jax.lax.scan(
      lambda y, w: (
        y
        + jax.lax.cond(
          jnp.all(w[1] == w[1]) & (w[0] == 1),
          lambda: x @ w[1],
          lambda: jnp.zeros((len(x), shape[1])),
        ),
        None,
      ),
      jnp.zeros((len(x), shape[1])),
      (jnp.arange(2), p['e']),
    )[0]
  return fn, p, x


@pytest.mark.parametrize('shape', [(8, 16), (16, 8), (8, 8)])
@pytest.mark.parametrize(
  'kind', ['branch', 'switch', 'loop', 'zeros', 'expert']
)
def test_what_no_example_reaches_gets_its_truncated_svd(kind, shape):
  fn, params, x = unreached(kind, shape)
  with warnings.catch_warnings():
    warnings.simplefilter('ignore', UserWarning)  # few rows, as it should say
    moments = ur.collect(fn, params, [x], progress=False)
    path = 'e' if kind == 'expert' else 'a'
    small = ur.factorize(params, moments, {path: 4}, progress=False)[path]
    families = ur.decompose(params, moments, progress=False, method='output')
    again = ur.factorize(
      params, moments, {path: 4}, families=families, progress=False
    )[path]
  for leaf in (small, again):
    made = np.asarray(leaf.a, np.float64) @ np.asarray(leaf.b, np.float64)
    w = np.asarray(params[path], np.float64)
    if kind == 'expert':
      made, w = made[0], w[0]
    u, sigma, v = np.linalg.svd(w, full_matrices=False)
    # float32 factors
    np.testing.assert_allclose(made, (u[:, :4] * sigma[:4]) @ v[:4], atol=2e-6)

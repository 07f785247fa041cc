"""Vmapped loops that end apart: rows of examples that are done do not count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references

import utilized_rank as ur

B, D = 12, 5


def data():
  rng = np.random.default_rng(0)
  x = (rng.normal(size=(B, D)) + 0.2).astype('f')
  return x, np.arange(B, dtype='i') % 4, rng.normal(size=(D, D)).astype('f') / 3


def counted(p, batch):
  """As many steps as each example asks for."""
  x, n = batch['x'], batch['n']
  one = lambda v, n: jax.lax.fori_loop(
    0, n, lambda i, s: jnp.tanh(s @ p['w']), v
  )
  return jax.vmap(one)(x, n)


def adaptive(p, batch):
  """Until each example is small."""
  return jax.vmap(
    lambda v: jax.lax.while_loop(
      lambda s: jnp.sum(s * s) > 0.05, lambda s: 0.8 * jnp.tanh(s @ p['w']), v
    )
  )(batch['x'])


def of_tokens(p, batch):
  """A loop for each token of each example: two vmaps."""
  twice = np.arange(1, 3)
  x = batch['x'][:, None] * twice[:, None].astype('f')
  n = batch['n'][:, None] // twice
  one = lambda v, n: jax.lax.fori_loop(
    0, n, lambda i, s: jnp.tanh(s @ p['w']), v
  )
  return jax.vmap(jax.vmap(one))(x, n)


def of_constants(p, batch):
  """What is multiplied is not carried."""
  one = lambda v, n: jax.lax.while_loop(
    lambda s: s[0] < n, lambda s: (s[0] + 1, s[1] + v @ p['w']), (0, 0 * v)
  )[1]
  return jax.vmap(one)(batch['x'], batch['n'])


def nested(p, batch):
  """A loop of n steps in a loop of n steps."""

  def one(v, n):
    inner = lambda s: jax.lax.fori_loop(
      0, n, lambda i, s: jnp.tanh(s @ p['w']), s
    )
    return jax.lax.fori_loop(0, n, lambda i, s: inner(s) + 0.1, v)

  return jax.vmap(one)(batch['x'], batch['n'])


def rows_of(fn, x, n, w):
  """Every row that a step of an example that runs multiplies, in float64."""
  rows = []
  x, w = x.astype(np.float64), w.astype(np.float64)

  def steps(v, k):
    for _ in range(k):
      rows.append(v)
      v = np.tanh(v @ w)
    return v

  for v, k in zip(x, n):
    if fn is counted:
      steps(v, k)
    elif fn is adaptive:
      while v @ v > 0.05:
        rows.append(v)
        v = 0.8 * np.tanh(v @ w)
    elif fn is of_tokens:
      steps(v, k)
      steps(2 * v, k // 2)
    elif fn is of_constants:
      rows.extend([v] * k)
    else:
      for _ in range(k):
        v = steps(v, k) + 0.1
  return np.array(rows)


LOOPS = [counted, adaptive, of_tokens, of_constants, nested]


@pytest.mark.parametrize('fn', LOOPS)
def test_only_steps_that_count_are_counted(fn):
  x, n, w = data()
  batch, params = {'x': x, 'n': n}, {'w': w}
  rows = rows_of(fn, x, n, w)
  sites = ur.find_sites(fn, params, batch)
  assert list(sites) == ['w']
  out, moments = jax.jit(ur.capture(fn))(params, batch)
  np.testing.assert_allclose(out, fn(params, batch), rtol=1e-6, atol=1e-7)
  halves = [jax.tree.map(lambda v, h=h: v[h::2], batch) for h in (0, 1)]
  for found in (moments, ur.collect(fn, params, halves, progress=False)):
    assert int(found['w'].count) == len(rows)
    # float32 sums of some fifty rows
    np.testing.assert_allclose(found['w'].mean, rows.mean(0), atol=1e-5)
    np.testing.assert_allclose(
      found['w'].second, references.second_moment(rows), rtol=1e-5, atol=1e-5
    )


def convolved(w, s):
  numbers = ('NWC', 'WIO', 'NWC')
  return jax.lax.conv_general_dilated(
    s[None, None], w, (1,), 'SAME', dimension_numbers=numbers
  )[0, 0]


SIZES = {
  'dot': (lambda w, s: s @ w, (4, 4)),
  'cast': (lambda w, s: s @ w.astype('bfloat16').astype(s.dtype), (4, 4)),
  'transposed': (lambda w, s: w @ s, (4, 4)),
  'heads': (
    lambda w, s: jnp.einsum('dh,hde->e', s.reshape(2, 2), w),
    (2, 2, 4),
  ),
  'conv': (convolved, (3, 4, 4)),
  'parts': (lambda w, s: s @ w[:, :4] + s @ w[:, 4:], (4, 8)),
}


@pytest.mark.parametrize('n', [2, 3, 4])
@pytest.mark.parametrize('name', SIZES)
def test_as_many_examples_as_a_kernel_has_inputs(name, n):
  """An axis of a kernel is not that of examples for its size."""
  f, shape = SIZES[name]
  rng = np.random.default_rng(0)
  x = rng.normal(size=(n, 4)).astype('f')
  w = rng.normal(size=shape).astype('f')
  one = lambda w, v, k: jax.lax.fori_loop(0, k, lambda i, s: f(w, s), v)
  fn = lambda p, b: jax.vmap(one, (None, 0, 0))(p['w'], *b)
  many = np.r_[0, np.full(n - 1, 1)]
  found = ur.capture(fn)({'w': w}, (x, many))[1]['w']
  rows = x[1:].astype(np.float64)
  if name == 'heads':  # (h, d), as the kernel has them
    rows = rows.reshape(-1, 2, 2).transpose(0, 2, 1).reshape(-1, 4)
  if name == 'conv':  # beside what is there is padding
    rows = np.pad(rows, ((0, 0), (4, 4)))
  assert (np.asarray(found.count) == n - 1).all()
  want = np.broadcast_to(rows.sum(0), found.sums.total.shape)
  # float32 sums of at most three rows
  np.testing.assert_allclose(found.sums.total, want, rtol=1e-6, atol=1e-6)
  want = np.broadcast_to(rows.T @ rows, found.sums.second.shape)
  np.testing.assert_allclose(found.sums.second, want, rtol=1e-5, atol=1e-6)


def test_a_kernel_of_each_example_is_an_error_there():
  one = lambda w, v, k: jax.lax.fori_loop(0, k, lambda i, s: s @ w, v)
  fn = lambda p, b: jax.vmap(one)(p['w'], *b)
  params = {'w': np.ones((3, 4, 4), 'f')}
  batch = np.ones((3, 4), 'f'), np.array([0, 2, 1])
  with pytest.raises(ValueError, match="'w' mixes them: the product itself"):
    ur.capture(fn)(params, batch)


@pytest.mark.parametrize('fn', LOOPS)
def test_padding_in_such_a_loop_does_not_count(fn):
  x, n, w = data()
  real = np.arange(B) % 3 > 0
  batch = {'x': x, 'n': n, 'real': real}
  rows = rows_of(fn, x[real], n[real], w)
  found = ur.collect(fn, {'w': w}, [batch], mask='real', progress=False)['w']
  assert int(found.count) == len(rows)
  np.testing.assert_allclose(
    found.second, references.second_moment(rows), rtol=1e-5, atol=1e-5
  )


@pytest.mark.parametrize('fn', LOOPS)
def test_factors_run_in_such_a_loop(fn):
  x, n, w = data()
  batch, params = {'x': x, 'n': n}, {'w': w}
  moments = ur.capture(fn)(params, batch)[1]
  small = ur.factorize(
    params, moments, {'w': 3}, compensate_mean=False, progress=False
  )
  want = fn(ur.merge(small), batch)
  np.testing.assert_allclose(
    ur.low_rank(fn)(small, batch), want, rtol=1e-5, atol=1e-5
  )


def test_a_mask_of_tokens_is_an_error_there():
  x, n, w = data()
  batch = {'x': x, 'n': n, 'real': np.ones((B, 2), bool)}
  with pytest.raises(ValueError, match=r'end apart, and a mask of \(12, 2\)'):
    ur.collect(of_tokens, {'w': w}, [batch], mask='real', progress=False)

"""Inputs and gradients of one row each, against sums in float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import utilized_rank as ur
from utilized_rank.linalg import gram
from utilized_rank.products import convolution

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(0)
# Float32 sums of some hundred rows against float64.
CLOSE = dict(rtol=2e-4, atol=1e-5)


def draw(*shape):
  return RNG.normal(size=shape).astype(np.float32)


def half_square(y, batch):
  """Gradients of it are the outputs themselves."""
  del batch
  return 0.5 * jnp.sum(jnp.square(y), axis=tuple(range(1, y.ndim)))


def sums(x, g):
  """(total, inputs, grads) of rows (n, d) and (n, m)."""
  by_g, by_x = ((v**2).sum(1, keepdims=True) for v in (g, x))
  return (by_g * x).sum(0), (by_g * x).T @ x, (by_x * g).T @ g


def collect(fn, params, batches, **options):
  return ur.collect(
    fn,
    params,
    batches,
    loss=half_square,
    coupled=True,
    progress=False,
    **options,
  )


def check(moment, expected):
  found = moment.coupled
  whole = gram.whole
  got = found.total[..., 0, :], whole(found.inputs), whole(found.grads)
  for have, want in zip(got, expected, strict=True):
    np.testing.assert_allclose(have, want, **CLOSE)


W = draw(5, 4)
X = draw(16, 6, 5)
KERNEL = draw(3, 3, 2, 4)
IMAGES = draw(4, 6, 5, 2)


@pytest.mark.quick
def test_rows_of_a_dense_layer():
  moments = collect(lambda p, x: x @ p['w'], {'w': W}, [X[:8], X[8:]])
  x = X.reshape(-1, 5).astype(np.float64)
  check(moments['w'], sums(x, x @ W))


def test_rows_that_the_output_lists_in_another_order():
  """Batch axes of `dot_general` lead in its output, wherever x has them."""
  fn = lambda p, x: jax.lax.dot_general(
    jnp.broadcast_to(p['w'], (6, 5, 4)), x, (((1,), (2,)), ((0,), (1,)))
  ).transpose(2, 0, 1)
  moments = collect(fn, {'w': W}, [X])
  x = X.reshape(-1, 5).astype(np.float64)
  check(moments['w'], sums(x, x @ W))


@pytest.mark.parametrize('most', [None, 200])
@pytest.mark.parametrize('out', ['NHWC', 'NCHW', 'HNWC'])
def test_patches_of_a_convolution(monkeypatch, most, out):
  """Also where they are read a few at a time."""

  if most is not None:
    monkeypatch.setattr(convolution, '_MOST_PATCHES', most)

  def fn(p, x):
    y = jax.lax.conv_general_dilated(
      x, p['w'], (2, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', out)
    )
    return jnp.moveaxis(y, out.index('N'), 0)

  moments = collect(fn, {'w': KERNEL}, [IMAGES])
  padded = np.pad(IMAGES.astype(np.float64), [(0, 0), (0, 1), (1, 1), (0, 0)])
  rows = np.stack(
    [
      padded[n, i : i + 3, j : j + 3].reshape(-1)
      for n in range(4)
      for i in (0, 2, 4)
      for j in range(5)
    ]
  )
  check(moments['w'], sums(rows, rows @ KERNEL.reshape(18, 4)))


def test_rows_that_choose_their_kernel():
  experts, chosen = draw(3, 5, 4), RNG.integers(0, 3, size=16)

  def fn(p, batch):
    order = jnp.argsort(batch['chosen'])
    sizes = jnp.bincount(batch['chosen'], length=3)
    y = jax.lax.ragged_dot(batch['x'][order], p['w'], sizes)
    return jnp.zeros_like(y).at[order].set(y)

  x = X[:, 0]
  moments = collect(fn, {'w': experts}, [{'x': x, 'chosen': chosen}])
  expected = [
    sums(x[chosen == i].astype(np.float64), x[chosen == i] @ w)
    for i, w in enumerate(experts)
  ]
  check(moments['w'], [np.stack(v) for v in zip(*expected, strict=True)])


def test_layers_of_a_scan_and_a_mask_of_tokens():
  stack = draw(3, 5, 5) / 2
  real = np.arange(6) < RNG.integers(2, 7, size=16)[:, None]

  def fn(p, batch):
    step = lambda h, w: (h @ w, None)
    return jax.lax.scan(step, batch['x'], p['w'])[0]

  batch = {'x': X, 'real': real}
  moments = collect(fn, {'w': stack}, [batch], mask='real')
  h = [X[real].astype(np.float64)]
  for w in stack:
    h.append(h[-1] @ w)
  g = h[-1]
  expected = []
  for w, x in zip(stack[::-1], h[-2::-1], strict=True):
    expected.append(sums(x, g))
    g = g @ w.T
  check(moments['w'], [np.stack(v) for v in zip(*expected[::-1], strict=True)])


def test_saved_loaded_merged_and_resumed(tmp_path):
  fn, params = lambda p, x: x @ p['w'], {'w': W}
  whole = collect(fn, params, [X])
  one, two = (collect(fn, params, [x]) for x in (X[:8], X[8:]))
  ur.save(tmp_path / 'moments', ur.merge_moments(one, two))
  found = ur.load(tmp_path / 'moments')['w'].coupled
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, **CLOSE),
    found,
    whole['w'].coupled,
  )
  without = ur.collect(fn, params, [X], loss=half_square, progress=False)
  with pytest.raises(ValueError, match='inputs and gradients together'):
    ur.merge_moments(whole, without)


def test_it_needs_a_loss_and_the_inputs():
  fn, params = lambda p, x: x @ p['w'], {'w': W}
  with pytest.raises(ValueError, match='coupled=True .* give loss='):
    ur.collect(fn, params, [X], coupled=True, progress=False)
  with pytest.raises(ValueError, match='not from_outputs='):
    collect(fn, params, [X], from_outputs=[('.*', True)])

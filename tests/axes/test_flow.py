"""Where examples and tokens are, against what values depend on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import utilized_rank as ur
from utilized_rank.axes import where
from utilized_rank.axes.flow import Flow
from utilized_rank.walk import tracing

B, T, D = 3, 4, 6


def apart(fn, shape, tokens=None):
  """What is known of `fn(params, x)` at its output."""
  x = np.zeros(shape, np.float32)
  params = np.zeros((D, D), np.float32)
  traced = tracing.trace(fn, params, (x,), {})
  flow = Flow(shape[0])
  (out,) = flow.run(
    traced.jaxpr, [where.plain((D, D)), where.batch_array(shape, tokens)]
  )
  return out


def conv(x, groups=1):
  kernel = jnp.ones((3, 3, x.shape[-1] // groups, 4))
  return jax.lax.conv_general_dilated(
    x,
    kernel,
    (1, 1),
    'SAME',
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    feature_group_count=groups,
  )


def pooled(x):
  return jax.lax.reduce_window(
    x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), 'VALID'
  )


def picked(x):
  places = jnp.argmax(x, -1)[..., None]
  return jnp.take_along_axis(x, places, axis=-1)


def windows(x):
  """Swin's: the examples' axis joined with another behind a transposition."""
  x = x.reshape(len(x), 2, T // 2, 2, T // 2, D).transpose(0, 1, 3, 2, 4, 5)
  return jax.nn.softmax(x.reshape(-1, T * T // 4, D), axis=1)


IMAGE, ROWS = (B, T, T, D), (B, T, D)
APART = {
  'convolution': (conv, IMAGE),
  'grouped convolution': (lambda x: conv(x, 2), IMAGE),
  'pooling': (pooled, IMAGE),
  'windows': (windows, IMAGE),
  'class token': (
    lambda x: jnp.concatenate([jnp.zeros((B, 1, D)), x], 1),
    ROWS,
  ),
  'lookup along features': (picked, ROWS),
  'layer norm': (lambda x: (x - x.mean(-1, keepdims=True)) / x.std(), ROWS),
  'sort of tokens': (lambda x: jnp.sort(x, 1), ROWS),
  'top k': (lambda x: jax.lax.top_k(x, 2)[0], ROWS),
  'roll of tokens': (lambda x: jnp.roll(x, 1, axis=1), ROWS),
  'padding of tokens': (lambda x: jnp.pad(x, ((0, 0), (1, 1), (0, 0))), ROWS),
  'cache': (lambda x: jnp.zeros((B, 9, D)).at[:, 2:6].set(x), ROWS),
  'split': (lambda x: jnp.concatenate(jnp.split(x, 2, -1)[::-1], -1), ROWS),
  'vmap': (jax.vmap(lambda x: x @ x.T), ROWS),
  'branch': (
    lambda x: jax.lax.cond(True, jnp.sin, lambda x: x[:, ::-1], x),
    ROWS,
  ),
  'loop': (
    lambda x: jax.lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h + i), x),
    ROWS,
  ),
  'rows of examples': (lambda x: x.reshape(-1, D).swapaxes(0, 1), ROWS),
  'position': (lambda x: x + jnp.arange(B)[:, None, None], ROWS),
}
# x.std() is of the whole batch.
MIXED = {'layer norm'}


@pytest.mark.parametrize('name', APART)
def test_examples_are_apart_where_it_says_so(name):
  """Changing an example changes what is along it, and nothing else."""
  fn, shape = APART[name]
  found = apart(lambda params, x: fn(x), shape)
  if name in MIXED:
    assert found.mixed == 'reduce_sum' and not found.has(where.EXAMPLE)
    return
  assert found.mixed is None and found.is_along(where.EXAMPLE, B)
  x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
  before = np.asarray(fn(x))
  for i in range(B):
    other = x.copy()
    other[i] += np.random.default_rng(1).normal(size=shape[1:])
    changed = np.asarray(fn(other)) != before
    assert changed.any()
    assert not (changed & (number(found) != i)).any()


def number(found):
  """For every element of a value, which example it is of."""
  out = np.zeros([p.size for p in found.pieces], int)
  for k, piece in enumerate(found.pieces):
    if piece.name == where.EXAMPLE:
      steps = piece.step * np.arange(piece.size)
      out += steps.reshape([-1 if j == k else 1 for j in range(out.ndim)])
  return out.reshape(
    [int(np.prod([p.size for p in axis])) for axis in found.axes]
  )


TOKENS = {
  'attention': (lambda x: jax.nn.softmax(x @ x.swapaxes(1, 2)) @ x, None, True),
  'transposed': (lambda x: x.swapaxes(1, 2), None, True),
  'flat': (lambda x: x.reshape(B * T, D), None, True),
  'first': (lambda x: x[:, 0], 0, False),
  'last': (lambda x: x[:, -1], T - 1, False),
  'mean': (lambda x: x.mean(1), None, False),
  'shorter': (lambda x: x[:, 1:], None, False),
  'reversed': (lambda x: x[:, ::-1], None, False),
}


@pytest.mark.parametrize('name', TOKENS)
def test_tokens_are_followed(name):
  fn, token, along = TOKENS[name]
  found = apart(lambda params, x: fn(x), ROWS, T)
  assert found.mixed is None and found.token == token
  assert found.is_along(where.TOKEN, T) == along


@pytest.mark.quick
@pytest.mark.parametrize(
  'sizes', [(12,), (3, 4), (2, 6), (6, 2), (2, 2, 3), (1, 12, 1)]
)
def test_regrouped_pieces_count_as_a_reshape_does(sizes):
  pieces = [where.Piece(12, where.EXAMPLE, 1)]
  found = where.Where(where.regrouped(pieces, sizes))
  np.testing.assert_array_equal(number(found), np.arange(12).reshape(sizes))
  assert (
    where.regrouped([where.Piece(4), where.Piece(3, 'x', 1)], (6, 2)) is None
  )


def test_a_masked_convolution_counts_patches_of_real_examples():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(5, 4, 4, 2)).astype(np.float32)
  params = {'w': rng.normal(size=(3, 3, 2, 4)).astype(np.float32)}
  fn = lambda p, x: jax.lax.conv_general_dilated(
    x, p['w'], (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
  )
  real = np.array([1, 0, 1, 1, 0])
  want = ur.collect(fn, params, [x[real > 0]], progress=False)
  got = ur.collect(fn, params, [x], mask=lambda batch: real, progress=False)
  assert got['w'].count == want['w'].count == 3 * 16
  b = np.asarray(want['w'].second)
  np.testing.assert_allclose(got['w'].second, b, atol=1e-6 * np.abs(b).max())

"""What our trained factors are measured by: AA-SVD, written from its paper."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.networks import minilm
from benchmarks.shared import aa_svd
from benchmarks.shared import svd_llm

pytestmark = pytest.mark.slow

N, D, M, RANK = 200, 8, 11, 3


def problem(rng, is_shifted):
  """Inputs of the dense and of the compressed network, and a kernel."""
  x = rng.normal(size=(N, D)) @ rng.normal(size=(D, D))
  off = rng.normal(size=(N, D)) + 0.3 * x @ rng.normal(size=(D, D))
  return x, x + is_shifted * off, rng.normal(size=(D, M))


def factors(x, x_hat, w, rank=RANK):
  white = svd_llm.whitening(x_hat.T @ x_hat)
  return aa_svd.factors(w, white, x_hat.T @ x, rank)


def error(x, x_hat, w, other):
  """From the rows themselves."""
  return np.sum((x @ w - x_hat @ other) ** 2)


def truncated(w, rank=RANK):
  u, s, v = np.linalg.svd(w, full_matrices=False)
  return u[:, :rank] * s[:rank] @ v[:rank]


@pytest.mark.parametrize('seed', range(3))
def test_no_pair_has_less_anchored_error(seed):
  rng = np.random.default_rng(seed)
  x, x_hat, w = problem(rng, True)
  a, b = factors(x, x_hat, w)
  assert a.shape == (D, RANK) and b.shape == (RANK, M)
  least = error(x, x_hat, w, a @ b)
  # By another way: what regression leaves, and the outputs' own truncation.
  full = np.linalg.lstsq(x_hat, x @ w)[0]
  lost = np.linalg.svd(x_hat @ full, compute_uv=False)[RANK:]
  optimum = error(x, x_hat, w, full) + np.sum(lost**2)
  np.testing.assert_allclose(least, optimum, rtol=1e-10)  # of float64
  white = svd_llm.whitening(x_hat.T @ x_hat)
  unanchored = np.matmul(*svd_llm.factors(w, white, RANK))
  for other in (truncated(w), truncated(full), unanchored):
    assert least < 0.99 * error(x, x_hat, w, other)
  for scale in (1e-3, 1e-1):
    for _ in range(20):
      near = [f + scale * rng.normal(size=f.shape) for f in (a, b)]
      assert least < error(x, x_hat, w, np.matmul(*near))


def test_without_a_shift_it_is_the_whitened_svd():
  x, _, w = problem(np.random.default_rng(0), False)
  a, b = factors(x, x, w)
  theirs = svd_llm.factors(w, svd_llm.whitening(x.T @ x), RANK)
  # Each pair of singular vectors has a sign of its own.
  np.testing.assert_allclose(a @ b, np.matmul(*theirs), atol=1e-10)


def encoder(rng, width=24, hidden=40, depth=2):
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  dense = lambda d, m: {'kernel': draw(d, m) / d**0.5, 'bias': 0.1 * draw(m)}
  norm = lambda: {'scale': 1 + 0.1 * draw(width), 'bias': 0.1 * draw(width)}
  layer = lambda: {
    **{n: dense(width, width) for n in ('query', 'key', 'value', 'output')},
    'attention_norm': norm(),
    'up': dense(width, hidden),
    'down': dense(hidden, width),
    'norm': norm(),
  }
  table = {'word': draw(50, width), 'position': draw(6, width)}
  table |= {'type': draw(1, width), 'norm': norm()}
  layers = {f'layer_{i}': layer() for i in range(depth)}
  return {'embeddings': table, **layers}


def test_layers_are_cut_one_behind_the_other_and_trained():
  rng = np.random.default_rng(0)
  params = encoder(rng)
  batches = rng.integers(1, 50, (2, 32, 6))
  tokens = batches[0]

  def outputs(tree):
    x, real = minilm.embedded(tree, tokens), minilm.is_real(tokens)
    for name in minilm.layers(tree):
      x = aa_svd._layer(tree[name], x, real)
    return x

  dense = outputs(params)
  off = lambda tree: float(jnp.mean((outputs(tree) - dense) ** 2))
  cut = aa_svd.compress(params, batches, 0.5, updates=0)
  trained = aa_svd.compress(params, batches, 0.5, updates=40, rate=1e-2)
  assert off(trained) < 0.7 * off(cut)
  for tree in (cut, trained):
    for name in minilm.layers(params):
      for at, shape in [('query', (24, 24)), ('down', (40, 24))]:
        pair = tree[name][at]['kernel']
        rank = int(0.5 * np.prod(shape) / sum(shape))
        assert pair.a.shape == (shape[0], rank)
        assert pair.b.shape == (rank, shape[1])
    embeddings = (of['embeddings'] for of in (tree, params))
    jax.tree.map(np.testing.assert_array_equal, *embeddings)
  scale = lambda tree: tree['layer_0']['norm']['scale']
  assert np.array_equal(scale(cut), scale(params))
  assert not np.array_equal(scale(trained), scale(params))

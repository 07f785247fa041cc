"""Trees trained end to end on the dense outputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references

import utilized_rank as ur
from utilized_rank.moments import masks
from utilized_rank.refit import descent
from utilized_rank.refit.distill import hold_out

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(0)


def draw(*shape):
  return RNG.normal(size=shape).astype(np.float32) / shape[0] ** 0.5


def mlp(p, x):
  return jnp.tanh(x @ p['w'] + p['b']) @ p['v'] * p['scale']


PARAMS = {
  'w': draw(6, 9),
  'b': draw(9),
  'v': draw(9, 4),
  'scale': np.exp(draw(4)),
}
RANKS = {'w': 2}


def data(count=10, size=24, seed=0):
  rng = np.random.default_rng(seed)
  rows = references.correlated_rows(rng, count * size, 6, 0.7, 0.5)
  return np.split(rows.astype(np.float32), count)


def small(fn=mlp, params=PARAMS, ranks=RANKS, **options):
  moments = ur.collect(fn, params, data(), progress=False)
  return ur.factorize(params, moments, ranks, progress=False, **options)


def distance(fn, params, tree, x):
  run = ur.low_rank(fn)
  outputs = (np.asarray(v, np.float64) for v in (run(tree, x), fn(params, x)))
  return float(np.mean(np.square(np.subtract(*outputs))))


def kinds(tree):
  return jax.tree.map(lambda v: (np.shape(v), v.dtype), tree)


@pytest.mark.parametrize(
  'divergence', [ur.squared_error, ur.kl_divergence()], ids=['share', 'nats']
)
def test_what_is_exact_is_not_trained(divergence, monkeypatch):
  begun = []
  update = descent.update
  monkeypatch.setattr(
    descent, 'update', lambda *a: begun.append(1) or update(*a)
  )
  run = lambda params, x: mlp(params, x)  # nothing is compiled for it yet
  options = dict(divergence=divergence, steps=3, progress=False)
  tree = small(ranks={'w': 6})  # all that six features have
  assert ur.distill(run, PARAMS, tree, data(), **options) is tree and not begun
  ur.distill(run, PARAMS, small(), data(), **options)
  assert begun


def test_updates_are_those_of_adam_in_float64():
  value, gradients = draw(3), [draw(3) for _ in range(4)]
  state = descent.start(jnp.asarray(value), jnp.float32(2.0))
  want, m, v = value.astype(np.float64), 0.0, 0.0
  for i, g in enumerate(gradients, 1):
    state = descent.update(state, jnp.asarray(g), i, 0.1)
    m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * np.square(g, dtype=np.float64)
    ratio = m / (1 - 0.9**i) / np.sqrt(v / (1 - 0.99**i))
    want = want - 0.2 * ratio
  # Four updates in float32.
  np.testing.assert_allclose(state.values, want, rtol=1e-5, atol=1e-6)
  stuck = descent.update(state, jnp.array([np.nan, 1, 1], 'f'), 5, 0.0)
  assert np.all(np.isfinite(stuck.mean))


@pytest.mark.parametrize('size', [1.0, 1e-8, 1e-16, 1e-25, 1e-38])
def test_no_gradient_is_too_small_to_be_divided_by(size):
  state = descent.start(jnp.zeros(2), jnp.float32(1.0))
  for i in range(1, 20):
    gradient = jnp.array([size, -size if i % 9 else 5 * size], jnp.float32)
    new = descent.update(state, gradient, i, 0.1)
    # 2.4 rates, in float32.
    assert np.all(np.abs(new.values - state.values) <= 0.24)
    state = new


def test_a_linear_function_comes_to_the_best_of_its_rank():
  """The closed form: U U^T y of the outputs' own singular vectors."""
  fn = lambda p, x: x @ p['w']
  params, (x,) = {'w': draw(6, 5)}, data(count=1, size=64)
  moments = ur.collect(fn, params, [x], progress=False)
  start = ur.factorize(
    params, moments, {'w': 2}, method='weight', compensate_mean=False,
    gauge=None, progress=False,
  )  # fmt: skip
  near = ur.distill(
    fn, params, start, [x] * 5, steps=400, learning_rate=0.03, batch_size=64,
    mixup=False, progress=False,
  )  # fmt: skip
  # Of mixtures another pair is best: their mean weighs more.
  s = np.linalg.svd(x.astype(np.float64) @ params['w'], compute_uv=False)
  best = np.sum(s[2:] ** 2) / (64 * 5)
  first, last = (distance(fn, params, tree, x) for tree in (start, near))
  assert first > 1.05 * best
  # Adam near its end; float32.
  assert best * (1 - 1e-5) < last < best + 0.02 * (first - best)


@pytest.mark.parametrize('gauge', [None, 'identity'])
def test_outputs_come_nearer_on_other_data(gauge):
  start = small(gauge=gauge)
  near = ur.distill(
    mlp, PARAMS, start, data(), steps=150, learning_rate=0.03, progress=False
  )
  x = np.concatenate(data(seed=1))
  before, after = (distance(mlp, PARAMS, t, x) for t in (start, near))
  assert after < 0.9 * before
  assert kinds(near) == kinds(start)  # orders of identity blocks among them
  assert near['v'] is start['v']  # a dense kernel
  assert np.any(near['b'] != start['b'])
  assert np.all(near['scale'] > 0)


def test_what_the_examples_held_out_do_not_gain_by_is_not_taken():
  x = np.concatenate(data())
  half = np.arange(6) < 3
  train, other = x[:96] * half, x[96:120] * ~half
  start = small()
  batches = [*np.split(train, 4), other]
  same = ur.distill(
    mlp, PARAMS, start, batches, steps=50, learning_rate=0.1, mixup=False,
    progress=False,
  )  # fmt: skip
  assert same is start


def test_too_few_examples_to_judge_train_nothing():
  start = small()
  assert ur.distill(mlp, PARAMS, start, data(count=1)) is start


def test_half_precision_is_trained_in_float32():
  params = jax.tree.map(lambda v: v.astype(jnp.bfloat16), PARAMS)
  fn = lambda p, x: mlp(jax.tree.map(lambda v: v.astype(x.dtype), p), x)
  start = small(fn, params)
  near = ur.distill(
    fn, params, start, data(), steps=100, learning_rate=0.03, progress=False
  )
  x = np.concatenate(data(seed=1))
  assert distance(fn, params, near, x) < distance(fn, params, start, x)
  assert kinds(near) == kinds(start)
  assert near['w'].a.dtype == jnp.bfloat16


def test_padding_trains_nothing():
  fn = lambda p, x: jnp.tanh(x @ p['w'] + p['b']) @ p['v']
  params = {k: PARAMS[k] for k in 'wbv'}
  start = small(fn, params)
  near = []
  for fill in (0.0, 5.0):
    batches = []
    for batch in data(count=5, size=64):
      x = batch.reshape(16, 4, 6).copy()
      mask = np.arange(4) < np.arange(16)[:, None] % 4 + 1
      x[~mask] = fill
      batches.append((x, mask))
    near.append(
      ur.distill(
        masks.hidden(fn),
        params,
        start,
        batches,
        divergence=masks.of_batch(ur.squared_error),
        steps=20,
        progress=False,
      )
    )
  assert np.any(near[0]['b'] != start['b'])
  for one, other in zip(*map(jax.tree.leaves, near), strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_trees_of_modules():
  nnx = pytest.importorskip('flax.nnx')
  eqx = pytest.importorskip('equinox')
  x = data()
  linear = lambda i: nnx.Linear(6, 6, rngs=nnx.Rngs(i))
  graph, state = nnx.split(nnx.Sequential(linear(0), nnx.tanh, linear(1)))
  call = lambda state, x: nnx.merge(graph, state)(x)
  module = eqx.nn.MLP(6, 6, 6, 1, jnp.tanh, key=jax.random.key(0))
  for fn, params in (
    (call, state),
    (lambda module, x: jax.vmap(module)(x), module),
  ):
    moments = ur.collect(fn, params, x, progress=False)
    start = ur.factorize(
      params, moments, dict.fromkeys(moments, 2), progress=False
    )
    near = ur.distill(
      fn, params, start, x, steps=60, learning_rate=0.03, progress=False
    )
    assert jax.tree.structure(near) == jax.tree.structure(start)
    rows = np.concatenate(data(seed=1))
    after = distance(fn, params, near, rows)
    assert after < distance(fn, params, start, rows)


@pytest.mark.parametrize(('count', 'held'), [(11, 2), (5, 1), (3, 3)])
def test_a_fifth_is_held_out(count, held):
  batches = data(count=count, size=10)
  training, judging = hold_out(batches)
  assert len(judging) == held
  both = np.concatenate([*training, *judging])
  every = np.concatenate(batches)
  assert np.array_equal(np.unique(both, axis=0), np.unique(every, axis=0))
  assert len(both) == len(every)


def test_refusals():
  start = small()
  for wrong in (dict(steps=0), dict(learning_rate=0), dict(batch_size=0)):
    with pytest.raises(ValueError, match='must be positive'):
      ur.distill(mlp, PARAMS, start, data(), **wrong)
  with pytest.raises(ValueError, match='at least one batch'):
    ur.distill(mlp, PARAMS, start, [])

  def loop(p, x):
    step = lambda s: (s[0] + 1, jnp.tanh(s[1] @ p['w'] + p['b']))
    return jax.lax.while_loop(lambda s: s[0] < 1, step, (0, x))[1]

  params = {'w': draw(6, 6), 'b': draw(6)}
  start = small(loop, params)
  with pytest.raises(ValueError, match='no reverse derivative'):
    ur.distill(loop, params, start, data(), progress=False)

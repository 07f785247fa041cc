"""Moments of the loss's gradient, against numpy and plain derivatives."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np
import pytest

import utilized_rank as ur
from utilized_rank.moments.gradients import gradient_sums


def loss(outputs, batch):
  return -jnp.take_along_axis(
    jax.nn.log_softmax(outputs), batch['y'][:, None], 1
  )[:, 0]


class Block(nn.Module):
  @nn.compact
  def __call__(self, x, _):
    h = nn.MultiHeadDotProductAttention(num_heads=2, name='attention')(x)
    return x + nn.tanh(nn.Dense(x.shape[-1], name='dense')(h)), None


class Model(nn.Module):
  scan: bool

  @nn.compact
  def __call__(self, x):
    x = nn.Conv(6, (3,), name='conv')(x)
    if self.scan:
      stack = nn.scan(
        nn.remat(Block),
        variable_axes={'params': 0},
        split_rngs={'params': True},
        length=2,
      )
      x, _ = stack(name='blocks')(x, None)
    else:
      for i in range(2):
        x, _ = Block(name=f'block_{i}')(x, None)
    return nn.Dense(3, name='head')(x.mean(1))


@pytest.fixture(scope='module')
def batch():
  rng = np.random.default_rng(0)
  return {
    'x': jnp.asarray(rng.normal(size=(7, 5, 4)), jnp.float32),
    'y': jnp.asarray(rng.integers(0, 3, 7)),
  }


def perturbed_moment(fn, params, batch, path, shape):
  """g g^T summed, g from adding zeros to the output of one flax module."""
  m = shape[-1]

  def total(zeros):
    def add(next_fun, args, kwargs, context):
      out = next_fun(*args, **kwargs)
      if context.module.path == path and context.method_name == '__call__':
        return out + zeros
      return out

    with nn.intercept_methods(add):
      return jnp.sum(loss(fn(params, batch), batch))

  g = np.asarray(jax.grad(total)(jnp.zeros(shape)), np.float64)
  g = g.reshape(-1, m) if len(shape) == 3 else g.reshape(-1, shape[-2] * m)
  return g.T @ g


@pytest.mark.parametrize(
  'name, module, shape',
  [
    ('conv', ('conv',), (7, 5, 6)),
    (
      'block_0/attention/query',
      ('block_0', 'attention', 'query'),
      (7, 5, 2, 3),
    ),
    ('block_1/attention/out', ('block_1', 'attention', 'out'), (7, 5, 6)),
    ('block_1/dense', ('block_1', 'dense'), (7, 5, 6)),
  ],
)
def test_gradient_moments_equal_perturbation(batch, name, module, shape):
  model = Model(scan=False)
  params = model.init(jax.random.key(0), batch['x'])
  fn = lambda p, b: model.apply(p, b['x'])
  moments = ur.collect(fn, params, [batch], loss=loss, progress=False)
  path = f'params/{name}/kernel'
  want = perturbed_moment(fn, params, batch, module, shape)
  rows = int(moments[path].count)
  np.testing.assert_allclose(
    moments[path].grad_second * rows, want, atol=1e-5 * np.abs(want).max()
  )
  assert int(moments[path].examples) == 7
  assert float(moments[path].rows_per_example) == rows / 7


def test_scan_with_remat_gives_the_loop_s_moments(batch):
  model = Model(scan=True)
  params = model.init(jax.random.key(0), batch['x'])
  loop = {
    'params': {k: v for k, v in params['params'].items() if k != 'blocks'}
  }
  for i in range(2):
    loop['params'][f'block_{i}'] = jax.tree.map(
      lambda a, i=i: a[i], params['params']['blocks']
    )
  stacked = ur.collect(
    lambda p, b: model.apply(p, b['x']),
    params,
    [batch],
    loss=loss,
    progress=False,
  )
  plain = ur.collect(
    lambda p, b: Model(scan=False).apply(p, b['x']),
    loop,
    [batch],
    loss=loss,
    progress=False,
  )
  for path in stacked:
    if 'blocks' in path:
      want = np.stack(
        [
          plain[path.replace('blocks', f'block_{i}')].grad_second
          for i in range(2)
        ]
      )
    else:
      want = plain[path].grad_second
    np.testing.assert_allclose(
      stacked[path].grad_second, want, atol=1e-5 * np.abs(want).max()
    )


def test_batches_add_up(batch):
  model = Model(scan=True)
  params = model.init(jax.random.key(0), batch['x'])
  fn = lambda p, b: model.apply(p, b['x'])
  whole = ur.collect(fn, params, [batch], loss=loss, progress=False)
  parts = [
    jax.tree.map(lambda a: a[:4], batch),
    jax.tree.map(lambda a: a[4:], batch),
  ]
  split = ur.collect(fn, params, parts, loss=loss, progress=False)
  both = ur.merge_moments(
    *(ur.collect(fn, params, [p], loss=loss, progress=False) for p in parts)
  )
  for path in whole:
    want = whole[path].grad_second
    for other in (split, both):
      np.testing.assert_allclose(
        other[path].grad_second, want, atol=2e-6 * np.abs(want).max()
      )
  without = ur.collect(fn, params, [batch], progress=False)
  assert without[path].grad_second is None
  with pytest.raises(ValueError, match='gradient moments'):
    ur.merge_moments(whole, without)


def test_a_loss_that_is_no_number_per_example_is_refused(batch):
  fn = lambda p, b: b['x'].reshape(len(b['x']), -1) @ p
  with pytest.raises(ValueError, match=r'one number per example.*, got \(\)'):
    ur.collect(
      fn,
      jnp.ones((20, 3)),
      [batch],
      progress=False,
      loss=lambda o, b: loss(o, b).mean(),
    )


def test_a_gradient_that_is_not_finite_names_the_kernel(batch):
  fn = lambda p, b: b['x'].reshape(len(b['x']), -1) @ p['w']
  bad = lambda o, b: jnp.sqrt(o[:, 0] * 0)
  with pytest.raises(FloatingPointError, match="gradient at.*'w'.*batch 0"):
    ur.collect(fn, {'w': jnp.ones((20, 3))}, [batch], loss=bad, progress=False)


def test_sampled_labels_give_the_true_fisher():
  """For one softmax layer E[g g^T] = diag(p) - p p^T, known in closed form."""
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(4000, 3)), jnp.float32)
  w = jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)
  moments = ur.collect(
    lambda p, b: b @ p['w'],
    {'w': w},
    np.split(x, 8),
    loss=ur.sampled_cross_entropy(),
    progress=False,
  )
  p = np.asarray(jax.nn.softmax(x @ w), np.float64)
  want = np.diag(p.mean(0)) - p.T @ p / len(p)
  # 4,000 draws: a standard error of about 0.5 / sqrt(4000).
  np.testing.assert_allclose(moments['w'].grad_second, want, atol=0.03)
  again = gradient_sums(
    lambda p, b: b @ p['w'],
    ur.sampled_cross_entropy(seed=1),
    {'w': moments['w'].layout},
  )({'w': w}, x)[0]['w']
  first = np.asarray(moments['w'].grad_second) * 4000
  assert not np.array_equal(first, *again)


@pytest.mark.parametrize(
  'form', [np.float32, jnp.bfloat16, np.int8, np.uint8, bool, np.float64]
)
def test_an_example_draws_the_same_labels_in_any_batch(form):
  """One batch on all devices, and uneven batches on one."""
  rng = np.random.default_rng(0)
  data = {
    'x': jnp.asarray(rng.normal(size=(64, 3)), jnp.float32),
    'other': (20 * rng.normal(size=(64, 2, 5))).astype(form),
  }
  fn = lambda p, b: b['x'] @ p['w']
  params = {'w': jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)}
  run = lambda batches, **how: ur.collect(
    fn,
    params,
    batches,
    loss=ur.sampled_cross_entropy(),
    progress=False,
    **how,
  )
  whole = run([data])['w'].grad_second
  cuts = [7, 8, 30]
  apart = [
    dict(zip(data, parts, strict=True))
    for parts in zip(*(np.split(v, cuts) for v in data.values()), strict=True)
  ]
  one = Mesh(np.array(jax.devices()[:1]), ('one',))
  again = run(apart, mesh=one)['w'].grad_second
  # Sums of 64 in another order.
  np.testing.assert_allclose(again, whole, rtol=1e-5, atol=1e-6)
  # And examples do not share draws.
  same = {**data, 'x': jnp.ones_like(data['x'])}
  p = np.asarray(jax.nn.softmax(fn(params, same)), np.float64)
  want = np.diag(p[0]) - np.outer(p[0], p[0])
  np.testing.assert_allclose(run([same])['w'].grad_second, want, atol=0.3)

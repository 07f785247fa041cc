"""Rewritten NNX modules are trained as Flax's documentation trains modules."""

import warnings

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import utilized_rank as ur

X = jax.random.normal(jax.random.key(0), (96, 12))


class MLP(nnx.Module):
  def __init__(self, rngs):
    self.up = nnx.Linear(12, 16, rngs=rngs)
    self.norm = nnx.BatchNorm(16, use_running_average=True, rngs=rngs)
    self.down = nnx.Linear(16, 8, use_bias=False, rngs=rngs)

  def __call__(self, x):
    return self.down(nnx.gelu(self.norm(self.up(x))))


class Conv(nnx.Module):
  def __init__(self, rngs):
    self.conv = nnx.Conv(3, 8, (2, 2), padding='VALID', rngs=rngs)
    self.head = nnx.Linear(8, 8, rngs=rngs)

  def __call__(self, x):
    return self.head(nnx.relu(self.conv(x.reshape(-1, 2, 2, 3)))[:, 0, 0])


class Attention(nnx.Module):
  def __init__(self, rngs):
    self.attention = nnx.MultiHeadAttention(
      2, 4, 8, decode=False, deterministic=True, rngs=rngs
    )
    self.head = nnx.Linear(4, 8, rngs=rngs)

  def __call__(self, x):
    return self.head(self.attention(x.reshape(-1, 3, 4)).mean(1))


class Tied(nnx.Module):
  def __init__(self, rngs):
    self.a = nnx.Linear(12, 12, rngs=rngs)
    self.b = nnx.Linear(12, 12, rngs=rngs)
    self.b.kernel = self.a.kernel
    self.head = nnx.Linear(12, 8, rngs=rngs)

  def __call__(self, x):
    return self.head(self.b(jnp.tanh(self.a(x))))


def run(module, x):
  return module(x)


def rewritten(cls, **how):
  model = cls(nnx.Rngs(0))
  with warnings.catch_warnings():
    warnings.simplefilter('ignore', UserWarning)
    moments = ur.collect(run, model, [X], progress=False)
  ranks = {path: 2 for path in moments}
  return ur.factorize(model, moments, ranks, progress=False, **how)


def loss(apply, target):
  return lambda module: jnp.mean((apply(module, X) - target) ** 2)


@pytest.mark.parametrize('gauge', [None, 'identity'])
@pytest.mark.parametrize('cls', [nnx.Linear, MLP, Conv, Attention, Tied])
def test_optimizer(cls, gauge):
  make = (lambda rngs: cls(12, 8, rngs=rngs)) if cls is nnx.Linear else cls
  small, target = rewritten(make, gauge=gauge), make(nnx.Rngs(1))(X)
  of = loss(ur.low_rank(run), target)
  optimizer = nnx.Optimizer(small, optax.adam(1e-2), wrt=nnx.Param)

  @nnx.jit
  def step(module, optimizer):
    value, grads = nnx.value_and_grad(of)(module)
    optimizer.update(module, grads)
    return value

  values = [float(step(small, optimizer)) for _ in range(8)]
  assert values[-1] < values[0] and np.all(np.isfinite(values))
  assert ur.count_params(small) < ur.count_params(make(nnx.Rngs(0)))


@pytest.mark.parametrize(
  'transform',
  [
    optax.sgd(1e-2, momentum=0.9),
    optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2)),
    optax.lion(1e-3),
  ],
)
def test_steps_are_those_of_optax_on_the_factors(transform):
  small, target = rewritten(MLP), MLP(nnx.Rngs(1))(X)
  of = loss(ur.low_rank(run), target)
  # The functional form: the same tree, its numbers moved by optax itself.
  graph, params, rest = nnx.split(small, nnx.Param, ...)
  pure = nnx.as_pure(params)

  def functional(pure):
    return of(nnx.merge(graph, pure, rest))

  state = transform.init(pure)
  optimizer = nnx.Optimizer(small, transform, wrt=nnx.Param)
  for _ in range(4):
    value, grads = nnx.value_and_grad(of)(small)
    optimizer.update(small, grads)
    right, right_grads = jax.value_and_grad(functional)(pure)
    updates, state = transform.update(right_grads, state, pure)
    pure = optax.apply_updates(pure, updates)
    np.testing.assert_allclose(value, right, rtol=1e-5)
  for one, other in zip(
    jax.tree.leaves(nnx.state(small, nnx.Param)),
    jax.tree.leaves(pure),
    strict=True,
  ):
    # The same float32 operations; lion's signs have no rounding at all.
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_gradients_are_those_of_the_pair():
  linear = lambda rngs: nnx.Linear(12, 8, rngs=rngs)
  small, target = rewritten(linear), linear(nnx.Rngs(1))(X)
  value, grads = nnx.value_and_grad(loss(ur.low_rank(run), target))(small)
  x, y = (np.asarray(v, np.float64) for v in (X, target))
  a, b = (np.asarray(v, np.float64) for v in (small.kernel.a, small.kernel.b))
  e = x @ a @ b + np.asarray(small.bias, np.float64) - y
  e *= 2 / e.size
  for found, right in (
    (grads['kernel']['a'], x.T @ e @ b.T),
    (grads['kernel']['b'], a.T @ x.T @ e),
    (grads['bias'], e.sum(0)),
  ):
    np.testing.assert_allclose(found, right, rtol=1e-4, atol=1e-6)


def test_tied_kernels_stay_tied():
  small, target = rewritten(Tied), Tied(nnx.Rngs(1))(X)
  of = loss(ur.low_rank(run), target)
  optimizer = nnx.Optimizer(small, optax.adam(1e-2), wrt=nnx.Param)
  before = np.asarray(small.a.kernel.a)
  for _ in range(3):
    optimizer.update(small, nnx.grad(of)(small))
  assert small.a.kernel.a is small.b.kernel.a
  assert not np.array_equal(before, small.a.kernel.a)
  np.testing.assert_array_equal(small.a.kernel.dense(), small.b.kernel.dense())


def test_after_training_it_merges_to_the_stock_module():
  small, target = rewritten(Tied, compensate_mean=False), Tied(nnx.Rngs(1))(X)
  of = loss(ur.low_rank(run), target)
  optimizer = nnx.Optimizer(small, optax.adam(1e-2), wrt=nnx.Param)
  for _ in range(2):
    optimizer.update(small, nnx.grad(of)(small))
  merged = ur.merge(small)
  assert type(merged.a.kernel) is nnx.Param
  assert merged.a.kernel is merged.b.kernel
  assert nnx.graphdef(merged) == nnx.graphdef(Tied(nnx.Rngs(0)))
  np.testing.assert_allclose(
    merged(X), ur.low_rank(run)(small, X), rtol=1e-4, atol=1e-5
  )


def test_split_and_merged_modules_are_the_same():
  small = rewritten(MLP, gauge='identity')
  graph, state = nnx.split(small)
  again = nnx.merge(graph, state)
  np.testing.assert_array_equal(
    ur.low_rank(run)(again, X), ur.low_rank(run)(small, X)
  )
  written = ur.write_out(again)
  assert written.up.kernel.order is None
  np.testing.assert_allclose(
    ur.low_rank(run)(written, X),
    ur.low_rank(run)(small, X),
    rtol=1e-4,
    atol=1e-5,
  )


def test_mesh_axes_go_with_the_factors():
  mesh = jax.make_mesh(
    (4,), ('model',), axis_types=(jax.sharding.AxisType.Auto,)
  )
  plain = nnx.Linear(12, 8, rngs=nnx.Rngs(0))
  moments = ur.collect(run, plain, [X], progress=False)
  with jax.set_mesh(mesh):
    init = nnx.with_partitioning(
      nnx.initializers.lecun_normal(), (None, 'model')
    )
    model = nnx.Linear(12, 8, kernel_init=init, rngs=nnx.Rngs(0))
    # Three columns do not divide among four devices.
    small = ur.factorize(model, moments, {'kernel/value': 3}, progress=False)
    names = lambda v: v.get_metadata('out_sharding')
    assert names(small.kernel.a) == (None, None)
    assert names(small.kernel.b) == (None, 'model')
    optimizer = nnx.Optimizer(small, optax.adam(1e-2), wrt=nnx.Param)
    of = loss(ur.low_rank(run), jnp.zeros((96, 8)))
    values = []
    for _ in range(3):
      value, grads = nnx.value_and_grad(of)(small)
      optimizer.update(small, grads)
      values.append(float(value))
  assert values[-1] < values[0]
  merged = ur.merge(small)
  assert names(merged.kernel) == (None, 'model')

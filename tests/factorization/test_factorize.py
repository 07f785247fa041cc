"""Factors of every kind of kernel: exact at full rank, axes kept, merged."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import utilized_rank as ur
from utilized_rank.factorization import kernels
from utilized_rank.factorization import methods
from utilized_rank.factorization.methods import METHODS

pytestmark = pytest.mark.slow


class Grouped(nn.Module):
  """Two experts, each on rows of its own; no bias."""

  @nn.compact
  def __call__(self, x):
    per_expert = jnp.stack([x, jnp.tanh(x)])
    w = self.param('kernel', nn.initializers.lecun_normal(), (2, 8, 6))
    return jax.lax.dot_general(per_expert, w, (((3,), (1,)), ((0,), (0,)))).sum(
      0
    )


class Block(nn.Module):
  @nn.compact
  def __call__(self, x, _):
    y = nn.MultiHeadDotProductAttention(num_heads=2, name='attention')(x)
    return x + nn.Dense(8, name='dense')(nn.gelu(y)), None


class Model(nn.Module):
  """Convolutions, heads, experts, a transposed kernel and a scanned stack."""

  @nn.compact
  def __call__(self, images):
    x = nn.Conv(8, (3, 3), name='conv')(images)
    x = nn.relu(x)
    x = nn.Conv(8, (3, 3), strides=2, feature_group_count=2, name='grouped')(x)
    x = nn.gelu(x).reshape(len(x), -1, 8)
    stack = nn.scan(
      nn.remat(Block),
      variable_axes={'params': 0},
      split_rngs={'params': True},
      length=2,
    )
    x, _ = stack(name='blocks')(x, None)
    x = x + jnp.pad(Grouped(name='experts')(x), ((0, 0), (0, 0), (0, 2)))
    out = self.param('out', nn.initializers.lecun_normal(), (5, 8))
    return jnp.einsum('btd,md->btm', x, out).mean(1)


SELECT = [('.*kernel|.*out', True), ('.*', False)]


@pytest.fixture(scope='module')
def problem():
  rng = np.random.default_rng(0)
  images = jnp.asarray(rng.normal(size=(32, 6, 6, 3)) + 0.3, jnp.float32)
  model = Model()
  params = model.init(jax.random.key(0), images)
  # Biases that are not zero, so that folding a constant into them shows.
  params = jax.tree.map(
    lambda a: a + 0.1 * jnp.cos(jnp.arange(a.size)).reshape(a.shape), params
  )
  moments = ur.collect(
    model.apply,
    params,
    [images],
    loss=ur.sampled_cross_entropy(),
    select=SELECT,
    fisher_rows=True,
    coupled=True,
    progress=False,
  )
  return (
    jax.jit(model.apply),
    params,
    moments,
    images,
    jax.jit(ur.low_rank(model.apply)),
  )


def relative(a, b):
  return float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b)))


@pytest.mark.filterwarnings('ignore:.*was measured on:UserWarning')
@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('compensate', [True, False])
def test_full_rank_gives_the_function_back(problem, method, compensate):
  fn, params, moments, images, small_fn = problem
  ranks = {path: moments[path].layout.full_rank for path in moments}
  assert len(ranks) == 9
  full = ur.factorize(
    params, moments, ranks, method=method, compensate_mean=compensate
  )
  # Other images than those measured: exact off the data as well.
  other = jnp.flip(images, 1) * 1.7
  for x in (images, other):
    assert relative(small_fn(full, x), fn(params, x)) < 1e-5
  if not compensate:
    merged = ur.merge(full)
    assert relative(fn(merged, other), fn(params, other)) < 1e-5


def test_factors_keep_the_axes_of_heads_experts_and_stacks(problem):
  _, params, moments, _, _ = problem
  ranks = {path: 2 for path in moments}
  small = ur.factorize(params, moments, ranks)['params']
  attention = small['blocks']['attention']
  shapes = lambda leaf: (leaf.a.shape, leaf.b.shape)
  assert shapes(attention['query']['kernel']) == ((2, 8, 2), (2, 2, 2, 4))
  assert shapes(attention['out']['kernel']) == ((2, 2, 4, 2), (2, 2, 8))
  assert shapes(small['conv']['kernel']) == ((3, 3, 3, 2), (2, 8))
  # Grouped convolution: the output axis is cut into groups and channels.
  assert shapes(small['grouped']['kernel']) == ((2, 3, 3, 4, 2), (2, 2, 4))
  assert shapes(small['experts']['kernel']) == ((2, 8, 2), (2, 2, 6))
  assert shapes(small['out']) == ((8, 2), (2, 5))


def test_a_compensated_mean_goes_to_the_bias_where_there_is_one(problem):
  _, params, moments, images, small_fn = problem
  ranks = {path: 2 for path in moments}
  small = ur.factorize(params, moments, ranks)['params']
  # These products add no bias.
  assert small['experts']['kernel'].c.shape == (2, 6)
  assert small['out'].c.shape == (5,)
  for name in ('conv', 'grouped'):
    assert small[name]['kernel'].c is None
    moved = small[name]['bias'] - params['params'][name]['bias']
    assert float(jnp.abs(moved).max()) > 1e-3
  assert small['blocks']['attention']['query']['kernel'].c is None
  with pytest.raises(ValueError, match="'params/experts/kernel' has a const"):
    ur.merge({'params': small})


@pytest.mark.parametrize('method', ['output', 'weight', 'utilized', 'loss'])
def test_the_mean_output_of_a_compensated_kernel_is_kept(problem, method):
  """One kernel at a time: the mean of what it adds to the model is exact."""
  fn, params, moments, images, _ = problem
  path = 'params/conv/kernel'
  conv = nn.Conv(8, (3, 3))
  mean = lambda tree: conv.apply(
    {'params': tree['params']['conv']}, images
  ).mean((0, 1, 2))
  small = ur.factorize(params, moments, {path: 2}, method=method)
  np.testing.assert_allclose(mean(ur.merge(small)), mean(params), atol=1e-5)


@pytest.mark.quick
def test_merging_runs_the_stock_model(problem):
  fn, params, moments, images, small_fn = problem
  ranks = {p: 3 for p in moments if moments[p].entry.bias is not None}
  small = ur.factorize(params, moments, ranks)
  merged = ur.merge(small)
  assert jax.tree.structure(merged) == jax.tree.structure(params)
  # Rank 3 of a random network: sums of 8 products in another order.
  assert relative(fn(merged, images), small_fn(small, images)) < 1e-4


def test_bfloat16_parameters_get_bfloat16_factors(problem):
  _, params, moments, images, small_fn = problem
  half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
  small = ur.factorize(half, moments, {path: 3 for path in moments})
  leaves = jax.tree.leaves(small)
  assert all(leaf.dtype == jnp.bfloat16 for leaf in leaves)
  assert np.all(
    np.isfinite(
      ur.low_rank(Model().apply)(small, images.astype(jnp.bfloat16)).astype(
        jnp.float32
      )
    )
  )


def test_parameters_without_the_bias_that_was_seen_are_refused(problem):
  _, params, moments, _, _ = problem
  conv = {'kernel': params['params']['conv']['kernel']}
  other = {'params': {**params['params'], 'conv': conv}}
  with pytest.raises(ValueError, match="had the bias 'params/conv/bias'"):
    ur.factorize(other, moments, {'params/conv/kernel': 2})


def test_a_factored_tree_trains_and_keeps_its_structure(problem):
  _, params, moments, images, small_fn = problem
  small = ur.factorize(params, moments, {path: 2 for path in moments})
  loss = lambda p: jnp.mean(ur.low_rank(Model().apply)(p, images) ** 2)
  grads = jax.jit(jax.grad(loss))(small)
  assert jax.tree.structure(grads) == jax.tree.structure(small)
  step = jax.tree.map(lambda p, g: p - 1e-2 * g, small, grads)
  assert float(loss(step)) < float(loss(small))


def test_a_stack_may_have_a_rank_for_each_member(problem):
  """Padded with zeros: the function of the members' own factors."""
  fn, params, moments, images, small_fn = problem
  path = 'params/blocks/dense/kernel'
  small = ur.factorize(params, moments, {path: (2, 5)})
  leaf = small['params']['blocks']['dense']['kernel']
  assert leaf.rank == 5
  ranks = np.linalg.matrix_rank(leaf.dense(), tol=1e-5)
  np.testing.assert_array_equal(ranks, (2, 5))
  for rank, member in ((2, 0), (5, 1)):
    alone = ur.factorize(params, moments, {path: rank})
    np.testing.assert_allclose(
      leaf.dense()[member],
      alone['params']['blocks']['dense']['kernel'].dense()[member],
      atol=1e-5,
    )
  assert relative(small_fn(small, images), fn(ur.merge(small), images)) < 1e-5
  with pytest.raises(ValueError, match='3 ranks for .* holds 2 kernels'):
    ur.factorize(params, moments, {path: (2, 5, 1)})
  with pytest.raises(ValueError, match='rank 9 for'):
    ur.factorize(params, moments, {path: (2, 9)})


def test_float64_kernels_stay_float64_where_a_context_allows_them():
  rng = np.random.default_rng(0)
  with jax.enable_x64(True):
    params = {'w': jnp.asarray(rng.normal(size=(6, 4)))}
    x = jnp.asarray(rng.normal(size=(40, 6)))
    fn = lambda p, x: x @ p['w']
    moments = ur.collect(fn, params, [x], progress=False)
    full = ur.factorize(params, moments, {'w': 4}, progress=False)
    assert full['w'].a.dtype == full['w'].c.dtype == np.float64
    np.testing.assert_allclose(
      ur.low_rank(fn)(full, x), fn(params, x), rtol=1e-12, atol=1e-12
    )


def test_what_only_the_other_side_knows_is_named():
  """Kernels measured from their outputs have no S, and no gradients."""
  params = {'w': jnp.eye(4)}
  fn = lambda p, x: x @ p['w']
  rules = [('w', True)]
  moments = ur.capture(fn, from_outputs=rules)(params, jnp.ones((40, 4)))[1]
  ((_, members),) = kernels.kernels(params, moments, centered=False)
  (kernel,) = members
  for ask in (lambda: kernel.in_basis, lambda: kernel.in_spectrum):
    with pytest.raises(ValueError, match="'w' was measured from the output si"):
      ask()
  families = ur.decompose(params, moments, progress=False)
  with pytest.raises(ValueError, match="moments of 'w' have no gradients"):
    methods.damages('w', families['w'][0], 'loss')

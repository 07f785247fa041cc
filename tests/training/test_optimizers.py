"""Steps of pairs: decay of products, rates in proportion, Muon's matrices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from utilized_rank.lowrank.leaf import LowRank
from utilized_rank.products.gauge import Order
from utilized_rank.training import optimizers
from utilized_rank.training.balance import balanced
from utilized_rank.training.balance import reblocked
from utilized_rank.training.optimizers import FactorOptimizer
from utilized_rank.training.parts import take_apart
from utilized_rank.tree.layout import Layout

pytestmark = pytest.mark.slow
RNG = np.random.default_rng(0)
FLAT = Layout.of((6, 5), inputs=(0,), outputs=(1,))
STACKED = Layout.of((2, 6, 4, 5), inputs=(1,), outputs=(2, 3), groups=(0,))
ORDER = Order([1, 0, 3, 2, 4])


def draw(*shape):
  return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def tree():
  return {
    'plain': LowRank(draw(6, 3), draw(3, 5), None, FLAT),
    'block': LowRank(draw(6, 3), draw(3, 2), draw(5), FLAT, ORDER),
    'stack': LowRank(draw(2, 6, 3), draw(2, 3, 4, 5), None, STACKED),
    'shared': LowRank(None, draw(3, 5), None, FLAT, None, 'plain'),
    'dense': draw(6, 5),
    'bias': draw(5),
  }


def updates_of(optimizer, gradients, values, steps=10):
  parts = take_apart(values)
  params, _ = parts.split()
  transformation = optimizer.build(parts, steps)
  state = transformation.init(params)
  grads = jax.tree.map(lambda v: gradients * jnp.ones_like(v), params)
  return params, transformation.update(grads, state, params)[0], parts


def product(path, arrays, block=False):
  """A B in float64, as numpy makes it."""
  at = lambda key: np.asarray(
    next(v for k, v in arrays.items() if k.startswith(f'{path}/{key}')),
    np.float64,
  )
  a = at('a')
  b = at('b').reshape(*a.shape[:-2], a.shape[-1], -1)
  if block:
    b = np.hstack([np.eye(len(b)), b])[:, ORDER.array]
  return a, b


def test_products_decay_by_the_gradient_of_their_square():
  """Against finite differences of |A B|^2 / 2 in float64."""
  rate = 0.25
  optimizer = FactorOptimizer(
    rate, warmup=0, weight_decay=0.5, decay_products=True, decay_rule='x'
  )
  params, updates, _ = updates_of(optimizer, 0.0, tree())
  wide = {k: np.asarray(v, np.float64) for k, v in params.items()}

  def half_square(arrays):
    total = 0.0
    for path in ('plain', 'block', 'stack'):
      a, b = product(path, arrays, path == 'block')
      total += np.sum((a @ b) ** 2) / 2
    total += np.sum((arrays['plain/a'] @ arrays['shared/b']) ** 2) / 2
    return total

  for name, value in wide.items():
    if '/' not in name or name.endswith('/c'):
      assert not np.any(updates[name])
      continue
    for at in list(np.ndindex(value.shape))[::5]:
      ends = []
      for h in (1e-5, -1e-5):
        moved = value.copy()
        moved[at] += h
        ends.append(half_square({**wide, name: moved}))
      slope = (ends[0] - ends[1]) / 2e-5
      # Sums of a dozen float32 products of numbers up to a few.
      np.testing.assert_allclose(
        updates[name][at], -rate * 0.5 * slope, rtol=1e-4, atol=1e-4
      )


def test_products_are_not_decayed_twice():
  how = {'warmup': 0, 'weight_decay': 0.5, 'decay_products': True}
  values = tree()
  alone = updates_of(FactorOptimizer(decay_rule='x', **how), 0.0, values)[1]
  both = updates_of(FactorOptimizer(**how), 0.0, values)[1]
  for name, update in both.items():
    if name == 'dense':
      assert np.any(update)
    else:
      np.testing.assert_array_equal(update, alone[name])


def test_steps_in_proportion():
  """A times t and B over t take steps times t and over t, the same product."""
  values = tree()
  ratio = 4.0
  other = dict(values)
  plain = values['plain']
  other['plain'] = dataclasses.replace(
    plain, a=plain.a * ratio, b=plain.b / ratio
  )
  optimizer = FactorOptimizer(warmup=0, pair_rates=True)
  _, one, _ = updates_of(optimizer, 1.0, values)
  _, two, _ = updates_of(optimizer, 1.0, other)
  np.testing.assert_allclose(two['plain/a'], ratio * one['plain/a'], rtol=1e-5)
  np.testing.assert_allclose(two['plain/b'], one['plain/b'] / ratio, rtol=1e-5)
  for name in ('dense', 'bias', 'shared/b'):
    np.testing.assert_array_equal(one[name], two[name])


def test_without_options_it_is_adamw():
  _, ours, parts = updates_of(
    FactorOptimizer(1e-2, warmup=0, weight_decay=0.1, clip_norm=1.0),
    1.0,
    tree(),
  )
  params, _ = parts.split()
  grads = jax.tree.map(jnp.ones_like, params)
  theirs = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adamw(
      optax.cosine_decay_schedule(1e-2, 10),
      weight_decay=0.1,
      mask=lambda p: jax.tree.map(lambda v: v.ndim > 1, p),
    ),
  )
  want, _ = theirs.update(grads, theirs.init(params), params)
  # The schedule is written as another function of the same cosine.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), ours, want
  )


def test_muon_orthogonalises_each_factor_of_a_stack():
  values = tree()
  parts = take_apart(values)
  params, _ = parts.split()
  grads = {k: draw(*v.shape) for k, v in params.items()}
  optimizer = FactorOptimizer(
    1.0, warmup=0, kind='muon', clip_norm=float('inf')
  ).build(parts, 10)
  updates, _ = optimizer.update(grads, optimizer.init(params), params)
  shapes = {
    'plain/a': (1, 6, 3),
    'stack/a': (2, 6, 3),
    'stack/b': (2, 3, 20),
    'shared/b': (1, 3, 5),
  }
  for name, shape in shapes.items():
    for matrix in np.asarray(updates[name]).reshape(shape):
      s = np.linalg.svd(matrix, compute_uv=False)
      # Newton-Schulz's five steps bring singular values to about 1.
      assert s.min() > 0.5 * s.max(), name
  adam = optax.adam(1.0, nesterov=True)
  want, _ = adam.update(grads, adam.init(params), params)
  for name in ('dense', 'bias'):
    np.testing.assert_allclose(updates[name], want[name], rtol=1e-5)


def test_what_muon_of_optax_takes_for_a_matrix():
  """Why `FactorOptimizer` says it of each leaf; see docs/compatibility.md."""
  scanned = {'scale': draw(3, 6), 'kernel': draw(3, 6, 6)}
  optimizer = optax.contrib.muon(1.0)
  state = optimizer.init(scanned)
  updates, _ = optimizer.update(scanned, state, scanned)
  # Vectors of three layers are one matrix, whose singular values become alike;
  ratio = lambda s: s.min() / s.max()
  values = lambda leaf: np.linalg.svd(np.asarray(leaf), compute_uv=False)
  assert ratio(values(updates['scale'])) > 0.5 > ratio(values(scanned['scale']))
  # three matrices are none, and their first step is Adam's.
  adam = optax.adam(1.0, nesterov=True)
  want, _ = adam.update(scanned, adam.init(scanned), scanned)
  np.testing.assert_allclose(updates['kernel'], want['kernel'], rtol=1e-5)


def test_balanced_and_back():
  values = tree()
  made = balanced(values)
  assert made['shared'] is values['shared'] and made['plain'] is values['plain']
  for path in ('block', 'stack'):
    leaf = made[path]
    assert leaf.order is None
    np.testing.assert_allclose(leaf.dense(), values[path].dense(), atol=1e-5)
    a, b = product(path, take_apart({path: leaf}).arrays)
    grams = np.swapaxes(a, -1, -2) @ a, b @ np.swapaxes(b, -1, -2)
    np.testing.assert_allclose(*grams, atol=1e-4)
  again = reblocked(made, values)
  assert again['block'].order is not None and again['stack'].order is None
  np.testing.assert_allclose(
    again['block'].dense(), values['block'].dense(), atol=1e-5
  )
  np.testing.assert_array_equal(again['block'].c, values['block'].c)


@pytest.mark.parametrize(
  ('how', 'message'),
  [
    ({'kind': 'sgd'}, "kind='sgd'; it is one of"),
    ({'learning_rate': 0.0}, 'learning_rate=0.0 must be positive'),
    ({'weight_decay': -1.0}, 'weight_decay=-1.0 must not be negative'),
  ],
)
def test_wrong_options(how, message):
  with pytest.raises(ValueError, match=message):
    FactorOptimizer(**how)


def test_a_rule_that_decays_nothing():
  with pytest.raises(ValueError, match="decay_rule='w.*' matches no leaf"):
    updates_of(FactorOptimizer(weight_decay=1.0, decay_rule='w.*'), 0.0, tree())


def test_what_identifies_an_optimizer():
  described = optimizers.describe(FactorOptimizer(2e-3))
  assert 'learning_rate=0.002' in described
  assert (
    optimizers.describe(optax.sgd(1.0)) == 'GradientTransformationExtraArgs'
  )

"""Batch norms re-estimated: the data's statistics, whatever came before."""

import jax
import jax.numpy as jnp
import numpy as np

import utilized_rank as ur
from utilized_rank.models.resnet import ResNet
from utilized_rank.training import batch_statistics
from utilized_rank.training.parts import take_apart

MODEL = ResNet(3, stages=(1,), width=4, small_images=True)


def reestimate(variables, batches):
  return batch_statistics.reestimate(
    batch_statistics.linen(MODEL),
    variables,
    batches,
    take_apart(variables).moving,
  )


def batches(count):
  images = np.random.default_rng(0).normal(2, 3, (8, 8, 8, 2))
  return [{'image': images.astype(np.float32)}] * count


def test_statistics_are_those_of_the_data():
  image = batches(1)[0]['image']
  variables = MODEL.init(jax.random.key(0), image)
  # What was there is forgotten: 0.9 ** 100 is 3e-5.
  stale = jax.tree.map(lambda x: x + 7, variables['batch_stats'])
  found = reestimate({**variables, 'batch_stats': stale}, batches(100))
  kernel = variables['params']['conv1']['kernel']
  first = jax.lax.conv_general_dilated(
    image, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
  )
  first = np.asarray(first, np.float64).reshape(-1, 4)
  stats = found['batch_stats']['bn1']
  np.testing.assert_allclose(stats['mean'], first.mean(0), atol=1e-3)
  np.testing.assert_allclose(stats['var'], first.var(0), rtol=1e-3)
  same = jax.tree.map(lambda a, b: a is b, found['params'], variables['params'])
  assert all(jax.tree.leaves(same))


def test_factors_are_never_multiplied_out():
  image = batches(1)[0]['image']
  variables = MODEL.init(jax.random.key(0), image)
  moments = ur.collect(
    lambda v, x: MODEL.apply(v, x),
    variables,
    [image],
    select=[('.*conv2/kernel', True), ('.*', False)],
    progress=False,
  )
  path = next(iter(moments))
  small = ur.factorize(variables, moments, {path: 2}, compensate_mean=False)
  merged = ur.merge(small)
  one, two = (
    reestimate(tree, batches(2))['batch_stats'] for tree in (small, merged)
  )
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
    # float32 products in another order.
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_a_model_without_norms_stays_as_it_is():
  variables = {'params': {'w': jnp.ones(2)}}
  assert reestimate(variables, []) == variables

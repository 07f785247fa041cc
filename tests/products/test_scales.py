"""Scales, and products of one feature for each group, are no kernels."""

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest
import references

import utilized_rank as ur

RNG = np.random.default_rng(0)
draw = lambda *shape: RNG.normal(size=shape).astype(np.float32)
X = draw(40, 3) @ draw(3, 8)  # rows of rank 3
W = draw(8, 8)
heads = lambda x: x.reshape(-1, 2, 4)


def stacked(p, x):
  scaled = lambda x, s: (jnp.einsum('bd,d->bd', x, s), None)
  return lax.scan(scaled, x, p['s'])[0]


def per_channel(p, x):
  return lax.conv_general_dilated(
    x[None],
    p['s'],
    (1,),
    'SAME',
    feature_group_count=8,
    dimension_numbers=('NWC', 'WIO', 'NWC'),
  )


# name -> (shape of the leaf, what it does to x of shape (n, 8)).
SCALES = {
  'features': ((8,), lambda p, x: jnp.einsum('bd,d->bd', x, p['s'])),
  'left': ((8,), lambda p, x: jnp.einsum('d,bd->db', p['s'], x)),
  'reshaped': (
    (2, 4),
    lambda p, x: jnp.einsum('bd,d->bd', x, p['s'].reshape(8)),
  ),
  'of_heads': (
    (2, 4),
    lambda p, x: jnp.einsum('bhd,hd->bhd', heads(x), p['s']),
  ),
  'one_a_head': ((2,), lambda p, x: jnp.einsum('bhd,h->bhd', heads(x), p['s'])),
  'one': ((), lambda p, x: jnp.einsum('bd,->bd', x, p['s'])),
  'score_of_heads': (
    (2, 4),
    lambda p, x: jnp.einsum('bhd,hd->bh', heads(x), p['s']),
  ),
  'spread_of_heads': (
    (8, 5),
    lambda p, x: jnp.einsum('bd,dm->bdm', x, p['s']),
  ),
  'scan': ((3, 8), stacked),
  'vmap': (
    (8,),
    lambda p, x: jax.vmap(jnp.dot, (1, 0), 1)(x, p['s']),
  ),
  'depthwise': ((3, 1, 8), per_channel),
}


@pytest.mark.parametrize('name', SCALES)
def test_scales_are_named(name):
  shape, scale = SCALES[name]
  fn = lambda p, x: scale(p, jnp.tanh(x @ p['w']))
  sites = ur.find_sites(fn, {'w': W, 's': draw(*shape)}, X)
  assert set(sites) == {'w'}
  assert 'matrices of rank one' in sites.unseen['s']
  assert sites.unseen['s'] in str(sites)


KERNELS = {
  'one_output': ((8,), (8, 1), lambda p, x: x @ p['s']),
  'outer': ((8, 5), (8, 5), lambda p, x: jnp.einsum('bd,dm->bm', x, p['s'])),
  'experts': (
    (2, 4, 2),
    (4, 2),
    lambda p, x: jnp.einsum('bhd,hdm->bhm', heads(x), p['s']),
  ),
  'two_a_channel': ((3, 1, 16), (3, 2), per_channel),
}


@pytest.mark.parametrize('name', KERNELS)
def test_matrices_are_kernels(name):
  shape, matrix, fn = KERNELS[name]
  sites = ur.find_sites(fn, {'s': draw(*shape)}, X)
  assert sites['s'].matrix_shape == matrix


def test_a_scale_changes_no_mean_utilization():
  fn = lambda p, x: jnp.einsum('bd,d->bd', x @ p['w'], p['s'])
  params = {'w': W, 's': draw(8)}
  moments = ur.collect(fn, params, [X], progress=False)
  report = ur.measure(params, moments, progress=False)
  rows, w = X.astype(np.float64), W.astype(np.float64)
  ranks = [
    references.rank_at(references.second_moment(a), 0.99)
    for a in (rows, rows @ w)
  ]
  assert len(report.layers) == 1
  assert float(report.mean_layer_utilization) == min(ranks) / 8


def test_a_kernel_that_is_a_scale_elsewhere():
  fn = lambda p, x: jnp.einsum('bd,d->bd', x, p['s']) @ p['s']
  sites = ur.find_sites(fn, {'s': draw(8)}, X)
  assert (sites['s'].matrix_shape, sites['s'].uses) == ((8, 1), 1)
  assert 'also a scale' in str(sites)

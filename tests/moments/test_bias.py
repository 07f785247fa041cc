"""Which leaf is a kernel's bias: a wrong answer would corrupt a model.

The mean of what a factorization discards is added to the bias. That is right
only if the leaf is added to every product of the kernel, once, and used for
nothing else. What else is in the sum, and numbers that it is multiplied with,
do not matter. Every other use below must be told apart.
"""

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest

import utilized_rank as ur

X = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32) + 0.5


def draw(**shapes):
  rng = np.random.default_rng(1)
  return {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}


def dense(p, x):
  return x @ p['w'] + p['b']


# name -> (function, shapes); `b` is the bias of `w`, wholly and only.
FOLDS = {
  'dense': (dense, dict(w=(4, 3), b=(3,))),
  'added_first': (lambda p, x: p['b'] + x @ p['w'], dict(w=(4, 3), b=(3,))),
  'left': (lambda p, x: p['w'] @ x.T + p['b'][:, None], dict(w=(3, 4), b=(3,))),
  'broadcast': (
    lambda p, x: x @ p['w'] + jnp.broadcast_to(p['b'], (5, 3)),
    dict(w=(4, 3), b=(3,)),
  ),
  'heads': (
    lambda p, x: jnp.einsum('nd,dhk->nhk', x, p['w']) + p['b'],
    dict(w=(4, 2, 3), b=(2, 3)),
  ),
  'conv': (
    lambda p, x: (
      lax.conv_general_dilated(x[None, None], p['w'], (1, 1), 'SAME')
      + p['b'][:, None, None]
    ),
    dict(w=(2, 1, 3, 3), b=(2,)),
  ),
  'heads_flat': (
    lambda p, x: jnp.einsum('nd,dhk->nhk', x, p['w']).reshape(5, 6) + p['b'],
    dict(w=(4, 2, 3), b=(6,)),
  ),
  'heads_of_a_flat_kernel': (
    lambda p, x: ((x @ p['w']).reshape(5, 2, 3) + p['b']).reshape(5, 6),
    dict(w=(4, 6), b=(2, 3)),
  ),
  'grouped_conv': (
    lambda p, x: (
      lax.conv_general_dilated(
        x[None],
        p['w'],
        (1,),
        'SAME',
        feature_group_count=2,
        dimension_numbers=('NWC', 'WIO', 'NWC'),
      )
      + p['b']
    ),
    dict(w=(3, 2, 6), b=(6,)),
  ),
  'ensemble': (
    lambda p, x: jax.vmap(dense)(p, jnp.stack([x, 2 * x])),
    dict(w=(2, 4, 3), b=(2, 3)),
  ),
  'stacked': (
    lambda p, x: lax.scan(lambda x, p: (jnp.tanh(dense(p, x)), None), x, p)[0],
    dict(w=(3, 4, 4), b=(3, 4)),
  ),
  'tied': (
    lambda p, x: lax.scan(
      lambda x, _: (jnp.tanh(dense(p, x)), None), x, None, length=3
    )[0],
    dict(w=(4, 4), b=(4,)),
  ),
  'used_twice_alike': (
    lambda p, x: dense(p, jnp.tanh(dense(p, x))),
    dict(w=(4, 4), b=(4,)),
  ),
  'low_precision': (
    lambda p, x: (
      (x.astype(jnp.bfloat16) @ p['w'].astype(jnp.bfloat16)).astype(jnp.float32)
      + p['b']
    ),
    dict(w=(4, 3), b=(3,)),
  ),
  'one_branch': (
    lambda p, x: lax.cond(x[0, 0] > 9, lambda: x[:, :3], lambda: dense(p, x)),
    dict(w=(4, 3), b=(3,)),
  ),
  'remat': (jax.checkpoint(dense), dict(w=(4, 3), b=(3,))),
  'residual': (lambda p, x: x + x @ p['w'] + p['b'], dict(w=(4, 4), b=(4,))),
  'residual_last': (
    lambda p, x: jnp.sin(x) + (jnp.tanh(x) @ p['w'] + x) + p['b'],
    dict(w=(4, 4), b=(4,)),
  ),
  'residual_of_heads': (
    lambda p, x: (
      jnp.einsum('nd,dhk->nhk', x, p['w']).reshape(5, 6) + x[:, :1] + p['b']
    ),
    dict(w=(4, 2, 3), b=(6,)),
  ),
  'residual_stream': (
    lambda p, x: lax.scan(
      lambda x, p: (x + jnp.tanh(x) @ p['w'] + p['b'], None), x, p
    )[0],
    dict(w=(3, 4, 4), b=(3, 4)),
  ),
  'off_a_residual': (
    lambda p, x: x - x @ p['w'] + p['b'],
    dict(w=(4, 4), b=(4,)),
  ),
  'less_the_product': (
    lambda p, x: p['b'] - x @ p['w'],
    dict(w=(4, 3), b=(3,)),
  ),
  'taken_off': (lambda p, x: x @ p['w'] - p['b'], dict(w=(4, 3), b=(3,))),
  'running_mean': (
    lambda p, x: (x @ p['w'] - p['b']) * lax.rsqrt(p['v'] ** 2 + 1e-3) + p['t'],
    dict(w=(4, 3), b=(3,), v=(3,), t=(3,)),
  ),
  'running_mean_of_channels': (
    lambda p, x: (
      (
        lax.conv_general_dilated(x[None, None], p['w'], (1, 1), 'SAME')
        - p['b'].reshape(1, 2, 1, 1)
      )
      * p['s'][:, None, None]
    ),
    dict(w=(2, 1, 3, 3), b=(2,), s=(2,)),
  ),
  'two_products_of_a_sum': (
    lambda p, x: jnp.tanh(x @ p['w'] + (jnp.sin(x) @ p['v'] + p['b'])),
    dict(w=(4, 3), v=(4, 3), b=(3,)),
  ),
  'recurrent': (
    lambda p, x: lax.scan(
      lambda h, x: (jnp.tanh(x @ p['v'] + h @ p['w'] + p['b']), None),
      jnp.zeros((2, 3)),
      jnp.stack([x[:2], x[2:4]]),
    )[0],
    dict(w=(3, 3), v=(4, 3), b=(3,)),
  ),
  'times_one': (
    lambda p, x: 1.0 * p['b'] + 1.0 * (x @ p['w']),
    dict(w=(4, 3), b=(3,)),
  ),
  'scaled_between': (
    lambda p, x: 2 * (x @ p['w']) + p['b'],
    dict(w=(4, 3), b=(3,)),
  ),
  'kernel_and_bias_scaled': (
    lambda p, x: x - (x @ (p['w'] / 3)) * 2 + 0.5 * p['b'],
    dict(w=(4, 4), b=(4,)),
  ),
  'scaled_sum': (
    lambda p, x: -(x + (x @ p['w']) / 4) * 3 + p['b'],
    dict(w=(4, 4), b=(4,)),
  ),
}

# name -> (function, shapes); `b` must not be taken for the bias of `w`.
KEEPS = {
  'shared_by_two': (
    lambda p, x: dense(p, x) + jnp.tanh(x @ p['v'] + p['b']),
    dict(w=(4, 3), v=(4, 3), b=(3,)),
  ),
  'used_elsewhere': (
    lambda p, x: jnp.tanh(dense(p, x)) * p['b'],
    dict(w=(4, 3), b=(3,)),
  ),
  'returned': (lambda p, x: (dense(p, x), p['b']), dict(w=(4, 3), b=(3,))),
  'added_twice': (lambda p, x: dense(p, x) + p['b'], dict(w=(4, 3), b=(3,))),
  'output_used_twice': (
    lambda p, x: (lambda y: (y + p['b']) * jnp.tanh(y))(x @ p['w']),
    dict(w=(4, 3), b=(3,)),
  ),
  'output_returned': (
    lambda p, x: (lambda y: (y + p['b'], y))(x @ p['w']),
    dict(w=(4, 3), b=(3,)),
  ),
  'one_use_without': (
    lambda p, x: jnp.tanh(dense(p, x)) @ p['w'],
    dict(w=(4, 4), b=(4,)),
  ),
  'two_biases': (
    lambda p, x: jnp.tanh(dense(p, x)) @ p['w'] + p['c'],
    dict(w=(4, 4), b=(4,), c=(4,)),
  ),
  'masked': (
    lambda p, x: x @ p['w'] + p['b'] * jnp.array([1.0, 0.0, 1.0]),
    dict(w=(4, 3), b=(3,)),
  ),
  'scaled_by_an_input': (
    lambda p, x: x[0, 0] * (x @ p['w']) + p['b'],
    dict(w=(4, 3), b=(3,)),
  ),
  'scaled_by_nothing': (
    lambda p, x: 0.0 * (x @ p['w']) + p['b'],
    dict(w=(4, 3), b=(3,)),
  ),
  'scaled_differently': (
    lambda p, x: dense(p, 2 * jnp.tanh(x @ p['w']) + p['b']),
    dict(w=(4, 4), b=(4,)),
  ),
  'statistics_in_training': (
    lambda p, x: (x @ p['w'] - p['b'], 0.9 * p['b'] + 0.1 * x.mean()),
    dict(w=(4, 3), b=(3,)),
  ),
  'mean_of_two_norms': (
    lambda p, x: (x @ p['w'] - p['b']) * jnp.sin(x @ p['v'] - p['b']),
    dict(w=(4, 3), v=(4, 3), b=(3,)),
  ),
  'product_twice_in_a_sum': (
    lambda p, x: x @ p['w'] + jnp.tanh(x) @ p['w'] + p['b'],
    dict(w=(4, 3), b=(3,)),
  ),
  'sum_used_twice': (
    lambda p, x: (lambda y: (y + p['b']) * jnp.tanh(y))(x[:, :3] + x @ p['w']),
    dict(w=(4, 3), b=(3,)),
  ),
  'repeated_sum': (
    lambda p, x: x @ p['w'] + jnp.ones((5, 3)) + p['b'],
    dict(w=(4, 1), b=(3,)),
  ),
  'rounded_between': (
    lambda p, x: (x @ p['w']).astype(jnp.int32).astype(jnp.float32) + p['b'],
    dict(w=(4, 3), b=(3,)),
  ),
  'per_row': (lambda p, x: x @ p['w'] + p['b'], dict(w=(4, 3), b=(5, 3))),
  'scalar': (lambda p, x: x @ p['w'] + p['b'], dict(w=(4, 3), b=())),
  'other_axis': (
    lambda p, x: x @ p['w'] + p['b'][:, None],
    dict(w=(4, 5), b=(5,)),
  ),
  'transposed': (
    lambda p, x: jnp.einsum('nd,dhk->nhk', x, p['w']) + p['b'].T,
    dict(w=(4, 3, 3), b=(3, 3)),
  ),
  'crossed_atoms': (
    lambda p, x: jnp.einsum('nd,dhk->nkh', x, p['w']).reshape(5, 6) + p['b'],
    dict(w=(4, 2, 3), b=(6,)),
  ),
  'half_broadcast': (
    lambda p, x: jnp.einsum('nd,dhk->nhk', x, p['w']) + p['b'][:, None],
    dict(w=(4, 2, 3), b=(2,)),
  ),
  'half_the_heads': (
    lambda p, x: jnp.einsum('nd,dhk->nhk', x, p['w']) + p['b'],
    dict(w=(4, 2, 3), b=(3,)),
  ),
  'tied_over_layers': (
    lambda p, x: lax.scan(
      lambda x, w: (jnp.tanh(x @ w + p['b']), None), x, p['w']
    )[0],
    dict(w=(3, 4, 4), b=(4,)),
  ),
  'stacked_over_tied': (
    lambda p, x: lax.scan(
      lambda x, b: (jnp.tanh(x @ p['w'] + b), None), x, p['b']
    )[0],
    dict(w=(4, 4), b=(3, 4)),
  ),
  'shared_by_members': (
    lambda p, x: jax.vmap(lambda w, x: x @ w + p['b'])(
      p['w'], jnp.stack([x, x])
    ),
    dict(w=(2, 4, 3), b=(3,)),
  ),
  'one_layer_without': (
    lambda p, x: jnp.tanh(x @ p['w'][0] + p['b'][0]) @ p['w'][1],
    dict(w=(2, 4, 4), b=(2, 4)),
  ),
  'crossed_layers': (
    lambda p, x: jnp.tanh(x @ p['w'][0] + p['b'][1]) @ p['w'][1] + p['b'][0],
    dict(w=(2, 4, 4), b=(2, 4)),
  ),
  'while_condition': (
    lambda p, x: lax.while_loop(
      lambda s: (s[0] < 2) & (s[1]['b'].sum() < 1e9),
      lambda s: (s[0] + 1, s[1], jnp.tanh(dense(s[1], s[2]))),
      (0, p, x),
    )[2],
    dict(w=(4, 4), b=(4,)),
  ),
  'only_in_a_branch': (
    lambda p, x: (
      lambda y: lax.cond(x[0, 0] > 0, lambda: y + p['b'], lambda: y)
    )(x @ p['w']),
    dict(w=(4, 3), b=(3,)),
  ),
  'a_kernel_too': (lambda p, x: dense(p, x) @ p['b'], dict(w=(4, 3), b=(3,))),
}


@pytest.mark.parametrize('name', FOLDS)
def test_bias_is_found(name):
  fn, shapes = FOLDS[name]
  params = draw(**shapes)
  sites = ur.find_sites(fn, params, X)
  assert sites['w'].bias == 'b'
  owners = [path for path in sites if sites[path].bias == 'b']
  assert sites.unseen['b'] == f'bias of {" and ".join(owners)}'
  # Proof: at rank 1, a constant in the bias does what one at the output does.
  check_compensation(fn, params, sites)


@pytest.mark.parametrize('name', KEEPS)
def test_other_uses_are_told_apart(name):
  fn, shapes = KEEPS[name]
  params = draw(**shapes)
  sites = ur.find_sites(fn, params, X)
  assert all(site.bias != 'b' for site in sites.values())


def test_a_leaf_that_is_an_unselected_kernel_is_no_bias():
  fn, shapes = KEEPS['a_kernel_too']
  sites = ur.find_sites(fn, draw(**shapes), X, select=[('w', True)])
  assert sites['w'].bias is None


def test_why_a_multiple_of_a_leaf_is_no_bias_is_said():
  fn, shapes = KEEPS['masked']
  sites = ur.find_sites(fn, draw(**shapes), X)
  assert sites.unseen['b'].startswith('used by ')
  assert sites.unseen['b'].endswith(', as no bias of w')


def test_two_products_have_two_biases_where_a_sum_has_them():
  fn = lambda p, x: x @ p['w'] + p['b'] + jnp.sin(x) @ p['v'] + p['c']
  sites = ur.find_sites(fn, draw(w=(4, 3), v=(4, 3), b=(3,), c=(3,)), X)
  assert (sites['w'].bias, sites['v'].bias) == ('b', 'c')


def check_compensation(fn, params, sites):
  """A constant c in `LowRank.c` and one in the bias are one function."""
  layout = sites['w'].layout
  rng = np.random.default_rng(2)
  g = layout.group_shape
  a = rng.normal(size=(*g, *layout.input_shape, 1)).astype(np.float32)
  b = rng.normal(size=(*g, 1, *layout.output_shape)).astype(np.float32)
  c = rng.normal(size=(*g, *layout.output_shape)).astype(np.float32)
  at_output = {**params, 'w': ur.LowRank(a, b, c, layout)}
  in_bias = {
    **params,
    'w': ur.LowRank(a, b, None, layout),
    'b': params['b'] + sites['w'].bias_scale * c.reshape(params['b'].shape),
  }
  run = jax.jit(ur.low_rank(fn))
  np.testing.assert_allclose(
    run(at_output, X), run(in_bias, X), rtol=2e-2, atol=2e-2
  )

"""A stack of kernels that the function reads as rows of stacks.

The usual way to spend sqrt(L) memory on L layers, and experts on a mesh: the
leaf (4, d, d) is cut into (2, 2, d, d) where it is used. What is known of it is
of its own four kernels, as it is of a leaf of the other shape.
"""

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest

import utilized_rank as ur

D = 6
RNG = np.random.default_rng(0)
W = (RNG.normal(size=(4, D, D)) * 0.4).astype(np.float32)
X = (1 + RNG.normal(size=(5, 7, D))).astype(np.float32)
QUIET = {'progress': False}


def step(x, w):
  return jnp.tanh(x @ w), None


def two_by_hand(w, x):
  def pair(x, two):
    return step(step(x, two[0])[0], two[1])

  return lax.scan(pair, x, w)[0]


def nested(w, x):
  inner = jax.checkpoint(lambda x, two: (lax.scan(step, x, two)[0], None))
  return lax.scan(inner, x, w)[0]


def backwards(w, x):
  inner = lambda x, two: (lax.scan(step, x, two, reverse=True)[0], None)
  return lax.scan(inner, x, w, reverse=True)[0]


def experts(w, x):
  rows = jnp.stack([x, -x, 2 * x, x + 1], 2)
  rows = rows.reshape(*x.shape[:2], 2, 2, D)
  return jnp.tanh(jnp.einsum('btged,gedf->btgef', rows, w)).sum((2, 3))


def members(w, x):
  each = jax.vmap(jax.vmap(lambda w, x: jnp.tanh(x @ w)))
  return each(w, jnp.stack([x, -x, 2 * x, x + 1]).reshape(2, 2, *x.shape)).sum(
    (0, 1)
  )


# In which order, and whether one after the other.
FORMS = {
  two_by_hand: [0, 1, 2, 3],
  nested: [0, 1, 2, 3],
  backwards: [3, 2, 1, 0],
  experts: None,
  members: None,
}


def inputs(order):
  """What each kernel reads, in float64: (4, rows, D)."""
  x = X.astype(np.float64).reshape(-1, D)
  if order is None:
    return np.stack([x, -x, 2 * x, x + 1])
  read = {}
  for i in order:
    read[i] = x
    x = np.tanh(x @ W[i].astype(np.float64))
  return np.stack([read[i] for i in range(4)])


def half_square(y, batch):
  del batch
  return 0.5 * jnp.sum(jnp.square(y), axis=(1, 2))


def as_leaf(form, shape, used=(2, 2, D, D)):
  """The function, and its parameters with the leaf of a shape."""
  fn = lambda params, x: form(params['w'].reshape(used), x)
  return fn, {'w': jnp.asarray(W.reshape(shape))}


@pytest.mark.parametrize('form', FORMS, ids=lambda f: f.__name__)
def test_sums_are_those_of_the_stack(form):
  fn, params = as_leaf(form, (4, D, D))
  found = ur.collect(fn, params, [X], **QUIET)['w']
  rows = inputs(FORMS[form])
  assert found.layout.group_shape == (4,)
  np.testing.assert_array_equal(found.count, [rows.shape[1]] * 4)
  # Float32 sums of some thirty rows of layers one after the other.
  near = dict(rtol=2e-5, atol=2e-5)
  np.testing.assert_allclose(found.mean, rows.mean(1), **near)
  second = rows.swapaxes(1, 2) @ rows / rows.shape[1]
  np.testing.assert_allclose(found.second, second, **near)


def everything(fn, params):
  moment = ur.collect(
    fn,
    params,
    [X],
    loss=half_square,
    fisher_rows=True,
    coupled=True,
    **QUIET,
  )['w']
  return {
    'count': moment.count,
    'mean': moment.mean,
    'second': moment.second,
    'grad': moment.grad_second,
    'rows': moment.row_grad,
    'coupled': moment.coupled.total,
  }


# `fisher_rows` asks for one example at a time, whatever shape that has.
@pytest.mark.slow
@pytest.mark.parametrize(
  'form', [two_by_hand, nested, backwards], ids=lambda f: f.__name__
)
@pytest.mark.parametrize(
  ('shape', 'used'),
  [((4, D, D), (2, 2, D, D)), ((2, 2, D, D), (4, D, D))],
  ids=['cut', 'joined'],
)
def test_every_sum_is_that_of_the_leaf_as_it_is_used(form, shape, used):
  if used == (4, D, D):
    form = in_order
  want = everything(*as_leaf(form, used, used))
  found = everything(*as_leaf(form, shape, used))
  for name, value in want.items():
    value = np.asarray(value)
    value = value.reshape(*shape[:-2], *value.shape[len(used) - 2 :])
    # The same program but for a reshape; XLA may add in another order.
    np.testing.assert_allclose(
      found[name], value, rtol=1e-5, atol=1e-6, err_msg=name
    )


def in_order(w, x):
  return lax.scan(step, x, w)[0]


def scaled(w, x):
  return in_order(w * jnp.arange(1.0, 5.0)[:, None, None], x)


def flipped(w, x):
  return in_order(w[::-1], x)


SIDES = {
  'input': {},
  'output': {'from_outputs': [('w', True)]},
  'sketch': {'sketch': [('w', D)]},
}
CUT = [(form, (4, D, D), (2, 2, D, D)) for form in FORMS]
JOINED = [
  (form, (2, 2, D, D), (4, D, D)) for form in (in_order, scaled, flipped)
]


@pytest.mark.parametrize(
  ('form', 'shape', 'used'),
  CUT + JOINED,
  ids=lambda v: getattr(v, '__name__', ''),
)
@pytest.mark.parametrize('side', SIDES)
def test_factors_compute_what_their_kernels_compute(form, shape, used, side):
  fn, params = as_leaf(form, shape, used)
  moments = ur.collect(fn, params, [X], **QUIET, **SIDES[side])
  if side == 'output':
    assert moments['w'].output_second.shape == shape
  ur.measure(params, moments)
  small = ur.factorize(
    params, moments, {'w': 3}, compensate_mean=False, **QUIET
  )
  out = ur.low_rank(fn)(small, X)
  want = fn(ur.merge(small), X)
  # Two products in place of one, in float32, through four layers.
  np.testing.assert_allclose(out, want, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize('form', [nested, two_by_hand])
def test_compress_takes_it(form):
  fn, params = as_leaf(form, (4, D, D))
  small, report = ur.compress(
    fn,
    params,
    [X] * 4,
    params_fraction=0.7,
    loss=half_square,
    refine=2,
    **QUIET,
  )
  assert ur.count_params(small) <= 0.7 * W.size
  assert np.isfinite(ur.low_rank(fn)(small, X)).all()
  assert 'w' in [row.path for row in report.layers]


def test_what_is_no_whole_axis_is_named():
  """One of four by its number, which is a row and a column of the leaf."""

  def by_number(w, x):
    return lax.fori_loop(0, 4, lambda i, x: step(x, w[i])[0], x)

  fn, params = as_leaf(by_number, (2, 2, D, D), (4, D, D))
  sites = ur.find_sites(fn, params, X)
  assert 'equal parts' in sites.unseen['w']

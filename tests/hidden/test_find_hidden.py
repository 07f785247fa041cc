"""Hidden layers are found by what is computed, or refused."""

import flax.linen as nn
import jax
from jax import lax
import jax.numpy as jnp
import pytest

import utilized_rank as ur
from utilized_rank.hidden.layers import Units

D, K, M = 5, 8, 3
X = jax.ShapeDtypeStruct((2, 6, D), jnp.float32)
IMAGE = jax.ShapeDtypeStruct((2, 6, 6, D), jnp.float32)


def shapes(**sizes):
  return {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in sizes.items()}


P = shapes(up=(D, K), gate=(D, K), bias=(K,), down=(K, M), back=(K, D))


def mlp(p, x, act=jax.nn.gelu):
  return act(x @ p['up'] + p['bias']) @ p['down']


def check(fn, params, x, firsts, second, vectors=(), resizes=True):
  found = ur.find_hidden(fn, params, x)
  (layer,) = found.values()
  assert [k.path for k in layer.firsts] == list(firsts)
  assert layer.second.path == second
  assert {v.path for v in layer.vectors} == set(vectors)
  assert layer.width == K and layer.resizes is resizes
  return layer


@pytest.mark.parametrize(
  'act',
  [
    jax.nn.gelu,
    jax.nn.relu,
    jax.nn.silu,
    jax.nn.elu,
    jax.nn.softplus,
    lambda h: jnp.where(h > 0, h, 0.1 * h),
    lambda h: jnp.square(jnp.clip(h, 0, 6)),
    jax.checkpoint(jnp.tanh),
  ],
)
def test_functions_of_one_number(act):
  layer = check(lambda p, x: mlp(p, x, act), P, X, ['up'], 'down', ['bias'])
  assert layer.kernels[0].axis == 1 and layer.second.axis == 0
  assert layer.cost == D + M and layer.vectors == (Units('bias', 0),)


def test_gated_layers_lose_a_unit_in_both():
  def fn(p, x):
    return (
      x + jax.nn.silu(x @ p['gate']) * (x @ p['up'] + p['bias']) @ p['back']
    )

  layer = check(fn, P, X, ['gate', 'up'], 'back', ['bias'])
  assert layer.cost == 3 * D and layer.name == 'gate'


def test_numbers_that_are_the_same_for_all_units():
  def fn(p, x):
    mask = (jnp.arange(x.shape[1]) < 4)[:, None]
    h = jax.nn.relu(x @ p['up']) * mask / x.shape[0] * p['temperature']
    h = jnp.transpose(h, (1, 0, 2)).reshape(-1, h.shape[-1])
    return h.mean(0) @ p['down']

  check(fn, {**P, **shapes(temperature=())}, X, ['up'], 'down')


def convolve(x, w, **options):
  return lax.conv_general_dilated(
    x, w, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'), **options
  )


CONV = shapes(
  one=(3, 3, D, K), two=(3, 3, K, M), mean=(K,), var=(K,), scale=(K,), bias=(K,)
)
NORM = ['mean', 'var', 'scale', 'bias']


def convolutions(p, x):
  h = convolve(x, p['one'])
  h = (h - p['mean']) * (lax.rsqrt(p['var'] + 1e-5) * p['scale']) + p['bias']
  h = nn.max_pool(jax.nn.relu(h), (2, 2), (2, 2))
  return convolve(h, p['two'])


def test_convolutions_with_a_norm_and_a_pooling_between():
  layer = check(convolutions, CONV, IMAGE, ['one'], 'two', NORM)
  assert [k.axis for k in layer.kernels] == [3, 2]
  assert layer.cost == 9 * (D + M)


def test_a_mean_over_positions_before_the_head():
  def fn(p, x):
    return jax.nn.relu(convolve(x, p['one'])).mean((1, 2)) @ p['down']

  check(fn, CONV | P, IMAGE, ['one'], 'down')


STACK = shapes(up=(4, D, K), bias=(4, K), back=(4, K, D))


def scanned(p, x):
  def step(x, p):
    return x + jax.nn.relu(x @ p['up'] + p['bias']) @ p['back'], None

  return lax.scan(step, x, p)[0]


def test_units_of_a_stack():
  layer = check(scanned, STACK, X, ['up'], 'back', ['bias'])
  assert layer.vectors == (Units('bias', 1, 0),)
  assert [(k.axis, k.stack) for k in layer.kernels] == [(2, 0), (1, 0)]
  assert layer.cost == 4 * 2 * D


def test_frameworks_that_fix_the_width():
  class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
      return nn.Dense(M, name='two')(nn.gelu(nn.Dense(K, name='one')(x)))

  params = jax.eval_shape(Net().init, jax.random.key(0), X)
  names = [f'params/{n}' for n in ('one/kernel', 'two/kernel', 'one/bias')]
  layer = check(
    Net().apply, params, X, names[:1], names[1], names[2:], resizes=False
  )
  assert layer.width == K


def test_functions_that_depend_on_the_width():
  def fn(p, x):  # takes any width, but is not the same function of the units
    return jnp.tanh(x @ p['up'] / p['up'].shape[1] ** 0.5) @ p['down']

  check(fn, P, X, ['up'], 'down', resizes=False)


REFUSED = {
  'its output meets reduce_max': lambda p, h: jax.nn.softmax(h) @ p['down'],
  'its output meets add': lambda p, h: (h + p['x']) @ p['down'],
  "its output ends in the function's output": lambda p, h: (h @ p['down'], h),
  '2 products read its output': lambda p, h: (h @ p['down'], h @ p['back']),
  'its output meets reshape': lambda p, h: h.reshape(2, -1) @ p['flat'],
  'its output meets dot_general': lambda p, h: (h @ h.mT) @ p['seven'],
  'which does not sum over its units': (
    lambda p, h: jnp.einsum('btk,td->bkd', h, p['six'])
  ),
  'its vector': lambda p, h: (h + p['bias']) @ p['down'] * p['bias'].sum(),
  'is also used otherwise': lambda p, h: h @ p['down'] + p['down'].sum(),
  "'down' is the kernel of 2 products": (
    lambda p, h: h @ p['down'] + jnp.ones(K) @ p['down']
  ),
  'its output meets concatenate': (
    lambda p, h: jnp.concatenate([h, h], -1) @ p['wide']
  ),
  'enters a scan': (
    lambda p, h: lax.scan(lambda c, _: (c * 2, None), h, None, 3)[0] @ p['down']
  ),
  'is not read': lambda p, h: p['x'],
}


@pytest.mark.parametrize('reason', REFUSED)
def test_units_that_are_not_each_by_itself(reason):
  params = P | shapes(
    x=(2, 6, K), flat=(6 * K, M), six=(6, D), seven=(6, M), wide=(2 * K, M)
  )

  def fn(p, x):
    params = {k: v for k, v in p.items() if k != 'x'}
    data = p['x'] * x.sum()
    h = jnp.tanh(x @ p['up'])
    return REFUSED[reason]({**params, 'x': data}, h)

  found = ur.find_hidden(fn, params, X)
  assert not any(k.path == 'up' for v in found.values() for k in v.firsts)
  if reason == 'is not read':
    return  # dead code: there is no such product
  assert reason in found.unseen['up']
  with pytest.raises(KeyError, match="'up' makes no hidden layer"):
    _ = found['up']


def in_a_loop(step, *names):
  """`step` for each entry of these leaves."""
  return lambda p, x: lax.scan(
    lambda h, w: (step(p, h, *w), None), x, [p[name] for name in names]
  )[0]


tanh = jnp.tanh
MORE_REFUSED = {
  'its units are a part of an axis': lambda p, x: jnp.einsum(
    'btk,kcm->btcm', tanh(x @ p['up']), p['flat'].reshape(K, 2, M)
  ),
  'its units lie along 2 axes of it': (
    lambda p, x: tanh(x @ p['heads'].reshape(D, K)) @ p['down']
  ),
  'it is in a loop in a loop': in_a_loop(
    lambda p, h, up, down: in_a_loop(
      lambda p, h, up, down: tanh(h @ up) @ down, 'up', 'down'
    )({'up': up, 'down': down}, h),
    'ups',
    'downs',
  ),
  'several kernels of one leaf in one product': lambda p, x: jnp.einsum(
    'gbtk,gkd->gbtd', tanh(jnp.einsum('btd,gdk->gbtk', x, p['stack'])), p['g']
  ),
  'read backwards, scaled, or in part': (
    lambda p, x: tanh(x @ p['up'][::-1]) @ p['down']
  ),
  "its vector 'bias' is of other loops": in_a_loop(
    lambda p, h, up, down: tanh(h @ up + p['bias']) @ down, 'stack', 'g'
  ),
  "'up' is in another loop than": in_a_loop(
    lambda p, h, down: tanh(h @ p['up']) @ down, 'g'
  ),
  'is not used whole: meets mul': (
    lambda p, x: tanh(x @ (2 * p['up'])) @ p['down']
  ),
  "'eight' is int8": lambda p, x: tanh(x @ p['eight']) @ p['down'],
  "'one' is a vector as well": (
    lambda p, x: tanh(x[..., :1] @ p['one'] + p['one']) @ p['down']
  ),
}


@pytest.mark.parametrize('reason', MORE_REFUSED)
def test_kernels_that_units_could_not_be_cut_from(reason):
  params = P | shapes(
    flat=(2 * K, M),
    heads=(D, 2, K // 2),
    ups=(2, 3, D, K),
    downs=(2, 3, K, D),
    stack=(2, D, K),
    g=(2, K, D),
    one=(1, K),
  )
  params['eight'] = jax.ShapeDtypeStruct((D, K), jnp.int8)
  found = ur.find_hidden(MORE_REFUSED[reason], params, X)
  assert not found
  assert any(reason in why for why in found.unseen.values())


def test_printed():
  text = str(ur.find_hidden(convolutions, CONV, IMAGE))
  assert 'makes units for two; with mean, ' in text
  assert 'reads those of one' in text and text.endswith('1 hidden layers')
  with pytest.raises(KeyError, match="did you mean \\['one'\\]"):
    _ = ur.find_hidden(convolutions, CONV, IMAGE)['ones']


def test_some_of_the_layers():
  params = shapes(a=(D, K), b=(K, D), c=(D, K), d=(K, D), e=(D, K), f=(K, M))

  def fn(p, x):
    x = x + jnp.tanh(x @ p['a']) @ p['b']
    x = x + jnp.tanh(x @ p['c']) @ p['d']
    return jnp.tanh(x @ p['e']) @ p['f']

  found = ur.find_hidden(fn, params, X)
  assert list(found) == list(found.apart()) == ['a', 'c', 'e']
  assert list(found.only(name for name in 'ec')) == ['c', 'e']


def test_layers_that_share_a_kernel():
  params = shapes(a=(D, K), b=(K, 2 * K), c=(2 * K, M))
  found = ur.find_hidden(
    lambda p, x: jnp.tanh(jnp.tanh(x @ p['a']) @ p['b']) @ p['c'], params, X
  )
  assert list(found) == ['a', 'b'] and list(found.apart()) == ['b']

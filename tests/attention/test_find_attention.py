"""Pairs of attention's kernels are found by what is computed, or refused."""

import equinox as eqx
from flax import nnx
import flax.linen as nn
import haiku as hk
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest

import utilized_rank as ur
from utilized_rank.models.vit import ViT

pytestmark = pytest.mark.slow

T, D, H, E, M = 6, 10, 3, 4, 7
X = jax.ShapeDtypeStruct((2, T, D), jnp.float32)


def shapes(**sizes):
  return {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in sizes.items()}


KERNELS = shapes(q=(D, H, E), k=(D, H, E), v=(D, H, E), o=(H, E, M))


def project(x, w):
  return jnp.einsum('...td,dhe->...the', x, w)


def attend(q, k, v):
  logits = jnp.einsum('...qhe,...khe->...hqk', q, k) / E**0.5
  weights = jax.nn.softmax(logits)
  return jnp.einsum('...hqk,...khe->...qhe', weights, v)


def out(z, w):
  return jnp.einsum('...qhe,hem->...qm', z, w)


def attention(p, x, q=lambda q: q, k=lambda k: k, v=lambda v: v, z=lambda z: z):
  """Attention with something done to one of its values."""
  heads = (project(x, p[name]) for name in 'qkv')
  done = (f(y) for f, y in zip((q, k, v), heads, strict=True))
  return out(z(attend(*done)), p['o'])


def merged(p, x):
  """Heads are cut out of plain matrices, as most code does it."""
  q, k, v = (x @ p[n] + p[f'{n}_bias'] for n in 'qkv')
  q, k, v = (y.reshape(*y.shape[:-1], H, E).swapaxes(-2, -3) for y in (q, k, v))
  logits = q * E**-0.5 @ k.swapaxes(-1, -2)
  z = jax.nn.softmax(logits) @ v
  z = z.swapaxes(-2, -3).reshape(*x.shape[:-1], H * E)
  return z @ p['o'] + p['o_bias']


MERGED = shapes(
  q=(D, H * E), k=(D, H * E), v=(D, H * E), o=(H * E, M),
  q_bias=(H * E,), k_bias=(H * E,), v_bias=(H * E,), o_bias=(M,),
)  # fmt: skip


def rows_and_heads_are_one_axis(p, x):
  """As code for batched products of three axes does it."""
  b, t, _ = x.shape
  q, k, v = (project(x, p[n]).swapaxes(1, 2) for n in 'qkv')  # (b, h, t, e)
  z = jax.nn.softmax(q @ k.swapaxes(-1, -2)) @ v
  z = z.reshape(b * H, t, E).reshape(b, H, t, E).swapaxes(1, 2)
  return z.reshape(b, t, H * E) @ p['o'].reshape(H * E, M)


def one_head(p, x):
  q, k, v = (x @ p[n] for n in 'qkv')
  logits = jnp.einsum('bqd,bkd->bqk', q, k) / 2
  return jnp.einsum('bqk,bkd->bqd', jax.nn.softmax(logits), v) @ p['o']


def grouped(p, x):
  """Three queries share a key; jax.nn.dot_product_attention groups them."""
  q, k, v = (x @ p[n] for n in 'qkv')
  q = q.reshape(*x.shape[:2], 2 * H, E)
  k, v = (y.reshape(*x.shape[:2], 2, E) for y in (k, v))
  z = jax.nn.dot_product_attention(q, k, v)
  return z.reshape(*x.shape[:2], 2 * H * E) @ p['o']


def divided_behind(p, x):
  """Weights are divided by their sum behind the values, as FlashAttention
  does; values have a gate for each position, queries a learned temperature."""
  q, k, v = (project(x, p[n]).swapaxes(1, 2) for n in 'qkv')  # (b, h, t, e)
  v = v * jax.nn.sigmoid(x.sum(-1))[:, None, :, None]
  weights = jnp.exp(q * p['temperature'] @ k.swapaxes(-1, -2))
  z = weights @ v / weights.sum(-1, keepdims=True)
  return out(z.swapaxes(1, 2), p['o'])


def scanned(p, x):
  @jax.checkpoint
  def block(x, p):
    return x + jax.jit(attention)(p, x), None

  return lax.scan(block, x, p)[0]


def stacked(n=2):
  return shapes(q=(n, D, H, E), k=(n, D, H, E), v=(n, D, H, E), o=(n, H, E, D))


POSITIVE = {
  'einsum': (attention, KERNELS, H, E),
  'merged': (merged, MERGED, H, E),
  'one_axis': (rows_and_heads_are_one_axis, KERNELS, H, E),
  'one_head': (one_head, shapes(q=(D, 8), k=(D, 8), v=(D, 8), o=(8, D)), 1, 8),
  'grouped': (
    grouped,
    shapes(q=(D, 6 * E), k=(D, 2 * E), v=(D, 2 * E), o=(6 * E, M)),
    2,
    E,
  ),
  'divided_behind': (
    divided_behind, KERNELS | shapes(temperature=()), H, E,
  ),
  'scanned': (scanned, stacked(), H, E),
  'vmapped': (lambda p, x: jax.vmap(attention, (None, 0))(p, x), KERNELS, H, E),
}  # fmt: skip


@pytest.mark.parametrize('name', POSITIVE)
def test_pairs_are_found(name):
  fn, params, num_heads, width = POSITIVE[name]
  pairs = ur.find_attention(fn, params, X)
  assert {(p.kind, p.left.path, p.right.path) for p in pairs.values()} == {
    ('query-key', 'q', 'k'),
    ('value-output', 'v', 'o'),
  }
  assert list(pairs) == ['q', 'v'] and not pairs.unseen
  for pair in pairs.values():
    for side in (pair.left, pair.right):
      assert side.width == pair.width == width == pair.full_rank
      sizes = side.layout.sizes(side.shared)
      assert sizes == ((num_heads,) if num_heads > 1 else ())
  if name == 'grouped':
    many = pairs['q'].left, pairs['v'].right
    assert [side.layout.sizes(side.many) for side in many] == [(3,), (3,)]
  if name == 'merged':
    sides = [s for p in pairs.values() for s in (p.left, p.right)]
    assert [s.bias for s in sides] == ['q_bias', 'k_bias', 'v_bias', 'o_bias']


def test_pairs_of_flax_attention():
  linen = nn.MultiHeadDotProductAttention(num_heads=H, qkv_features=H * E)
  params = jax.eval_shape(linen.init, jax.random.key(0), X)
  pairs = ur.find_attention(lambda p, x: linen.apply(p, x), params, X)
  assert list(pairs) == ['params/query/kernel', 'params/value/kernel']
  assert pairs['params/query/kernel'].right.bias == 'params/key/bias'
  assert pairs['params/value/kernel'].right.bias == 'params/out/bias'

  module = nnx.eval_shape(
    lambda: nnx.MultiHeadAttention(H, D, H * E, decode=False, rngs=nnx.Rngs(0))
  )
  graph, params, rest = nnx.split(module, nnx.Param, ...)
  fn = lambda p, x: nnx.merge(graph, p, rest)(x)
  pairs = ur.find_attention(fn, params, X)
  assert [p.right.path.split('/')[0] for p in pairs.values()] == ['key', 'out']


def equinox_attention():
  module = eqx.nn.MultiheadAttention(2, D, key=jax.random.key(0))
  return lambda m, x: jax.vmap(lambda y: m(y, y, y))(x), module


def haiku_attention():
  start = hk.initializers.VarianceScaling(1.0)
  net = hk.without_apply_rng(
    hk.transform(lambda x: hk.MultiHeadAttention(2, E, w_init=start)(x, x, x))
  )
  return net.apply, net.init(jax.random.key(0), jnp.ones(X.shape))


@pytest.mark.parametrize('make', [equinox_attention, haiku_attention])
def test_attention_of_other_frameworks_runs_narrow(make):
  """Equinox keeps kernels transposed; both cut heads out of matrices."""
  fn, params = make()
  x = jax.random.normal(jax.random.key(1), (8, T, D))
  pairs = ur.find_attention(fn, params, x)
  assert [p.kind for p in pairs.values()] == ['query-key', 'value-output']
  moments = ur.capture(fn)(params, x)[1]
  ranks = ur.uniform_head_ranks(pairs, params_fraction=0.7)
  small = ur.factorize_heads(params, moments, pairs, ranks)
  assert ur.count_params(small) < ur.count_params(params)
  # The same sums of float32 in another order.
  np.testing.assert_allclose(
    ur.low_rank(fn)(small, x), fn(ur.merge(small), x), atol=1e-5
  )


def test_pairs_of_a_scanned_vit():
  model = ViT(
    10, patch_size=2, width=8, depth=2, heads=2, mlp_dim=12, scan=True
  )
  images = jax.ShapeDtypeStruct((3, 4, 4, 1), jnp.float32)
  params = jax.eval_shape(model.init, jax.random.key(0), images)
  pairs = ur.find_attention(lambda p, x: model.apply(p, x), params, images)
  assert [p.kind for p in pairs.values()] == ['query-key', 'value-output']
  assert [len(p.left.loops) for p in pairs.values()] == [1, 1]


def rotated(q):
  angle = jnp.arange(T)[:, None, None] * jnp.ones(E // 2)
  a, b = jnp.split(q, 2, -1)
  return jnp.concatenate(
    [a * jnp.cos(angle) - b * jnp.sin(angle), a * jnp.sin(angle)], -1
  )


def normed(q):
  return q / jnp.sqrt(jnp.mean(q * q, -1, keepdims=True))


def with_(**changes):
  return lambda p, x: attention(p, x, **changes)


def linear(p, x):
  """Attention without weights between rows."""
  q, k, v = (project(x, p[n]) for n in 'qkv')
  state = jnp.einsum('bthe,bthf->bhef', k, v)
  return out(jnp.einsum('bthe,bhef->bthf', q, state), p['o'])


def indexed(p, x):
  return attention({k: w[0] for k, w in p.items()}, x)


def loops_differ(p, x):
  """One kernel of keys for all steps."""
  k = p['k']
  body = lambda x, w: (x + attention({**w, 'k': k}, x), None)
  return lax.scan(body, x, {n: p[n] for n in 'qvo'})[0]


def outputs_differ(p, x):
  o = p['o']
  body = lambda x, w: (x + attention({**w, 'o': o}, x), None)
  return lax.scan(body, x, {n: p[n] for n in 'qkv'})[0]


def several_meet_one(p, x):
  q = jnp.einsum('gtd,gde->gte', x[0][None].repeat(3, 0), p['q'])
  return jnp.einsum('gte,se->gts', q, x[0] @ p['k'])


def heads_differ(p, x):
  q = jnp.einsum('btd,dgfe->btgfe', x, p['q']).reshape(2, T, 4, E)
  return jnp.einsum('bqhe,bkhe->bhqk', q, project(x, p['k']))


def values(p, x, finish):
  """One head's sum over rows, and something after it."""
  weights = jax.nn.softmax(jnp.einsum('btd,bsd->bts', x, x))
  return finish(p, weights, jnp.einsum('bts,bs...->bt...', weights, x @ p['v']))


def many_features(p, x):
  v = project(x, p['v'])
  weights = jnp.einsum('btd,bsd->bts', x, x)
  return out(jnp.einsum('bts,bshe->bthe', weights, v), p['o'])


def second_use(p, x):
  return attention(p, x) + jnp.sum(project(x, p['v']))


def looked_up(p, x):
  return attention(p, x) + p['q'][jnp.argmax(x[0, 0]), 0, 0]


def chained(p, x):
  """The output kernel makes the queries of the next product."""
  y = attention(p, x)
  return jnp.einsum('bqm,bkm->bqk', y, x @ p['k2'])


def shared_bias(p, x):
  q, k = x @ p['q'] + p['b'], x @ p['k'] + p['b']
  return q @ k.swapaxes(1, 2)


def whole(p, x):
  q, k = jnp.int32(x) @ p['q'], jnp.int32(x) @ p['k']
  return q @ k.swapaxes(1, 2)


PLAIN = dict(q=(D, E), k=(D, E), v=(D, 8), o=(8, M))
VALUE = lambda **o: shapes(v=(D, 8), **o)
# Function, parameters, path, what is said of it.
NEGATIVE = {
  'rope': (with_(q=rotated), KERNELS, 'q', 'meets split'),
  'its_partner': (
    with_(q=rotated), KERNELS, 'k', 'contracted over its features with what',
  ),
  'norm': (with_(k=normed), KERNELS, 'k', 'is used more than once'),
  'nonlinearity': (with_(v=jnp.tanh), KERNELS, 'v', 'its output meets tanh'),
  'after': (with_(z=jnp.tanh), KERNELS, 'v', 'summed over rows, meets tanh'),
  'scale': (
    with_(q=lambda q: q * jnp.arange(4.0)), KERNELS, 'q', 'meets mul',
  ),
  'scale_behind': (
    with_(z=lambda z: z / jnp.arange(1.0, 5.0)), KERNELS, 'v', 'meets div',
  ),
  'scale_of_heads': (
    with_(q=lambda q: q * jnp.arange(3.0)[:, None]), KERNELS, 'q', 'meets mul',
  ),
  'divides': (with_(z=lambda z: 1 / z), KERNELS, 'v', 'meets div'),
  'dropout': (
    with_(v=lambda v: jnp.where(v[0, 0, 0, 0] > 0, v, 0)), KERNELS, 'v',
    'is used more than once',
  ),
  'reshape': (
    with_(v=lambda v: v.reshape(2, H, T, E).swapaxes(1, 2)), KERNELS, 'v',
    'a reshape that mixes',
  ),
  'end': (attention, KERNELS, 'o', None),
  'linear': (linear, KERNELS, 'k', 'otherwise than over one axis of heads'),
  'indexed': (indexed, stacked(), 'q', 'one of several kernels'),
  'indexed_values': (indexed, stacked(), 'v', 'one of several kernels'),
  'loops': (
    loops_differ, {**stacked(), 'k': KERNELS['k']}, 'k', 'another loop',
  ),
  'outputs': (
    outputs_differ,
    {**stacked(), 'o': shapes(o=(H, E, D))['o']},
    'v',
    'another loop',
  ),
  'groups': (
    several_meet_one, shapes(q=(3, D, E), k=(D, E)), 'q', 'several kernels',
  ),
  'heads': (
    heads_differ, shapes(q=(D, 2, 2, E), k=(D, 4, E)), 'k', 'has heads in',
  ),
  'bottleneck': (
    lambda p, x: x @ p['v'] @ p['o'], shapes(v=(D, 3), o=(3, M)), 'v',
    "meets the kernel 'o' at once",
  ),
  'features': (many_features, KERNELS, 'v', '2 axes of features'),
  'second_sum': (
    lambda p, x: values(p, x, lambda p, w, z: w @ z @ p['o']),
    VALUE(o=(8, M)), 'v', 'a second sum over rows',
  ),
  'cut': (
    lambda p, x: values(
      p, x,
      lambda p, w, z: jnp.einsum('btfe,fem', z.reshape(2, T, 2, 4), p['o']),
    ),
    VALUE(o=(2, 4, M)), 'v', 'cut otherwise',
  ),
  'one_by_one': (
    lambda p, x: jnp.einsum(
      'bqhe,hem->bqhm',
      attend(*(project(x, p[n]) for n in 'qkv')), p['o'],
    ),
    KERNELS, 'v', 'over its heads one by one',
  ),
  'not_all': (
    lambda p, x: attend(*(project(x, p[n]) for n in 'qkv')) @ p['o'],
    {**KERNELS, **shapes(o=(E, M))}, 'v', 'not meet \'o\' with all',
  ),
  'kernel_cuts': (
    lambda p, x: attend(*(project(x, p[n]) for n in 'qkv')).reshape(2, T, 12)
    @ p['o'].reshape(12, M),
    {**KERNELS, **shapes(o=(E, H, M))}, 'v', 'whose axes cut its heads',
  ),
  'kernel_cuts_finer': (
    lambda p, x: attend(*(project(x, p[n]) for n in 'qkv')).reshape(2, T, 12)
    @ p['o'].reshape(12, M),
    {**KERNELS, **shapes(o=(H, 2, 2, M))}, 'v', 'whose axes cut its heads',
  ),
  'broadcast': (
    lambda p, x: values(
      p, x,
      lambda p, w, z: jnp.einsum(
        'bte,tem->bm', z, jnp.broadcast_to(p['o'], (T, 8, M))
      ),
    ),
    VALUE(o=(8, M)), 'v', 'broadcast, then contracted',
  ),
  'twice': (second_use, KERNELS, 'v', 'the kernel of 2 products'),
  'partner': (second_use, KERNELS, 'o', 'its partner v: it is the kernel'),
  'lookup': (looked_up, KERNELS, 'q', 'also used by'),
  'chained': (
    chained, {**KERNELS, **shapes(k2=(D, M))}, 'o', 'in two pairs',
  ),
  'bias': (
    shared_bias, shapes(q=(D, E), k=(D, E), b=(E,)), 'q', "bias 'b' is used",
  ),
  'scaled_bias': (
    lambda p, x: (x @ p['q'] * 2 + p['b']) @ (x @ p['k']).swapaxes(1, 2),
    shapes(q=(D, E), k=(D, E), b=(E,)), 'q', 'its output meets add',
  ),
  'integers': (
    whole,
    {n: jax.ShapeDtypeStruct((D, E), jnp.int32) for n in 'qk'},
    'q',
    'it is int32',
  ),
}  # fmt: skip


@pytest.mark.parametrize('name', NEGATIVE)
def test_anything_else_is_refused_and_said(name):
  fn, params, path, phrase = NEGATIVE[name]
  pairs = ur.find_attention(fn, params, X)
  in_pairs = {s.path for p in pairs.values() for s in (p.left, p.right)}
  if phrase is None:  # the case itself is sound
    assert path in in_pairs
    return
  assert path not in in_pairs
  assert phrase in pairs.unseen[path]
  assert phrase in str(pairs)


def test_the_other_pair_is_found_beside_a_refused_one():
  pairs = ur.find_attention(with_(q=rotated), KERNELS, X)
  assert list(pairs) == ['v']
  assert set(pairs.unseen) == {'q', 'k'}


def test_names_of_pairs():
  pairs = ur.find_attention(with_(v=jnp.tanh), KERNELS, X)
  assert pairs['q'].right.path == 'k'
  with pytest.raises(KeyError, match="of 'k' has the name 'q'"):
    pairs['k']
  with pytest.raises(KeyError, match='in no pair: its output meets tanh'):
    pairs['v']
  with pytest.raises(KeyError, match='no kernel'):
    pairs['w']

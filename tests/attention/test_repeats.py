"""Keys and values that are repeated over the queries' heads, and literals."""

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest
import references

import utilized_rank as ur

pytestmark = pytest.mark.slow

D, M, H, G, E, T = 9, 7, 2, 3, 4, 5  # G queries share each of H keys
KERNELS = {
  'q': (D, G * H * E), 'k': (D, H * E), 'v': (D, H * E), 'o': (G * H * E, M),
}  # fmt: skip


def normal(shapes, seed=0):
  rng = np.random.default_rng(seed)
  return {n: rng.normal(size=s) for n, s in shapes.items()}


def attend(p, x, repeat, at=2, count=H):
  """As Llama's code does it: one head of keys for every head of queries."""

  def heads(n):
    y = x @ p[n]
    if f'{n}_bias' in p:
      y = y + p[f'{n}_bias']
    return y.reshape(*x.shape[:2], -1, E)

  q, k, v = map(heads, 'qkv')
  assert k.shape[2] == count
  if at == 1:  # repeated behind the transposition
    q, k, v = (y.swapaxes(1, 2) for y in (q, k, v))
    k, v = repeat(k, 1), repeat(v, 1)
  else:
    k, v = repeat(k, 2), repeat(v, 2)
    q, k, v = (y.swapaxes(1, 2) for y in (q, k, v))
  weights = jax.nn.softmax(q @ k.swapaxes(-1, -2) / 2)
  z = (weights @ v).swapaxes(1, 2)
  return z.reshape(*x.shape[:2], -1) @ p['o']


def broadcast(y, axis):
  shape = (*y.shape[: axis + 1], G, *y.shape[axis + 1 :])
  y = jnp.broadcast_to(jnp.expand_dims(y, axis + 1), shape)
  return y.reshape(*shape[:axis], -1, *shape[axis + 2 :])


def tile(y, axis):
  return jnp.tile(y, [G if i == axis else 1 for i in range(y.ndim)])


def repeat(y, axis):
  return jnp.repeat(y, G, axis)


def copied_first(y, axis):
  """Copies are made in front and moved to where they belong."""
  y = jnp.moveaxis(jnp.broadcast_to(y, (G, *y.shape)), 0, axis + 1)
  return y.reshape(*y.shape[:axis], -1, *y.shape[axis + 2 :])


def kernels_of_three_axes(p, x):
  p = {n: jnp.asarray(w) for n, w in p.items()}
  q = jnp.einsum('btd,dhe->bthe', x, p['q'].reshape(D, G * H, E))
  k, v = (jnp.einsum('btd,dhe->bthe', x, p[n].reshape(D, H, E)) for n in 'kv')
  k, v = repeat(k, 2), repeat(v, 2)
  weights = jax.nn.softmax(jnp.einsum('bqhe,bkhe->bhqk', q, k) / 2)
  z = jnp.einsum('bhqk,bkhe->bqhe', weights, v)
  return jnp.einsum('bqhe,hem->bqm', z, p['o'].reshape(G * H, E, M))


def one_call(p, x):
  """jax.nn's attention, given keys that are repeated already."""
  q, k, v = ((x @ p[n]).reshape(*x.shape[:2], -1, E) for n in 'qkv')
  z = jax.nn.dot_product_attention(q, repeat(k, 2), repeat(v, 2))
  return z.reshape(*x.shape[:2], -1) @ p['o']


def with_(repeat, **kwargs):
  return lambda p, x: attend(p, x, repeat, **kwargs)


FORMS = {
  'repeat': with_(repeat),
  'behind': with_(repeat, at=1),
  'broadcast': with_(broadcast),
  'tile': with_(tile),
  'copied_first': with_(copied_first),
  'in_a_jit': lambda p, x: jax.jit(
    with_(jax.checkpoint(repeat, static_argnums=1))
  )(p, x),
  'three_axes': kernels_of_three_axes,
  'one_call': one_call,
  'vmapped': lambda p, x: jax.vmap(lambda y: with_(repeat)(p, y[None])[0])(x),
}


def heads_of(w, form):
  """A query kernel as (d, keys, queries of a key, e)."""
  if form == 'tile':
    return w.reshape(D, G, H, E).swapaxes(1, 2)
  return w.reshape(D, H, G, E)


def loss(outputs, batch):
  del batch
  return jnp.sum(jnp.sin(outputs * jnp.arange(1.0, 1 + M)), (1, 2))


def data(n=48):
  rows = references.correlated_rows(
    np.random.default_rng(7), n * T, D, mean=0.4
  )
  return rows.reshape(n, T, D)


@pytest.mark.parametrize('form', FORMS)
def test_repeated_keys_and_values_make_pairs(form):
  fn, params, x = FORMS[form], normal(KERNELS), data()
  with jax.enable_x64(True):
    pairs = ur.find_attention(fn, params, x)
    assert {(p.left.path, p.right.path) for p in pairs.values()} == {
      ('q', 'k'), ('v', 'o'),
    }  # fmt: skip
    for pair in pairs.values():
      one = [pair.left, pair.right]
      assert [s.width for s in one] == [E, E] and pair.full_rank == E
      assert [s.layout.sizes(s.shared) for s in one] == [(H,), (H,)]
      many = [s.layout.sizes(s.many) for s in one]
      assert many == [(G,), ()] if pair.left.path == 'q' else [(), (G,)]
    moments = ur.collect(fn, params, [x], loss=loss, progress=False)
    s = references.second_moment(x.reshape(-1, D))
    values, vectors = np.linalg.eigh(s)
    whiten = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    for method in ('output', 'loss'):
      full = ur.factorize_heads(
        params, moments, pairs, {'q': E, 'v': E}, method=method
      )
      np.testing.assert_allclose(
        ur.low_rank(fn)(full, x), fn(params, x), atol=1e-10
      )
      small = ur.factorize_heads(
        params, moments, pairs, {'q': E // 2, 'v': E // 2}, method=method
      )
      tree = jax.tree.map(np.asarray, ur.merge(small))
      np.testing.assert_allclose(
        ur.low_rank(fn)(small, x), fn(tree, x), atol=1e-10
      )
      kept = sum(ur.count_params(small[n]) for n in 'qkvo')
      assert 2 * kept == sum(w.size for w in params.values())
      if method == 'loss':
        continue
      # All queries of a key have one bound: that of their logits as one SVD.
      for head in range(H):
        products = []
        for p in (params, tree):
          q = heads_of(p['q'], form)[:, head]
          k = p['k'].reshape(D, H, E)[:, head]
          products.append([whiten @ q[:, g] @ k.T @ whiten for g in range(G)])
        old, new = (np.concatenate(y) for y in products)
        least = np.linalg.svd(old, compute_uv=False)[E // 2 :]
        np.testing.assert_allclose(
          np.sum((old - new) ** 2), np.sum(least**2), rtol=1e-6
        )


def test_narrow_heads_beat_pairs_of_as_many_parameters():
  """The logits of repeated keys: rank 2 of 4 against pairs of that cost."""
  fn, params, x = FORMS['repeat'], normal(KERNELS), data()
  with jax.enable_x64(True):
    pairs = ur.find_attention(fn, params, x)
    moments = ur.collect(fn, params, [x], progress=False)
    joint = ur.merge(ur.factorize_heads(params, moments, pairs, {'q': 2}))
    ranks = {}
    for n in 'qk':
      d, m = KERNELS[n]
      ranks[n] = d * m // 2 // (d + m)
    alone = ur.merge(
      ur.factorize(params, moments, ranks, compensate_mean=False)
    )
  rows = x.reshape(-1, D)

  def error(tree):
    total = 0.0
    for head in range(H):
      logits = [
        (rows @ heads_of(np.asarray(p['q']), 'repeat')[:, head, g])
        @ (rows @ np.asarray(p['k']).reshape(D, H, E)[:, head]).T
        for p in (params, tree)
        for g in range(G)
      ]
      total += np.mean((np.stack(logits[:G]) - np.stack(logits[G:])) ** 2)
    return total

  assert error(joint) < error(alone)


def test_biases_before_the_repeat_are_found():
  shapes = KERNELS | {'k_bias': (H * E,), 'v_bias': (H * E,)}
  params, x = normal(shapes), data()
  with jax.enable_x64(True):
    pairs = ur.find_attention(FORMS['repeat'], params, x)
    assert (
      pairs['q'].right.bias == 'k_bias' and pairs['v'].left.bias == 'v_bias'
    )
    moments = ur.collect(FORMS['repeat'], params, [x], progress=False)
    small = ur.factorize_heads(params, moments, pairs, {'q': E, 'v': E})
    np.testing.assert_allclose(
      ur.low_rank(FORMS['repeat'])(small, x),
      FORMS['repeat'](params, x),
      atol=1e-10,
    )


def test_one_key_for_all_queries():
  shapes = KERNELS | {
    'k': (D, E),
    'v': (D, E),
    'q': (D, G * E),
    'o': (G * E, M),
  }
  fn, params, x = with_(repeat, count=1), normal(shapes), data()
  with jax.enable_x64(True):
    pairs = ur.find_attention(fn, params, x)
    assert list(pairs) == ['q', 'v']
    assert pairs['q'].left.layout.sizes(pairs['q'].left.many) == (G,)
    moments = ur.collect(fn, params, [x], progress=False)
    small = ur.factorize_heads(params, moments, pairs, {'q': E, 'v': E})
    np.testing.assert_allclose(
      ur.low_rank(fn)(small, x), fn(params, x), atol=1e-10
    )


def test_layers_of_a_scan_repeat_their_keys():
  shapes = {n: (2, *s) for n, s in KERNELS.items()}
  params, x = normal(shapes | {'o': (2, G * H * E, D)}), data()

  def fn(p, x):
    block = lambda x, p: (x + attend(p, x, repeat) / 100, None)
    return lax.scan(block, x, p)[0]

  with jax.enable_x64(True):
    pairs = ur.find_attention(fn, params, x)
    assert [len(p.left.loops) for p in pairs.values()] == [1, 1]
    moments = ur.collect(fn, params, [x], progress=False)
    small = ur.factorize_heads(params, moments, pairs, {'q': E, 'v': E})
    np.testing.assert_allclose(
      ur.low_rank(fn)(small, x), fn(params, x), atol=1e-10
    )


def shifted(p, x):
  """A bias for every head of queries is not the keys' own."""
  y = lambda n: (x @ p[n]).reshape(*x.shape[:2], -1, E)
  k = repeat(y('k'), 2) + p['b']
  return jnp.einsum('bqhe,bkhe->bhqk', y('q'), k)


def features_repeated(p, x):
  q = (x @ p['q']).reshape(*x.shape[:2], H, 2 * E)
  k = (x @ p['k']).reshape(*x.shape[:2], H, E)
  return jnp.einsum('bqhe,bkhe->bhqk', q, jnp.repeat(k, 2, 3))


def scaled(p, x):
  y = lambda n: (x @ p[n]).reshape(*x.shape[:2], -1, E)
  k = repeat(y('k'), 2) * jnp.arange(1.0, 1 + G * H)[:, None]
  return jnp.einsum('bqhe,bkhe->bhqk', y('q'), k)


def cut_elsewhere(p, x):
  """Six queries in pairs meet keys that are repeated in threes."""
  q = jnp.einsum('btd,dgfe->btgfe', x, p['q']).reshape(*x.shape[:2], 6, E)
  k = (x @ p['k']).reshape(*x.shape[:2], H, E)
  return jnp.einsum('bqhe,bkhe->bhqk', q, repeat(k, 2))


@pytest.mark.parametrize(
  ('fn', 'shapes', 'phrase'),
  [
    (shifted, {'b': (G * H, E)}, 'meets add'),
    (features_repeated, {'q': (D, H * 2 * E)}, 'otherwise than over one axis'),
    (scaled, {}, 'meets mul'),
    (cut_elsewhere, {'q': (D, 3, 2, E)}, 'has heads in'),
  ],
)
def test_other_repeats_are_refused_and_said(fn, shapes, phrase):
  wanted = {n: KERNELS[n] for n in 'qk'} | shapes
  pairs = ur.find_attention(fn, normal(wanted), data(2))
  assert not pairs and phrase in pairs.unseen['k']


# --- literals ---


def full(value):
  return lambda m: jnp.full(m.shape, value)


MASKS = {
  'zero_or_low': lambda m: jnp.where(m, 0.0, -1e30),
  'infinite': lambda m: jnp.where(m, 0.0, -jnp.inf),
  'select': lambda m: lax.select(m, full(0.0)(m), full(-1e9)(m)),
  'product': lambda m: (1 - jnp.where(m, 1.0, 0.0)) * -1e9,
  'branches': lambda m: lax.cond(
    jnp.cos(1.0) > 0, lambda m: jnp.where(m, 0.0, -1e9), full(-1.0), m
  ),
  'loop': lambda m: lax.fori_loop(
    0, 2, lambda i, s: s + jnp.where(m, 0.0, -1e9), full(0.0)(m)
  ),
  'in_a_jit': lambda m: jax.jit(lambda m, low: jnp.where(m, 0.0, low))(m, -1e9),
}


@pytest.mark.parametrize('mask', MASKS)
def test_masks_of_literals_hide_no_pair(mask):
  shapes = {'q': (D, H * E), 'k': (D, H * E), 'v': (D, H * E), 'o': (H * E, M)}
  params, x = normal(shapes), data(24)
  valid = np.arange(T) < 3 + np.arange(24)[:, None] % 3

  def fn(p, batch):
    x, m = batch['x'], batch['m'][:, None, None, :]
    heads = lambda n: (x @ p[n]).reshape(*x.shape[:2], H, E).swapaxes(1, 2)
    logits = heads('q') @ heads('k').swapaxes(-1, -2) + MASKS[mask](m)
    z = (jax.nn.softmax(logits) @ heads('v')).swapaxes(1, 2)
    y = z.reshape(*x.shape[:2], -1) @ p['o']
    return y * jnp.where(batch['m'], 1.0, 0.0)[..., None]

  batch = {'x': x, 'm': valid}
  with jax.enable_x64(True):
    pairs = ur.find_attention(fn, params, batch)
    assert list(pairs) == ['q', 'v']
    moments = ur.collect(fn, params, [batch], mask='m', progress=False)
    small = ur.factorize_heads(params, moments, pairs, {'q': E, 'v': E})
    np.testing.assert_allclose(
      ur.low_rank(fn)(small, batch), fn(params, batch), atol=1e-10
    )


def test_compress_with_a_loss_tries_heads_behind_a_mask():
  shapes = {'q': (D, H * E), 'k': (D, H * E), 'v': (D, H * E), 'o': (H * E, M)}
  params, x = jax.tree.map(np.float32, (normal(shapes), data(64)))

  def fn(p, batch):
    x, m = batch['x'], batch['m']
    heads = lambda n: (x @ p[n]).reshape(*x.shape[:2], H, E).swapaxes(1, 2)
    mask = jnp.where(m[:, None, None, :], 0.0, -1e30)
    weights = jax.nn.softmax(heads('q') @ heads('k').swapaxes(-1, -2) + mask)
    z = (weights @ heads('v')).swapaxes(1, 2).reshape(*x.shape[:2], -1)
    return z @ p['o']

  batches = [{'x': x, 'm': np.arange(T) < 3 + np.arange(64)[:, None] % 3}]
  small, _ = ur.compress(
    fn, params, batches, params_fraction=0.6, loss=loss, progress=False
  )
  assert ur.count_params(small) <= 0.6 * ur.count_params(params)
  assert np.isfinite(ur.low_rank(fn)(small, batches[0])).all()

"""One left factor for kernels that read one value: q, k and v; gate and up."""

import itertools
import re

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from references import second_moment
from references import squared_error

import utilized_rank as ur
from utilized_rank.lowrank import stack
from utilized_rank.walk import compat

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(0)
QKV = ('q', 'k', 'v')


def draw(*shape):
  return RNG.normal(size=shape).astype(np.float32)


@pytest.fixture(scope='module')
def problem():
  """Three projections of one value, two of them with heads; then another."""
  base = draw(8, 6)
  params = {
    'k': draw(8, 4) / 3 + base[:, :4] / 2,
    'o': draw(12, 3),
    'q': (draw(8, 6) / 3 + base / 2).reshape(8, 2, 3),
    'v': (draw(8, 4) / 3 + base[:, 2:] / 2).reshape(8, 2, 2),
    'v_bias': draw(2, 2),
  }

  def fn(p, x):
    q = jnp.einsum('bd,dhe->bhe', x, p['q']).reshape(len(x), 6)
    k = x @ p['k']
    v = jnp.einsum('bd,dhe->bhe', x, p['v']) + p['v_bias']
    y = jnp.concatenate([jnp.tanh(q), jnp.sin(k), v.reshape(len(x), 4)], 1)
    return y[:, :12] @ p['o']

  x = draw(300, 8) @ draw(8, 8) / 3 + 0.5
  moments = ur.collect(
    fn, params, [x], loss=ur.sampled_cross_entropy(), progress=False
  )
  return fn, jax.tree.map(jnp.asarray, params), moments, x


def side_by_side(params):
  return np.concatenate(
    [np.float64(params[n]).reshape(8, -1) for n in QKV], axis=1
  )


# --- the optimum ---


def gradient_blocks(moments):
  """G of the three, each damped by a hundredth of its mean diagonal."""
  blocks = []
  for name in QKV:
    g = np.float64(moments[name].grad_second)
    blocks.append(g + 0.01 * np.trace(g) / len(g) * np.eye(len(g)))
  size = sum(map(len, blocks))
  joint, at = np.zeros((size, size)), 0
  for g in blocks:
    joint[at : at + len(g), at : at + len(g)] = g
    at += len(g)
  return joint


def root(matrix):
  values, vectors = np.linalg.eigh(matrix)
  return vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T


@pytest.mark.parametrize('method', ['weight', 'scaled', 'output', 'loss'])
@pytest.mark.parametrize('rank', [2, 5, 7])
def test_no_factor_for_all_three_does_better(problem, method, rank):
  """The least of |S^1/2 (W - W') G^1/2| at its rank, by a plain SVD."""
  _, params, moments, x = problem
  small = ur.factorize(
    params, moments, {QKV: rank}, method=method, compensate_mean=False
  )
  assert small['q'].a.shape == (8, rank)
  for name in ('k', 'v'):
    assert small[name].a is None and small[name].left == 'q'
  wide = side_by_side(params)
  second = second_moment(x)
  left = {
    'weight': np.eye(8),
    'scaled': np.diag(np.sqrt(np.diag(second))),
  }.get(method, root(second))
  right = root(gradient_blocks(moments)) if method == 'loss' else np.eye(14)
  sigma = np.linalg.svd(left @ wide @ right, compute_uv=False)
  least = np.sum(sigma[rank:] ** 2)
  difference = wide - side_by_side(ur.merge(small))
  got = np.sum((left @ difference @ right) ** 2)
  # float32 factors and float32 moments against float64 of both.
  assert got <= least * (1 + 1e-3) + 1e-8 * np.sum(sigma**2)


def test_output_error_is_the_one_predicted(problem):
  fn, params, moments, x = problem
  for compensate in (False, True):
    damage = {}
    for metric_rank in (3, 6):
      small = ur.factorize(
        params,
        moments,
        {QKV: metric_rank},
        method='output',
        compensate_mean=compensate,
      )
      constant = 0.0
      if compensate:
        moved = np.asarray(small['v_bias'] - params['v_bias']).ravel()
        constant = np.r_[np.ravel(small['q'].c), np.ravel(small['k'].c), moved]
      # Written out from the factors themselves.
      a = np.float64(small['q'].a)
      b = [np.float64(small[n].b).reshape(metric_rank, -1) for n in QKV]
      wide = side_by_side(params)
      got = squared_error(
        np.float64(x), wide, a @ np.concatenate(b, axis=1), constant
      )
      centred = np.float64(x) - np.float64(x).mean(0) * compensate
      t = wide.T @ second_moment(centred) @ wide
      least = np.sort(np.linalg.eigvalsh(t))[::-1][metric_rank:].sum()
      # float32 moments: a part in 1e5 of a sum that is 100 times as large.
      np.testing.assert_allclose(got, least, rtol=1e-3)
      damage[metric_rank] = got
    assert damage[6] < damage[3]


def test_predicted_loss_is_a_sum_over_kernels(problem):
  _, params, moments, _ = problem
  for rank in (2, 5):
    small = ur.factorize(
      params, moments, {QKV: rank}, method='loss', compensate_mean=False
    )
    merged, want = ur.merge(small), 0.0
    for name in QKV:
      moment = moments[name]
      d = np.float64(params[name] - merged[name]).reshape(8, -1)
      s, g = np.float64(moment.second), np.float64(moment.grad_second)
      want += 0.5 * np.trace(d.T @ s @ d @ g)
    got = ur.predict_loss(params, moments, {QKV: rank}, compensate_mean=False)
    # Factors were rounded to float32.
    np.testing.assert_allclose(got, want, rtol=1e-3)


# --- running ---


def dots(fn, *args):
  def walk(jaxpr):
    jaxpr, _ = compat.open_jaxpr(jaxpr)
    for eqn in jaxpr.eqns:
      found.append(eqn.primitive.name)
      for inner in compat.sub_jaxprs(eqn):
        walk(inner)

  found = []
  walk(jax.make_jaxpr(fn)(*args))
  return found.count('dot_general')


def test_the_shared_product_is_made_once(problem):
  fn, params, moments, x = problem
  small = ur.factorize(params, moments, {QKV: 5})
  run = ur.low_rank(fn)
  assert dots(run, small, x) == 1 + 3 + 1
  assert dots(run, ur.factorize(params, moments, dict.fromkeys(QKV, 3)), x) == 7
  merged = ur.factorize(params, moments, {QKV: 5}, compensate_mean=False)
  np.testing.assert_allclose(
    run(merged, x), fn(ur.merge(merged), x), rtol=1e-4, atol=1e-4
  )
  assert ur.count_params(merged) == 5 * (8 + 14) + 12 * 3 + 4
  full = ur.factorize(params, moments, {QKV: 8})
  np.testing.assert_allclose(run(full, x), fn(params, x), rtol=1e-4, atol=1e-4)


def test_the_gradient_of_the_left_factor_is_a_sum(problem):
  fn, params, moments, x = problem
  small = ur.factorize(params, moments, {QKV: 4}, compensate_mean=False)
  loss = lambda f: lambda p: jnp.sum(jnp.sin(f(p, np.float64(x[:20]))))
  with jax.enable_x64(True):
    wide = jax.tree.map(np.float64, small)
    got = jax.jit(jax.grad(loss(ur.low_rank(fn))))(wide)
    want = jax.grad(loss(fn))(ur.merge(wide))
    want_a = sum(
      np.reshape(want[n], (8, -1)) @ np.reshape(wide[n].b, (4, -1)).T
      for n in QKV
    )
  np.testing.assert_allclose(got['q'].a, want_a, rtol=1e-9, atol=1e-12)
  assert got['k'].a is None
  assert jax.tree.structure(got) == jax.tree.structure(small)


def test_it_trains_and_keeps_its_structure(problem, tmp_path):
  fn, params, moments, x = problem
  small = ur.factorize(params, moments, {QKV: 3})
  run, y = ur.low_rank(fn), jnp.sin(x[:, :3])
  loss = lambda p: jnp.mean((run(p, x) - y) ** 2)
  optimizer = optax.adam(1e-2)
  p, state, start = small, optimizer.init(small), loss(small)

  @jax.jit
  def step(p, state):
    updates, state = optimizer.update(jax.grad(loss)(p), state)
    return optax.apply_updates(p, updates), state

  for _ in range(20):
    p, state = step(p, state)
  assert loss(p) < 0.5 * start
  assert jax.tree.structure(p) == jax.tree.structure(small)
  ur.save(tmp_path / 't', p)
  again = ur.load(tmp_path / 't')
  assert jax.tree.structure(again) == jax.tree.structure(p)
  jax.tree.map(np.testing.assert_array_equal, again, p)


# --- stacks ---


def stacked(p, x):
  def body(x, p):
    gate, up = x @ p['gate'], jnp.einsum('dm,bd->bm', p['up'], x)
    return x + (jax.nn.silu(gate) * up) @ p['down'], None

  return lax.scan(jax.checkpoint(body), x, p['blocks'])[0]


def unrolled(p, x):
  for i in range(2):
    block = p[f'block_{i}']
    gate, up = x @ block['gate'], jnp.einsum('dm,bd->bm', block['up'], x)
    x = x + (jax.nn.silu(gate) * up) @ block['down']
  return x


def test_scanned_stacks_share_step_by_step():
  blocks = {
    'gate': draw(2, 6, 9) / 3,
    'up': draw(2, 6, 9) / 3,
    'down': draw(2, 9, 6) / 3,
  }
  params, x = {'blocks': blocks}, draw(80, 6) + 0.5
  moments = ur.collect(stacked, params, [x], progress=False)
  key, run = ('blocks/gate', 'blocks/up'), ur.low_rank(stacked)
  for rank in (4, (2, 4)):
    small = ur.factorize(params, moments, {key: rank}, compensate_mean=False)
    assert small['blocks']['gate'].a.shape == (2, 6, 4)
    want = stacked(ur.merge(small), x)
    np.testing.assert_allclose(run(small, x), want, rtol=1e-4, atol=1e-5)
    grads = jax.jit(jax.grad(lambda p: jnp.sum(run(p, x))))(small)
    assert jax.tree.structure(grads) == jax.tree.structure(small)
  # `up` is on the right of its product, so x A is laid out another way: made
  # twice here, and found equal by XLA at most.
  apart = stack.unstack(small, 'blocks', 'block_{}')
  assert apart['block_1']['up'].left == 'block_1/gate'
  np.testing.assert_allclose(
    ur.low_rank(unrolled)(apart, x), want, rtol=1e-4, atol=1e-5
  )
  again = stack.stack(apart, 'blocks', 'block_{}')
  assert jax.tree.structure(again) == jax.tree.structure(small)
  jax.tree.map(np.testing.assert_array_equal, again, small)


def test_one_scan_step_makes_the_product_once():
  def fn(p, x):
    body = lambda x, p: (jnp.tanh(x @ p['a']) * (x @ p['b']), None)
    return lax.scan(body, x, p)[0]

  params, x = {'a': draw(3, 5, 5), 'b': draw(3, 5, 5)}, draw(40, 5)
  moments = ur.collect(fn, params, [x], progress=False)
  small = ur.factorize(params, moments, {('a', 'b'): 3}, compensate_mean=False)
  assert dots(ur.low_rank(fn), small, x) == 3
  np.testing.assert_allclose(
    ur.low_rank(fn)(small, x), fn(ur.merge(small), x), rtol=1e-4, atol=1e-5
  )


def test_a_factor_held_outside_of_a_stack_is_refused():
  layout = ur.Layout.of((2, 4, 3), groups=(0,), inputs=(1,), outputs=(2,))
  leaf = ur.LowRank(None, draw(2, 2, 3), None, layout, None, 'other/w')
  with pytest.raises(ValueError, match="left factor in 'other/w', outside"):
    stack.unstack({'blocks': {'w': leaf}}, 'blocks', 'block_{}')


# --- the budget ---


@pytest.mark.parametrize('compensate', [False, True])
@pytest.mark.parametrize('fraction', [0.35, 0.5, 0.65, 0.8])
def test_the_budget_decides_to_share_exactly_where_it_pays(
  problem, compensate, fraction
):
  _, params, moments, _ = problem
  ranks = ur.budget_ranks(
    params,
    moments,
    params_fraction=fraction,
    share=True,
    compensate_mean=compensate,
  )
  small = ur.factorize(
    params, moments, ranks, method='loss', compensate_mean=compensate
  )
  dense = sum(int(params[n].size) for n in (*QKV, 'o'))
  budget = int(fraction * dense)
  assert ur.count_params(small) - params['v_bias'].size <= budget
  got = ur.predict_loss(params, moments, ranks, compensate_mean=compensate)
  least = min(_every_loss(params, moments, budget, compensate))
  np.testing.assert_allclose(got, least, rtol=1e-9, atol=1e-12)


def _every_loss(params, moments, budget, compensate):
  loss = lambda ranks: ur.predict_loss(
    params, moments, ranks, compensate_mean=compensate
  )
  constants = {'q': 6, 'k': 4, 'v': 0, 'o': 3}  # v adds a bias of its own
  if not compensate:
    constants = dict.fromkeys(constants, 0)

  def choices(name):
    d, m = moments[name].layout.matrix_shape
    yield d * m, 0.0
    for r in range(1, min(d, m) + 1):
      yield r * (d + m) + constants[name], loss({name: r})

  separate = [
    tuple(map(sum, zip(*pick)))
    for pick in itertools.product(*map(choices, QKV))
  ]
  joint = [
    (r * (8 + 14) + 10 * compensate, loss({QKV: r})) for r in range(1, 9)
  ]
  last = list(choices('o'))
  for cost, damage in [*separate, *joint]:
    for more, further in last:
      if cost + more <= budget:
        yield damage + further


def test_sharing_is_chosen_for_kernels_that_use_the_same_directions():
  left = draw(12, 3)
  params = {n: left @ draw(3, 12) + 0.01 * draw(12, 12) for n in 'ab'}
  fn = lambda p, x: jnp.tanh(x @ p['a']) + x @ p['b']
  moments = ur.collect(fn, params, [draw(100, 12)], progress=False)
  find = lambda **kwargs: ur.budget_ranks(
    params, moments, params_fraction=0.4, compensate_mean=False, **kwargs
  )
  assert find(share=True) == {('a', 'b'): 3}
  assert set(find()) == {'a', 'b'}
  # Limits of a member are limits of the factor for all.
  assert find(share=True, limits=[('a', (1, 2))]) != {('a', 'b'): 3}
  flops = ur.budget_ranks(params, moments, flops_fraction=0.4, share=True)
  assert flops == {('a', 'b'): 3}


# --- refusals ---


def test_what_cannot_share_is_named(problem):
  fn, params, moments, x = problem
  for ranks, message in [
    ({('q', 'o'): 2}, "('q', 'o') cannot share a left factor"),
    ({('q',): 2}, "('q',) cannot share a left factor"),
    ({('q', 'w'): 2}, 'a rank is given for'),
    ({QKV: 2, 'q': 1}, "'q' is given a rank twice"),
    ({('q', 'q'): 2}, "'q' is given a rank twice"),
    ({QKV: 9}, 'a (8, 14) kernel has ranks from 1 to 8'),
    ({QKV: (2, 3)}, '2 ranks for'),
  ]:
    with pytest.raises(ValueError, match=re.escape(message)):
      ur.factorize(params, moments, ranks)
  with pytest.raises(ValueError, match="by the method 'utilized'"):
    ur.factorize(params, moments, {QKV: 2}, method='utilized')
  with pytest.raises(ValueError, match='ranks has kernels that share one'):
    ur.factorize(params, moments, {QKV: 2}, gauge='identity')
  with pytest.raises(ValueError, match='give it, or share=True'):
    ur.budget_ranks(
      params, moments, params_fraction=0.5, gauge='identity', share=True
    )
  blind = ur.collect(fn, params, [x], progress=False)
  with pytest.raises(ValueError, match="'q' have no gradients"):
    ur.factorize(params, blind, {QKV: 2}, method='loss')


def test_a_follower_without_its_leader_is_named(problem):
  fn, params, moments, x = problem
  small = ur.factorize(params, moments, {QKV: 2}, compensate_mean=False)
  with pytest.raises(ValueError, match="held by 'q'.*merge"):
    small['v'].dense()
  broken = {**small, 'q': params['q']}
  for call in (ur.merge, lambda p: ur.low_rank(fn)(p, x)):
    with pytest.raises(ValueError, match="'k' has its left factor in 'q'"):
      call(broken)

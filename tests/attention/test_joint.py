"""Joint factors of attention's kernels are the optima they claim to be."""

import itertools
import re

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest
import references

import utilized_rank as ur

pytestmark = pytest.mark.slow

D, M, H, E, N = 9, 7, 2, 4, 64
SHAPES = {
  'q': (D, H, E), 'k': (D, H, E), 'v': (D, H, E), 'o': (H, E, M),
  'q_bias': (H, E), 'k_bias': (H, E), 'v_bias': (H, E), 'o_bias': (M,),
}  # fmt: skip
RANKS = (1, 2, 3)


def attention(p, x):
  def heads(name):
    y = jnp.einsum('btd,dhe->bthe', x, p[name])
    return y + p[f'{name}_bias'] if f'{name}_bias' in p else y

  logits = jnp.einsum('bqhe,bkhe->bhqk', heads('q'), heads('k')) / 2
  z = jnp.einsum('bhqk,bkhe->bqhe', jax.nn.softmax(logits), heads('v'))
  y = jnp.einsum('bqhe,hem->bqm', z, p['o'])
  return y + p['o_bias'] if 'o_bias' in p else y


def loss(outputs, batch):
  del batch
  scale = jnp.arange(1.0, 1 + outputs.shape[-1])
  return jnp.sum(jnp.sin(outputs * scale), (1, 2))


class Case:
  """Float64 parameters, data and moments."""

  def __init__(self, biases=('q', 'k', 'v', 'o'), seed=0):
    rng = np.random.default_rng(seed)
    left_out = {f'{n}_bias' for n in 'qkvo'} - {f'{n}_bias' for n in biases}
    self.params = {
      n: rng.normal(size=s) for n, s in SHAPES.items() if n not in left_out
    }
    self.x = references.correlated_rows(rng, N * 5, D, mean=0.4)
    self.x = self.x.reshape(N, 5, D)
    with jax.enable_x64(True):
      self.pairs = ur.find_attention(attention, self.params, self.x)
      self.moments = ur.collect(
        attention, self.params, [self.x], loss=loss, progress=False
      )

  def factorized(self, rank, params=None, **kwargs):
    with jax.enable_x64(True):
      small = ur.factorize_heads(
        params or self.params,
        self.moments,
        self.pairs,
        {n: rank for n in self.pairs},
        **kwargs,
      )
      return small, jax.tree.map(np.asarray, ur.merge(small))

  def features(self, tree, name):
    """A kernel's outputs with its bias, (rows, h, e)."""
    y = np.einsum('nd,dhe->nhe', self.x.reshape(-1, D), tree[name])
    return y + tree.get(f'{name}_bias', 0)

  def summed(self, tree):
    """What the output kernel reads, (rows, h, e)."""
    q, k, v = (self.features(tree, n).reshape(N, 5, H, E) for n in 'qkv')
    logits = np.einsum('bqhe,bkhe->bhqk', q, k) / 2
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum('bhqk,bkhe->bqhe', weights, v).reshape(-1, H, E)


@pytest.fixture(scope='module')
def case():
  return Case()


def root(matrix):
  values, vectors = np.linalg.eigh(matrix)
  return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


def augmented(case, name):
  """[W; b] (d + 1, h, e) and the second moment of [x, 1]."""
  w = case.params[name]
  bias = case.params.get(f'{name}_bias', np.zeros((H, E)))
  rows = np.append(case.x.reshape(-1, D), np.ones((N * 5, 1)), 1)
  return np.concatenate([w, bias[None]]), references.second_moment(rows)


def logits_error(case, tree, head):
  """Mean square error of a head's logits, over all pairs of rows."""
  old, new = (
    case.features(p, 'q')[:, head] @ case.features(p, 'k')[:, head].T
    for p in (case.params, tree)
  )
  return np.mean((old - new) ** 2)


@pytest.mark.parametrize('biases', ['qkvo', 'k', ''])
def test_logits_reach_the_bound_of_the_dense_svd(biases):
  case = Case(biases)
  w_q, s = augmented(case, 'q')
  w_k, _ = augmented(case, 'k')
  whiten = root(s)
  for rank in RANKS:
    _, tree = case.factorized(rank)
    for head in range(H):
      full = whiten @ w_q[:, head] @ w_k[:, head].T @ whiten
      least = np.sum(np.linalg.svd(full, compute_uv=False)[rank:] ** 2)
      # Float32 sums would leave 1e-6; these are float64.
      np.testing.assert_allclose(
        logits_error(case, tree, head), least, rtol=1e-6
      )


def test_joint_logits_beat_two_kernels_at_equal_parameters(case):
  """Rank-r heads against q and k, each of the rank of as many parameters."""
  paths = {n: case.moments[n].layout for n in 'qk'}
  for rank in RANKS:
    _, joint = case.factorized(rank)
    d, m = paths['q'].matrix_shape
    alone = max(1, rank * m // E * d // (d + m))
    # In float32: the inequality is not that close.
    params = jax.tree.map(np.float32, case.params)
    small = ur.factorize(
      params, case.moments, dict.fromkeys(paths, alone), compensate_mean=False
    )
    separate = jax.tree.map(np.asarray, ur.merge(small))
    assert alone * (d + m) <= rank * H * d
    for head in range(H):
      assert logits_error(case, joint, head) < logits_error(
        case, separate, head
      )


def output_error(case, tree, head):
  """Mean square of what a head's output loses about its mean."""
  z = case.summed(case.params)[:, head]
  full = z @ case.params['o'][head]
  # v' spans what v P does: P from the values, by least squares.
  v = case.features(case.params, 'v')[:, head]
  p = np.linalg.lstsq(v, case.features(tree, 'v')[:, head], rcond=None)[0]
  lost = full - z @ p @ tree['o'][head]
  return np.mean(np.sum((lost - lost.mean(0)) ** 2, 1))


def test_outputs_reach_the_bound_of_the_dense_svd(case):
  z = case.summed(case.params)
  for rank in RANKS:
    _, tree = case.factorized(rank)
    for head in range(H):
      sigma = np.cov(z[:, head].T, bias=True)
      full = root(sigma) @ case.params['o'][head]
      least = np.sum(np.linalg.svd(full, compute_uv=False)[rank:] ** 2)
      np.testing.assert_allclose(
        output_error(case, tree, head), least, rtol=1e-6
      )


def implied(old, new, rows):
  """P with old P = new on the rows."""
  return np.linalg.lstsq(rows @ old, rows @ new, rcond=None)[0]


def test_loss_factors_minimise_the_metric_of_the_gradient(case):
  """Against the closed form by dense roots; and `output` is no better."""
  damping = 0.01
  moments = case.moments
  q, k = (case.features(case.params, n) for n in 'qk')
  z = case.summed(case.params)
  g_q = moments['q'].grad_second.reshape(H, E, H, E)
  g_o = moments['o'].grad_second
  g_o = g_o + damping * np.trace(g_o) / M * np.eye(M)
  for head in range(H):
    s_q, s_k = (references.second_moment(y[:, head]) for y in (q, k))
    n_q = g_q[head, :, head]
    n_q = n_q + damping * np.trace(n_q) / np.trace(s_k) * s_k
    w = case.params['o'][head]
    problems = {
      'q': (s_q, n_q),
      'v': (np.cov(z[:, head].T, bias=True), w @ g_o @ w.T),
    }
    for rank in RANKS:
      trees = {
        m: case.factorized(rank, method=m)[1] for m in ('loss', 'output')
      }
      for name, (sigma, metric) in problems.items():
        cost = {}
        for method, tree in trees.items():
          p = recovered(case, tree, name, head)
          lost = np.eye(E) - p
          cost[method] = np.trace(lost.T @ sigma @ lost @ metric)
        full = np.linalg.svd(root(sigma) @ root(metric), compute_uv=False)
        np.testing.assert_allclose(
          cost['loss'], np.sum(full[rank:] ** 2), rtol=1e-5
        )
        assert cost['loss'] <= cost['output'] * (1 + 1e-9)


def recovered(case, tree, name, head):
  """P of one head: W_q P W_k^T (biases too), or W_v P W_o."""
  first, second = {'q': ('q', 'k'), 'v': ('v', 'o')}[name]

  def matrix(p, n):
    if n == 'o':
      return p[n][head].T
    return np.append(p[n][:, head], p[f'{n}_bias'][None, head], 0)

  old, new = (
    (matrix(p, first), matrix(p, second)) for p in (case.params, tree)
  )
  left, right = (np.linalg.pinv(w) for w in old)
  return left @ new[0] @ new[1].T @ right.T


@pytest.mark.parametrize('method', ['output', 'loss'])
def test_full_rank_is_the_function(case, method):
  with jax.enable_x64(True):
    small, tree = case.factorized(E, method=method)
    want = attention(case.params, case.x)
    for got in (ur.low_rank(attention)(small, case.x), attention(tree, case.x)):
      np.testing.assert_allclose(got, want, atol=1e-10)
  params, x = jax.tree.map(np.float32, (case.params, case.x))
  moments = ur.collect(attention, params, [x], loss=loss, progress=False)
  small = ur.factorize_heads(
    params, moments, case.pairs, {'q': E, 'v': E}, method=method
  )
  # Weights and logits of unit scale and more: float32 keeps 5 digits.
  want = np.asarray(attention(params, x))
  np.testing.assert_allclose(
    ur.low_rank(attention)(small, x), want, atol=1e-5 * np.abs(want).max()
  )


@pytest.mark.quick
def test_parameters_are_r_of_e(case):
  small, _ = case.factorized(3)
  kernels = sum(ur.count_params(small[n]) for n in 'qkvo')
  assert kernels == 3 * sum(case.params[n].size for n in 'qkvo') // E
  assert all(small[f'{n}_bias'].shape == SHAPES[f'{n}_bias'] for n in 'qkvo')


def test_factors_have_equal_scale(case):
  _, tree = case.factorized(2)
  for head in range(H):
    q = np.append(tree['q'][:, head], tree['q_bias'][None, head], 0)
    k = np.append(tree['k'][:, head], tree['k_bias'][None, head], 0)
    np.testing.assert_allclose(q.T @ q, k.T @ k, atol=1e-8 * np.sum(q * q))


def test_predicted_damage_is_the_error(case):
  """Of values in squares of the output; of the loss in nats per example."""
  with jax.enable_x64(True):
    damages = {
      m: ur.head_damages(case.params, case.moments, case.pairs, method=m)
      for m in ('output', 'loss')
    }
  for rank in RANKS:
    _, tree = case.factorized(rank)
    error = sum(output_error(case, tree, head) for head in range(H))
    np.testing.assert_allclose(damages['output']['v'][rank], error, rtol=1e-6)
  for name in ('q', 'v'):
    # At full rank nothing but rounding is left.
    found = damages['loss'][name]
    assert found[1] < found[0] and found[E] <= 1e-12 * found[0]


def test_the_mean_is_given_back(case):
  z = case.summed(case.params).reshape(-1, H * E)
  want = z @ case.params['o'].reshape(H * E, M) + case.params['o_bias']
  errors = {}
  for compensate in (True, False):
    _, tree = case.factorized(2, compensate_mean=compensate)
    # Queries and keys are left dense: only values are to be judged.
    tree = {**tree, **{n: case.params[n] for n in ('q', 'k')}}
    tree |= {f'{n}_bias': case.params[f'{n}_bias'] for n in ('q', 'k')}
    z = case.summed(tree).reshape(-1, H * E)
    got = z @ tree['o'].reshape(H * E, M) + tree['o_bias']
    errors[compensate] = np.mean((got - want) ** 2)
    if compensate:
      np.testing.assert_allclose(got.mean(0), want.mean(0), atol=1e-8)
    else:
      np.testing.assert_array_equal(tree['o_bias'], case.params['o_bias'])
  assert errors[True] < errors[False]


def grouped(p, x):
  q, k, v = (x @ p[n] for n in 'qkv')
  q = q.reshape(*x.shape[:2], 2 * H, E)
  k, v = (y.reshape(*x.shape[:2], H, E) for y in (k, v))
  z = jax.nn.dot_product_attention(q, k, v)
  return z.reshape(*x.shape[:2], 2 * H * E) @ p['o']


def test_queries_that_share_a_key_share_its_narrow_head(case):
  rng = np.random.default_rng(1)
  sizes = {'q': (D, 2 * H * E), 'k': (D, H * E), 'v': (D, H * E)}
  params = {n: rng.normal(size=s) for n, s in sizes.items()}
  params['o'] = rng.normal(size=(2 * H * E, M))
  rows = case.x.reshape(-1, D)
  s = references.second_moment(rows)
  with jax.enable_x64(True):
    pairs = ur.find_attention(grouped, params, case.x)
    moments = ur.collect(grouped, params, [case.x], loss=loss, progress=False)
    for method, rank in itertools.product(('output', 'loss'), (2, E)):
      small = ur.factorize_heads(
        params, moments, pairs, {'q': rank, 'v': rank}, method=method
      )
      tree = jax.tree.map(np.asarray, ur.merge(small))
      got = ur.low_rank(grouped)(small, case.x)
      np.testing.assert_allclose(got, grouped(tree, case.x), atol=1e-10)
      if rank == E:
        np.testing.assert_allclose(got, grouped(params, case.x), atol=1e-10)
      elif method == 'output':
        for head in range(H):
          error, w_q, w_k = 0.0, [], []
          for p in (params, tree):
            w_q.append(p['q'].reshape(D, H, 2, E)[:, head])
            w_k.append(p['k'].reshape(D, H, E)[:, head])
          full = [
            np.concatenate(
              [root(s) @ q[:, j] @ k.T @ root(s) for j in range(2)]
            )
            for q, k in zip(w_q, w_k)
          ]
          error = np.sum((full[0] - full[1]) ** 2)
          tail = np.linalg.svd(full[0], compute_uv=False)[rank:]
          np.testing.assert_allclose(error, np.sum(tail**2), rtol=1e-6)


def test_members_of_an_ensemble_are_as_if_alone(case):
  """Logits of three pairs of kernels, which a vmap runs over."""
  rng = np.random.default_rng(3)
  params = {n: rng.normal(size=(3, D, H, E)) for n in 'qk'}
  params |= {'k_bias': rng.normal(size=(3, H, E))}

  def logits(p, x):
    q, k = (jnp.einsum('btd,dhe->bthe', x, p[n]) for n in 'qk')
    return jnp.einsum('bqhe,bkhe->bqkh', q, k + p['k_bias'])

  def alone(p, x):
    return jnp.stack([logits(member, x) for member in p], 1)

  apart = [{n: w[i] for n, w in params.items()} for i in range(3)]
  results = []
  with jax.enable_x64(True):
    for fn, p in ((jax.vmap(logits, (0, None), 1), params), (alone, apart)):
      pairs = ur.find_attention(fn, p, case.x)
      moments = ur.collect(
        fn,
        p,
        [case.x],
        loss=lambda y, _: jnp.sum(jnp.sin(y), (1, 2, 3, 4)),
        progress=False,
      )
      for method in ('output', 'loss'):
        small = ur.factorize_heads(
          p, moments, pairs, {n: 2 for n in pairs}, method=method
        )
        results.append(ur.low_rank(fn)(small, case.x))
  np.testing.assert_allclose(results[0], results[2], atol=1e-8)
  np.testing.assert_allclose(results[1], results[3], atol=1e-8)


@pytest.mark.parametrize('rank', [2, E])
def test_a_single_head_with_an_axis_of_its_own(rank, case):
  params = {
    n: w[..., :1, :] if n not in ('o', 'o_bias') else w
    for n, w in case.params.items()
  } | {'o': case.params['o'][:1]}
  with jax.enable_x64(True):
    pairs = ur.find_attention(attention, params, case.x)
    moments = ur.collect(attention, params, [case.x], loss=loss, progress=False)
    small = ur.factorize_heads(
      params, moments, pairs, {'q': rank, 'v': rank}, method='loss'
    )
    got = ur.low_rank(attention)(small, case.x)
    tree = params if rank == E else ur.merge(small)
    np.testing.assert_allclose(got, attention(tree, case.x), atol=1e-10)
  assert small['q_bias'].shape == (1, E)


def scanned(p, x):
  body = lambda x, p: (x + jnp.tanh(attention(p, x)) / 9, None)
  return lax.scan(body, x, p)[0]


def test_layers_of_a_scan_are_as_if_alone():
  rng = np.random.default_rng(2)
  shapes = SHAPES | {'o': (H, E, D), 'o_bias': (D,)}
  params = {n: rng.normal(size=(3, *s)) / 2 for n, s in shapes.items()}
  x = rng.normal(size=(N, 5, D))

  def looped(params, x):
    for p in params:
      x = x + jnp.tanh(attention(p, x)) / 9
    return x

  apart = [{n: w[i] for n, w in params.items()} for i in range(3)]
  results = []
  with jax.enable_x64(True):
    for fn, p in ((scanned, params), (looped, apart)):
      pairs = ur.find_attention(fn, p, x)
      moments = ur.collect(fn, p, [x], loss=loss, progress=False)
      small = ur.factorize_heads(
        p, moments, pairs, {n: 2 for n in pairs}, method='loss'
      )
      results.append(ur.low_rank(fn)(small, x))
  np.testing.assert_allclose(*results, atol=1e-8)


def test_other_kernels_may_be_low_rank_already(case):
  fn = lambda p, x: jnp.tanh(attention(p, x)) @ p['mlp']
  params = case.params | {'mlp': np.random.default_rng(0).normal(size=(M, M))}
  params, x = jax.tree.map(np.float32, (params, case.x))
  moments = ur.collect(fn, params, [x], progress=False)
  pairs = ur.find_attention(fn, params, x)
  one = ur.factorize_heads(
    ur.factorize(params, moments, {'mlp': 2}), moments, pairs, {'q': 2}
  )
  two = ur.factorize(
    ur.factorize_heads(params, moments, pairs, {'q': 2}), moments, {'mlp': 2}
  )
  jax.tree.map(np.testing.assert_array_equal, one, two)
  assert one['v'].shape == SHAPES['v'] and one['mlp'].rank == 2


def test_uniform_ranks_are_shares_of_the_width(case):
  share = lambda f, **kw: ur.uniform_head_ranks(
    case.pairs, params_fraction=f, **kw
  )
  assert share(0.75) == {'q': 3, 'v': 3}
  assert share(0.75, multiple_of=2) == {'q': 2, 'v': 2}
  assert share(1.0) == {}
  with pytest.raises(ValueError, match=re.escape('a share in (0, 1], got 0')):
    share(0)
  with pytest.raises(ValueError, match='leaves heads of 4 features'):
    share(0.2)


def test_budget_is_the_least_predicted_loss(case):
  damages = ur.head_damages(case.params, case.moments, case.pairs)
  cost = {n: p.cost for n, p in case.pairs.items()}
  total = sum(c * E for c in cost.values())
  for fraction in (0.3, 0.5, 0.8, 1.0):
    ranks = ur.budget_head_ranks(
      case.params, case.moments, case.pairs, params_fraction=fraction
    )
    got = {n: ranks.get(n, E) for n in cost}
    value = lambda r: sum(damages[n][r[n]] for n in cost)
    spent = lambda r: sum(cost[n] * r[n] for n in cost)
    every = [
      dict(zip(cost, r))
      for r in itertools.product(range(1, E + 1), repeat=len(cost))
    ]
    least = min(value(r) for r in every if spent(r) <= fraction * total)
    assert spent(got) <= fraction * total
    assert value(got) <= least * (1 + 1e-9)
  with pytest.raises(ValueError, match='a share in'):
    ur.budget_head_ranks(
      case.params, case.moments, case.pairs, params_fraction=2
    )


@jax.enable_x64(True)
def test_errors_name_what_is_wrong(case):
  def attempt(params=case.params, moments=case.moments, ranks=None, **kwargs):
    return ur.factorize_heads(
      params, moments, case.pairs, ranks or {'q': 2}, **kwargs
    )

  with pytest.raises(ValueError, match="unknown method 'weight'"):
    attempt(method='weight')
  with pytest.raises(ValueError, match="a rank is given for 'k'"):
    attempt(ranks={'k': 2})
  for rank in (0, E + 1, 1.5):
    with pytest.raises(ValueError, match='4 features have ranks from 1 to 4'):
      attempt(ranks={'q': rank})
  small = attempt()
  with pytest.raises(ValueError, match="'q' is low-rank already"):
    attempt(small)
  without = lambda name: {n: w for n, w in case.params.items() if n != name}
  with pytest.raises(ValueError, match="no parameter 'v'"):
    attempt(without('v'), ranks={'v': 2})
  with pytest.raises(ValueError, match="no bias 'k_bias'"):
    attempt(without('k_bias'))
  with pytest.raises(ValueError, match="'v' has shape .* was found for"):
    attempt(case.params | {'v': np.ones((D, H, 5))}, ranks={'v': 2})
  plain = ur.Moments(case.moments.table, case.moments.sums)
  for name, kernel in (('q', 'q'), ('v', 'o')):
    with pytest.raises(ValueError, match=f"moments of '{kernel}' have no grad"):
      attempt(moments=plain, ranks={name: 2}, method='loss')
  few = ur.capture(attention, select=[('v', True)])(case.params, case.x)[1]
  with pytest.raises(ValueError, match="no moments for '[qk]'"):
    attempt(moments=few)


def test_heads_without_data_give_the_kernels_back():
  """A moment of zeros: the kernels alone decide, and full rank is exact."""
  case = Case()
  zero = jax.tree.map(np.zeros_like, case.moments)
  zero = jax.tree.map(
    lambda new, old: old if old.dtype == np.int32 else new, zero, case.moments
  )
  with jax.enable_x64(True):
    for method in ('output', 'loss'):
      small = ur.factorize_heads(
        case.params, zero, case.pairs, {'q': E, 'v': E}, method=method
      )
      np.testing.assert_allclose(
        ur.low_rank(attention)(small, case.x),
        attention(case.params, case.x),
        atol=1e-10,
      )

"""Anchored factors: their theorems in float64, and the sweep over blocks."""

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest
import references

import utilized_rank as ur
from utilized_rank.linalg import best_pairs
from utilized_rank.linalg import subspace
from utilized_rank.refit import anchored_fit
from utilized_rank.refit import blocks

pytestmark = pytest.mark.slow

SHAPES = [(7, 10), (10, 7), (8, 8)]
RANK = 3


def pair_of_inputs(rng, n, d, same=False):
  x = references.correlated_rows(rng, n, d, 0.7, 0.3)
  return x, x if same else x + 0.4 * rng.normal(size=x.shape) @ np.diag(
    0.7 ** np.arange(d)
  )


def moments_of(x, x_hat):
  h, k = x_hat.T @ x_hat / len(x), x_hat.T @ x / len(x)
  return anchored_fit.Inputs(
    h, k, x.mean(0), x_hat.mean(0), subspace.input_basis(h)
  )


def best(w, inputs, ridge, g=None, rank=RANK):
  of = anchored_fit.target(w, inputs, ridge)
  # As good as no damping: the theorems are about G itself.
  f = anchored_fit.factors(of, g, 1e-12)
  return f.a[:, :rank] @ f.b[:rank]


def objective(x, x_hat, w, approximation, lam, g):
  """E|(x W - xhat W') R|^2 + lam |(W - W') R|^2, from the rows."""
  residual = x @ w - x_hat @ approximation
  difference = w - approximation
  data = np.mean(np.sum((residual @ g) * residual, axis=1))
  return data + lam * np.sum((difference @ g) * difference)


def problem(shape, seed=0, n=60, same=False):
  rng = np.random.default_rng(seed)
  d, m = shape
  x, x_hat = pair_of_inputs(rng, n, d, same)
  spread = rng.normal(size=(m, m))
  g = spread @ spread.T / m + 0.1 * np.eye(m)
  return rng, x, x_hat, rng.normal(size=shape), g


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('weighted', [False, True])
def test_the_closed_form_is_that_of_the_square_roots(shape, weighted):
  _, x, x_hat, w, g = problem(shape)
  g = g if weighted else np.eye(shape[1])
  inputs = moments_of(x, x_hat)
  d, ridge = shape[0], 0.2
  lam = ridge * np.trace(inputs.h) / d
  values, vectors = np.linalg.eigh(inputs.h + lam * np.eye(d))
  inverse = vectors / np.sqrt(values) @ vectors.T
  root = np.linalg.cholesky(g)
  u, s, v = np.linalg.svd(inverse @ (inputs.k + lam * np.eye(d)) @ w @ root)
  want = inverse @ (u[:, :RANK] * s[:RANK]) @ v[:RANK] @ np.linalg.inv(root)
  got = best(w, inputs, ridge, g if weighted else None)
  # The family gives directions without data 1e-9 of the trace.
  np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize('shape', SHAPES)
def test_it_contains_the_other_methods(shape):
  _, x, _, w, g = problem(shape, same=True)
  inputs = moments_of(x, x)
  basis = inputs.basis
  u = subspace.output_basis(w, inputs.h, basis).vectors
  output = best_pairs.output_factors(w, u)
  t = w.T @ inputs.h @ w
  loss, _ = best_pairs.loss_factors(w, inputs.h, g, 1e-12, t)
  plain = best_pairs.weight_factors(w)
  cut = lambda f: f.a[:, :RANK] @ f.b[:RANK]
  # Directions without data get 1e-9 of the trace where d <= m; eigenvalues
  # here go down to a hundredth of it.
  np.testing.assert_allclose(best(w, inputs, 0.0), cut(output), atol=1e-7)
  np.testing.assert_allclose(best(w, inputs, 0.0, g), cut(loss), atol=1e-7)
  # H and K are a share of 1e-9 of a ridge of 1e9.
  np.testing.assert_allclose(best(w, inputs, 1e9), cut(plain), atol=1e-6)


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('ridge', [0.0, 0.3])
def test_nothing_of_its_rank_is_better(shape, ridge):
  rng, x, x_hat, w, g = problem(shape)
  inputs = moments_of(x, x_hat)
  d, m = shape
  lam = ridge * np.trace(inputs.h) / d
  found = best(w, inputs, ridge, g)
  least = objective(x, x_hat, w, found, lam, g)
  u, s, v = np.linalg.svd(found)
  a, b = u[:, :RANK] * s[:RANK], v[:RANK]
  for size in (1e-3, 1e-1):
    for _ in range(20):
      da, db = rng.normal(size=a.shape), rng.normal(size=b.shape)
      near = (a + size * da) @ (b + size * db)
      assert objective(x, x_hat, w, near, lam, g) >= least * (1 - 1e-8)
  # Alternating least squares from the solution stays there; from a random
  # start it does not get below.
  eye, right = np.eye(d), (inputs.k + lam * np.eye(d)) @ w
  metric = inputs.h + lam * eye
  for start in (a, rng.normal(size=a.shape)):
    for _ in range(50):
      other = np.linalg.solve(start.T @ metric @ start, start.T @ right)
      start = np.linalg.solve(metric, right) @ g @ other.T
      start = start @ np.linalg.inv(other @ g @ other.T)
    other = np.linalg.solve(start.T @ metric @ start, start.T @ right)
    reached = objective(x, x_hat, w, start @ other, lam, g)
    assert reached >= least * (1 - 1e-8)
  # Each of the members it contains is worse on a compressed prefix.
  for other in (best(w, moments_of(x, x), 0.0, g), best(w, inputs, 1e9, g)):
    assert objective(x, x_hat, w, other, lam, g) > least


@pytest.mark.quick
def test_directions_without_data_keep_the_kernel():
  rng, x, x_hat, w, _ = problem((10, 7), n=4)
  inputs = moments_of(x, x_hat)
  of = anchored_fit.target(w, inputs, 0.0)
  blind = np.linalg.svd(x_hat)[2][4:]
  np.testing.assert_allclose(blind @ of.w, blind @ w, atol=1e-8)
  # On the data it is a least squares solution: no residual with 4 rows of 10.
  np.testing.assert_allclose(x_hat @ of.w, x @ w, atol=1e-6)


@pytest.mark.quick
@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('weighted', [False, True])
def test_rounding_below_the_ridge_is_no_data(shape, weighted):
  """H of 4 rows, some of whose zeros float32 sums have left below -lam."""
  _, x, x_hat, w, g = problem(shape, n=4)
  exact, d, ridge = moments_of(x, x_hat), shape[0], 1e-3
  lam = ridge * np.trace(exact.h) / d
  blind = np.linalg.svd(x_hat)[2][4:].T
  h = exact.h - 1.5 * lam * blind @ blind.T
  with pytest.raises(np.linalg.LinAlgError):
    np.linalg.cholesky(h + lam * np.eye(d))
  rounded = exact._replace(h=h, basis=None)
  gradient = g if weighted else None
  got = best(w, rounded, ridge, gradient)
  g = g if weighted else np.eye(len(g))
  error = lambda a: objective(x, x_hat, w, a, lam, g)
  # Such rounding moves the ridge of what has no data, by that of lam.
  least = error(best(w, exact, ridge, gradient))
  assert error(got) < least + 10 * lam * np.sum(w * w) * np.trace(g)
  full = anchored_fit.target(w, rounded, ridge)
  np.testing.assert_allclose(blind.T @ full.w, blind.T @ w, atol=1e-8)


# --- the sweep ---


def mlp(p, batch):
  x = batch['x'] if isinstance(batch, dict) else batch
  for name in 'ab':
    x = jnp.tanh(x @ p[name]['w'] + p[name]['b'])
  return x @ p['c']


def network(seed=0):
  rng = np.random.default_rng(seed)
  draw = lambda *s: rng.normal(size=s).astype(np.float32) / s[0] ** 0.5
  return {
    'a': {'w': draw(6, 9), 'b': draw(9)},
    'b': {'w': draw(9, 9), 'b': draw(9)},
    'c': draw(9, 4),
  }


def data(seed=0, count=3, size=16):
  rng = np.random.default_rng(seed)
  rows = references.correlated_rows(rng, count * size, 6, 0.7, 0.5)
  return np.split(rows.astype(np.float32), count)


RANKS = {'a/w': 3, 'b/w': 4, 'c': 2}


def swept(fn, params, batches, ranks=RANKS, **kwargs):
  return ur.anchor(fn, params, batches, ranks, progress=False, **kwargs)


def by_hand(params, x, ridge, gradients=None):
  """The sweep over `mlp` in float64."""
  w = lambda name: np.asarray(params[name]['w'], np.float64)
  b = lambda name: np.asarray(params[name]['b'], np.float64)
  dense = hat = np.asarray(x, np.float64)
  for name, rank in (('a', 3), ('b', 4)):
    fit, constant = reference_layer(
      dense, hat, w(name), rank, ridge, (gradients or {}).get(f'{name}/w')
    )
    dense = np.tanh(dense @ w(name) + b(name))
    hat = np.tanh(hat @ fit + b(name) + constant)
  c = np.asarray(params['c'], np.float64)
  fit, constant = reference_layer(
    dense, hat, c, 2, ridge, (gradients or {}).get('c')
  )
  return hat @ fit + constant


def reference_layer(x, x_hat, w, rank, ridge, g):
  mu, mu_hat = x.mean(0), x_hat.mean(0)
  g = np.eye(w.shape[1]) if g is None else g
  centered = moments_of(x - mu, x_hat - mu_hat)
  d = len(w)
  a = centered.h + ridge * np.trace(centered.h) / d * np.eye(d)
  values, vectors = np.linalg.eigh(a)
  inverse = vectors / np.sqrt(values) @ vectors.T
  root = np.linalg.cholesky(g)
  moved = (centered.k + a - centered.h) @ w
  u, s, v = np.linalg.svd(inverse @ moved @ root)
  fit = inverse @ (u[:, :rank] * s[:rank]) @ v[:rank] @ np.linalg.inv(root)
  return fit, mu @ w - mu_hat @ fit


@pytest.mark.parametrize('method', ['output', 'loss'])
def test_a_sweep_is_what_is_done_by_hand(method):
  params, batches = network(), data()
  moments, gradients = None, None
  if method == 'loss':
    loss = lambda outputs, _: jnp.sum(jnp.square(outputs[:, :2]), 1)
    moments = ur.collect(mlp, params, batches, loss=loss, progress=False)
    gradients = {}
    for path in RANKS:
      g = np.asarray(moments[path].grad_second, np.float64)
      gradients[path] = g + 0.01 * np.trace(g) / len(g) * np.eye(len(g))
  small = swept(mlp, params, batches, method=method, moments=moments)
  x = np.concatenate(batches)
  got = ur.low_rank(mlp)(small, x)
  want = by_hand(params, x, 0.2, gradients)
  # Sums are float32: 1e-6 of each moment, after a division by up to 1e-2.
  np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)
  # The mean of every kernel's outputs is given back, the last one's too.
  np.testing.assert_allclose(
    np.mean(got, 0), np.mean(mlp(params, x), 0), atol=1e-5
  )
  leaves = (small['a']['w'], small['b']['w'], small['c'])
  assert [leaf.rank for leaf in leaves] == list(RANKS.values())
  assert small['a']['w'].c is None and small['c'].c is not None


def test_one_kernel_alone_is_factorized_as_ever():
  params, batches = network(), data()
  moments = ur.collect(mlp, params, batches, progress=False)
  ranks = {'a/w': 3}
  ours = swept(mlp, params, batches, ranks, ridge=0.0)
  theirs = ur.factorize(params, moments, ranks)
  np.testing.assert_allclose(
    ours['a']['w'].dense(), theirs['a']['w'].dense(), atol=1e-5
  )
  np.testing.assert_allclose(ours['a']['b'], theirs['a']['b'], atol=1e-5)
  # Kernels without a rank stay what they are.
  assert ours['b']['w'] is params['b']['w'] and ours['c'] is params['c']


def test_one_group_is_fitted_behind_the_dense_network():
  params, batches = network(), data()
  moments = ur.collect(mlp, params, batches, progress=False)
  ours = swept(mlp, params, batches, ridge=0.0, group=lambda path: 0)
  theirs = ur.factorize(params, moments, RANKS)
  run = ur.low_rank(mlp)
  np.testing.assert_allclose(
    run(ours, batches[0]), run(theirs, batches[0]), atol=1e-4
  )


def test_batches_may_be_cut_anywhere_and_come_once():
  params, batches = network(), data()
  whole = np.concatenate(batches)
  uneven = [whole[:16], whole[16:32], whole[32:37], whole[37:]]
  a = swept(mlp, params, [{'x': whole}])
  b = swept(mlp, params, iter([{'x': v} for v in uneven]))
  run = ur.low_rank(mlp)
  np.testing.assert_allclose(run(a, whole), run(b, whole), atol=1e-4)


def test_it_mends_what_earlier_blocks_did():
  params, batches = network(), data(count=8)
  moments = ur.collect(mlp, params, batches, progress=False)
  x = np.concatenate(batches)
  error = lambda small: float(
    np.mean(np.square(ur.low_rank(mlp)(small, x) - mlp(params, x)))
  )
  alone = error(ur.factorize(params, moments, RANKS))
  assert error(swept(mlp, params, batches, ridge=0.01)) < 0.97 * alone
  # Trusting only the kernels is the truncated SVD with means given back.
  plain = error(ur.factorize(params, moments, RANKS, method='weight'))
  assert error(swept(mlp, params, batches, ridge=1e9)) > alone
  assert plain > alone


@pytest.mark.parametrize('wrap', [lambda f: f, jax.checkpoint, jax.jit])
def test_a_scanned_stack_is_a_chain_of_its_layers(wrap):
  rng = np.random.default_rng(0)
  w = (rng.normal(size=(3, 6, 6)) / 2).astype(np.float32)
  b = rng.normal(size=(3, 6)).astype(np.float32)
  body = wrap(lambda x, p: (jnp.tanh(x @ p['w'] + p['b']), None))
  scan = lambda p, x: lax.scan(body, x, p)[0]

  def chain(p, x):
    for i in range(3):
      x = jnp.tanh(x @ p['w'][i] + p['b'][i])
    return x

  batches = data()
  one = swept(scan, {'w': w, 'b': b}, batches, {'w': (2, 3, 4)})
  parts = {'w': list(w), 'b': list(b)}
  ranks = {'w/0': 2, 'w/1': 3, 'w/2': 4}
  two = swept(chain, parts, batches, ranks)
  assert one['w'].rank == 4
  for i in range(3):
    np.testing.assert_allclose(
      one['w'].dense()[i], two['w'][i].dense(), atol=1e-4
    )
    np.testing.assert_allclose(one['b'][i], two['b'][i], atol=1e-4)


def test_experts_and_branches_that_share_an_input():
  def fn(p, x):
    h = jnp.einsum('nd,edm->enm', x, p['w'])
    mixed = jnp.einsum('enm,emk->enk', jnp.tanh(h), p['v']).sum(0)
    return mixed + x @ p['q']

  rng = np.random.default_rng(0)
  shapes = dict(w=(2, 6, 5), v=(2, 5, 4), q=(6, 4))
  params = {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}
  batches = data()
  sites = ur.find_sites(fn, params, batches[0])
  full = {path: site.layout.full_rank for path, site in sites.items()}
  small = swept(fn, params, batches, full)
  x = batches[0]
  # At full rank nothing is lost, wherever it is fitted.
  np.testing.assert_allclose(
    ur.low_rank(fn)(small, x), fn(params, x), atol=1e-3
  )


def test_a_kernel_that_is_read_twice_makes_one_block():
  def fn(p, x):
    x = jnp.tanh(x @ p['w'])
    return jnp.tanh(jnp.tanh(x @ p['v']) @ p['w'])

  rng = np.random.default_rng(0)
  params = {k: rng.normal(size=(6, 6)).astype(np.float32) for k in 'wv'}
  batches = data()
  sites = ur.find_sites(fn, params, batches[0])
  layouts = {p: s.layout for p, s in sites.items()}
  program = blocks.cut(fn, params, batches[0], layouts)
  assert [b.paths for b in program.blocks] == [[], ['w', 'v']]
  moments = ur.collect(fn, params, batches, progress=False)
  ranks = {'w': 3, 'v': 3}
  ours = swept(fn, params, batches, ranks, ridge=0.0)
  theirs = ur.factorize(params, moments, ranks)
  for path in 'wv':
    np.testing.assert_allclose(
      ours[path].dense(), theirs[path].dense(), atol=1e-4
    )


def test_a_matrix_that_nothing_reads_is_cut_by_its_svd():
  rng = np.random.default_rng(0)
  w = rng.normal(size=(2, 6, 6)).astype(np.float32)
  small = swept(lambda p, x: x @ p['w'][1], {'w': w}, data(), {'w': 2})
  u, s, v = np.linalg.svd(w[0])
  np.testing.assert_allclose(
    small['w'].dense()[0], u[:, :2] * s[:2] @ v[:2], atol=1e-5
  )


def test_progress_counts_blocks(capsys, monkeypatch):
  monkeypatch.setattr('utilized_rank.host.progress.LINE_INTERVAL', 0.0)
  ur.anchor(mlp, network(), data(), RANKS)
  assert 'anchor: 4/4 block' in capsys.readouterr().err


@pytest.mark.parametrize(
  ('change', 'error', 'message'),
  [
    (dict(method='weight'), ValueError, "unknown method 'weight'"),
    (dict(ridge=-1.0), ValueError, 'ridge must be a number from 0'),
    (dict(ridge=float('nan')), ValueError, 'ridge must be a number from 0'),
    (dict(batches=[]), ValueError, 'at least one batch'),
    (dict(batches=[np.ones((0, 6))]), ValueError, 'batch 0 is empty'),
    (dict(ranks={}), ValueError, 'no kernel is named'),
    (dict(ranks={'z': 1}), ValueError, "no parameter 'z'"),
    (dict(ranks={('a/w', 'c'): 1}), ValueError, 'give a rank for each path'),
    (dict(ranks={'a/b': 1}), ValueError, "'a/b' is selected but is no kernel"),
    (dict(ranks={'c': 9}), ValueError, "rank 9 for 'c'"),
    (dict(method='loss'), ValueError, 'have no gradients'),
    (
      dict(batches=[np.full((4, 6), np.nan)]),
      FloatingPointError,
      "what 'a/w' reads is NaN or infinite",
    ),
  ],
)
def test_refusals(change, error, message):
  args = dict(batches=data(), ranks=RANKS) | change
  with pytest.raises(error, match=message):
    swept(mlp, network(), **args)


def test_refused_parameters():
  params, batches = network(), data()
  small = swept(mlp, params, batches, {'c': 2})
  with pytest.raises(ValueError, match="'c' is low-rank already"):
    swept(mlp, small, batches, {'c': 2})
  params['c'] = np.full((9, 4), np.inf, np.float32)
  with pytest.raises(ValueError, match="'c' holds NaN or infinite"):
    swept(mlp, params, batches)
  tied = lambda p, x: p['w'][x] @ p['w'].T
  table = {'w': np.eye(4, dtype=np.float32)}
  with pytest.raises(ValueError, match='used by a lookup .* leave it dense'):
    swept(tied, table, [np.array([0, 1])], {'w': 2})


def test_moments_of_another_network_are_refused():
  other = lambda p, x: x @ p['c']
  loss = lambda outputs, _: outputs.sum(1)
  batches = data()
  params = {'c': np.ones((6, 4), np.float32)}
  moments = ur.collect(other, params, batches, loss=loss, progress=False)
  with pytest.raises(ValueError, match=r"moments of 'c' are over \(6, 4\)"):
    swept(mlp, network(), batches, {'c': 2}, moments=moments, method='loss')

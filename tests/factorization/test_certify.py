"""Decompositions that fail are tried again, and factors certify themselves."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references

import utilized_rank as ur
from utilized_rank.factorization import certify
from utilized_rank.factorization import kernels
from utilized_rank.factorization import methods
from utilized_rank.host import threads
from utilized_rank.linalg import best_pairs
from utilized_rank.linalg import eigh
from utilized_rank.linalg import subspace
from utilized_rank.refit import anchored_fit

pytestmark = pytest.mark.slow

SHAPES = [(12, 20), (20, 12), (16, 16)]


def moment(d, seed=0):
  rng = np.random.default_rng(seed)
  return references.second_moment(references.correlated_rows(rng, 6 * d, d))


def breaking(real, broken, calls):
  """A solver that fails for some of the ways it is called."""

  def solve(matrix, *args, **kwargs):
    way = args[0] if args else kwargs.get('UPLO', 'L')
    calls.append(way)
    parts = real(matrix, *args, **kwargs)
    if broken.get(way) == 'nan':
      return tuple(np.full_like(p, np.nan) for p in parts)
    if broken.get(way) == 'raise':
      raise np.linalg.LinAlgError('did not converge')
    return parts

  return solve


@pytest.mark.parametrize(
  'broken, ways',
  [
    ({}, ['L']),
    ({'L': 'nan'}, ['L', 'U']),
    ({'L': 'raise'}, ['L', 'U']),
    ({'L': 'nan', 'U': 'raise'}, ['L', 'U']),  # then the singular vectors
  ],
)
def test_a_failed_eigh_is_tried_in_another_way(monkeypatch, broken, ways):
  stack = np.stack([moment(9), moment(9, 1)])
  calls = []
  monkeypatch.setattr(
    np.linalg, 'eigh', breaking(np.linalg.eigh, broken, calls)
  )
  values, vectors = eigh.symmetric_eigh(stack)
  assert calls == ways
  np.testing.assert_allclose(
    values, np.linalg.eigvalsh(stack), atol=1e-14 * stack.max()
  )
  np.testing.assert_allclose(
    vectors * values[:, None] @ np.swapaxes(vectors, 1, 2), stack, atol=1e-14
  )


def test_what_no_way_decomposes_is_an_error(monkeypatch):
  def fails(*args, **kwargs):
    raise np.linalg.LinAlgError('did not converge')

  monkeypatch.setattr(np.linalg, 'eigh', fails)
  monkeypatch.setattr(np.linalg, 'svd', fails)
  with pytest.raises(FloatingPointError, match=r'no eigend.* \(4, 4\) matrix'):
    eigh.symmetric_eigh(moment(4))
  with pytest.raises(FloatingPointError, match='no singular value'):
    eigh.svd(moment(4))


def test_a_failed_svd_is_tried_on_the_transpose(monkeypatch):
  real, matrix = np.linalg.svd, np.random.default_rng(0).normal(size=(7, 4))

  def wide_only(a, **kwargs):
    u, sigma, v = real(a, **kwargs)
    return u, sigma * (np.nan if a.shape[0] > a.shape[1] else 1), v

  monkeypatch.setattr(np.linalg, 'svd', wide_only)
  u, sigma, v = eigh.svd(matrix)
  np.testing.assert_allclose(u * sigma @ v, matrix, atol=1e-14)
  assert u.shape == (7, 4)


@pytest.mark.parametrize('scale', [1e-18, 1.0, 1e18])
@pytest.mark.parametrize('method', ['output', 'loss', 'scaled'])
@pytest.mark.parametrize('shape', SHAPES)
def test_no_cutoff_is_absolute(shape, method, scale):
  """Inputs and gradients of any scale: the same factors."""
  rng = np.random.default_rng(0)
  w = rng.normal(size=shape)
  s, g = moment(shape[0]), moment(shape[1], 1)

  def product(s, g, damping=0.0):
    basis = subspace.input_basis(s)
    if method == 'scaled':
      a, b = best_pairs.scaled_factors(w, np.sqrt(np.diagonal(s)))
    elif method == 'output' and shape[0] < shape[1]:
      a, b = best_pairs.input_side_factors(w, basis, None, 0.0)
    elif method == 'output':
      a, b = best_pairs.output_factors(
        w, subspace.output_basis(w, s, basis).vectors
      )
    elif shape[0] <= shape[1]:
      a, b = best_pairs.input_side_factors(w, basis, g, damping)
    else:
      (a, b), cross = best_pairs.loss_factors(w, s, g, damping, w.T @ s @ w)
      np.testing.assert_allclose(
        cross, a.T @ s @ a, rtol=0, atol=1e-9 * np.abs(cross).max()
      )
    return a[:, :5] @ b[:5]

  for damping in (0.0, 0.01):
    np.testing.assert_allclose(
      product(scale * s, scale * g, damping), product(s, g, damping), atol=1e-9
    )


@pytest.mark.parametrize('shape', [(12, 20), (16, 16)])
def test_the_two_sides_have_one_optimum(shape):
  """From (d, d) matrices, and from the root of G, which is (m, m)."""
  rng = np.random.default_rng(0)
  w = rng.normal(size=shape)
  s, g = moment(shape[0]), moment(shape[1], 1)
  basis = subspace.input_basis(s)
  left = best_pairs.input_side_factors(w, basis, g, 0.01)
  right, _ = best_pairs.loss_factors(w, s, g, 0.01, w.T @ s @ w)
  for rank in range(1, shape[0] + 1):
    np.testing.assert_allclose(
      left.a[:, :rank] @ left.b[:rank],
      right.a[:, :rank] @ right.b[:rank],
      # The floor of S, 1e-9 of its trace, is added to one and a bound of the
      # other: 1e-6 of the least of 16 eigenvalues that fall by 0.64.
      atol=1e-5,
    )


def problem(shape, dtype=jnp.float32, seed=0, n=400):
  rng = np.random.default_rng(seed)
  d, m = shape
  x = references.correlated_rows(rng, n, d, 0.8, 0.5).astype(np.float32)
  g = references.correlated_rows(rng, n, m, 0.7).astype(np.float32)
  params = {'layer': {'w': jnp.asarray(rng.normal(size=shape), dtype)}}
  moments = ur.collect(
    lambda p, b: b['x'] @ p['layer']['w'].astype(jnp.float32),
    params,
    [{'x': jnp.asarray(x), 'g': jnp.asarray(g)}],
    loss=lambda out, b: jnp.sum(out * b['g'], axis=1),
    fisher_rows=True,
    coupled=True,
    progress=False,
  )
  return params, moments


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
@pytest.mark.parametrize('shape', SHAPES)
def test_stored_factors_of_every_method_certify_themselves(shape, dtype):
  """They raise nothing, in any dtype, at any rank, and the check is sharp."""
  params, moments = problem(shape, dtype)
  for method in methods.METHODS:
    for rank in (1, 5, min(shape)):
      ur.factorize(params, moments, {'layer/w': rank}, method=method)
  ((_, (kernel,)),) = kernels.kernels(params, moments)
  family = methods.family(kernel, 'output')
  tails = family.damages['output']
  for rank in (1, 5, 9):
    pair = best_pairs.balanced(methods.truncate(family, rank))
    stored = best_pairs.Pair(
      *(np.asarray(jnp.asarray(f, dtype), np.float64) for f in pair)
    )
    check = lambda pair, predicted: certify.check(
      kernel, pair, predicted, dtype, False, tails[0]
    )
    check(stored, tails[rank])
    # 20 roundings of every number, all in one direction, are too many. What is
    # left of the energy hides them at low ranks, float32 moments do at any.
    off = 1 + 20 * float(jnp.finfo(dtype).eps)
    wrong = best_pairs.Pair(stored.a * off, stored.b * off)
    if rank == 9 and dtype != 'float32':
      with pytest.raises(FloatingPointError, match='was predicted'):
        check(wrong, tails[rank])
    for broken in (
      best_pairs.Pair(stored.a[:, ::-1] * 1.0, stored.b)
      if rank > 1
      else best_pairs.Pair(-stored.a, stored.b),
      best_pairs.Pair(stored.a * np.nan, stored.b),
      best_pairs.Pair(stored.a[::-1], stored.b),
    ):
      with pytest.raises(FloatingPointError, match=rf"rank-{rank} .*'layer/w'"):
        check(broken, tails[rank])


@pytest.mark.parametrize('from_outputs', [False, True])
@pytest.mark.parametrize('rows', [7, 300])
@pytest.mark.parametrize('shape', [(30, 48), (30, 30), (48, 30)])
def test_one_rank_alone_is_that_of_the_family(shape, rows, from_outputs):
  """With and without data in all directions, seen from either side."""
  rng = np.random.default_rng(3)
  scales = np.geomspace(1, 1e-3, shape[0])
  x = (rng.normal(size=(rows, shape[0])) * scales).astype(np.float32)
  params = {'w': rng.normal(size=shape).astype(np.float32)}
  moments = ur.collect(
    lambda p, x: x @ p['w'],
    params,
    [x],
    from_outputs=[('w', True)] if from_outputs else None,
    progress=False,
  )
  ((_, (kernel,)),) = kernels.kernels(params, moments)
  family = methods.family(kernel, 'output')
  tails = family.damages['output']
  wide = x.astype(np.float64)
  for rank in (1, 5, 7, 12, 30):
    pair, error, energy = methods.output(kernel, rank)
    assert pair.a.shape[1] == len(pair.b) == rank
    # Where data is lacking, a billionth of the trace is added: see _FLOOR.
    np.testing.assert_allclose(energy, tails[0], rtol=1e-8)
    np.testing.assert_allclose(error, tails[rank], atol=1e-8 * energy)
    of = methods.truncate(family, rank)
    want, got = (wide @ f.a @ f.b for f in (of, pair))
    # Where two values are as good as equal any choice is as good.
    missed = [np.sum((wide @ params['w'] - y) ** 2) / rows for y in (want, got)]
    np.testing.assert_allclose(*missed, atol=1e-6 * energy)


def test_balanced_pairs_have_the_product_and_one_scale():
  """With and without orthogonal rows; small and zero singular values too."""
  rng = np.random.default_rng(4)
  a, b = rng.normal(size=(40, 12)), rng.normal(size=(12, 30))
  rows = np.linalg.qr(b.T)[0].T
  small = np.geomspace(1, 1e-12, 12)
  zero = np.where(np.arange(12) < 5, 1.0, 0.0)
  for scale in (np.ones(12), small, zero, 0 * zero):
    for right in (b, rows):
      pair = best_pairs.Pair(a * scale, right)
      got = best_pairs.balanced(pair)
      product = pair.a @ pair.b
      size = np.abs(product).max()
      np.testing.assert_allclose(got.a @ got.b, product, atol=1e-13 * size)
      sigma = np.linalg.svd(product, compute_uv=False)[:12]
      # The roots of squares: half of the digits.
      for gram in (got.a.T @ got.a, got.b @ got.b.T):
        np.testing.assert_allclose(
          gram, np.diag(sigma), rtol=1e-7, atol=1e-7 * sigma[0]
        )


@pytest.mark.parametrize('method', ['output', 'loss', 'weight'])
def test_a_corrupted_family_is_noticed_by_name(monkeypatch, method):
  params, moments = problem((12, 20))
  real, one = methods.family, methods.output
  wrong = lambda pair: best_pairs.Pair(pair.a, pair.b * 1.01)

  def corrupted(*args):
    family = real(*args)
    return family._replace(factors=wrong(family.factors))

  def corrupted_one(*args):
    pair, *rest = one(*args)
    return wrong(pair), *rest

  monkeypatch.setattr(methods, 'family', corrupted)
  monkeypatch.setattr(methods, 'output', corrupted_one)
  with pytest.raises(FloatingPointError, match="rank-5 factors of 'layer/w'"):
    ur.factorize(params, moments, {'layer/w': 5}, method=method)


def test_a_corrupted_anchor_is_noticed_by_name(monkeypatch):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(64, 12)).astype(np.float32)
  params = {'v': rng.normal(size=(12, 12)), 'w': rng.normal(size=(12, 20))}
  params = jax.tree.map(jnp.asarray, params)
  fn = lambda p, x: jnp.tanh(x @ p['v']) @ p['w']
  run = lambda: ur.anchor(fn, params, [x], {'v': 5, 'w': 5}, progress=False)
  run()
  real = anchored_fit.factors

  def corrupted(*args):
    a, b = real(*args)
    return best_pairs.Pair(a, b * (1.01 if b.shape[1] == 20 else 1.0))

  monkeypatch.setattr(anchored_fit, 'factors', corrupted)
  with pytest.raises(FloatingPointError, match="rank-5 factors of 'w' leave"):
    run()


@pytest.mark.parametrize('broken', ['solution', 'product'])
def test_a_corrupted_head_is_noticed_by_name(monkeypatch, broken):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(64, 6)).astype(np.float32)
  params = {n: jnp.asarray(rng.normal(size=(6, 4)), jnp.float32) for n in 'qk'}
  fn = lambda p, x: (x @ p['q']) @ (x @ p['k']).T
  pairs = ur.find_attention(fn, params, x)
  moments = ur.capture(fn)(params, x)[1]
  run = lambda: ur.factorize_heads(
    params, moments, pairs, {'q': 2}, method='output'
  )
  run()
  place, name = (
    (best_pairs, 'loss_factors')
    if broken == 'solution'
    else (best_pairs, 'balanced')
  )
  real = getattr(place, name)

  def corrupted(*args):
    found = real(*args)
    if broken == 'solution':
      (a, b), cross = found
      return best_pairs.Pair(a, b * 1.01), cross
    return best_pairs.Pair(found.a, found.b * 1.01)

  monkeypatch.setattr(place, name, corrupted)
  with pytest.raises(
    FloatingPointError, match="rank-2 factors of 'q head 0,0'"
  ):
    run()


def test_families_of_other_parameters_are_noticed():
  params, moments = problem((12, 20))
  other, _ = problem((12, 20), seed=1)
  families = ur.decompose(params, moments, progress=False)
  with pytest.raises(FloatingPointError, match='not of these parameters'):
    ur.factorize(other, moments, {'layer/w': 5}, families=families)


def test_families_are_decomposed_once_and_give_the_same(monkeypatch):
  params, moments = problem((12, 20))
  options = {'method': 'loss', 'damping': 0.1}
  budget = {'params_fraction': 0.6}
  ranks = ur.budget_ranks(params, moments, **budget, **options)
  small = ur.factorize(params, moments, ranks, **options)
  nats = ur.predict_loss(params, moments, ranks, **options)
  families = ur.decompose(params, moments, progress=False, **options)
  assert list(families) == ['layer/w'] and len(families) == 1
  monkeypatch.setattr(methods, 'family', None)  # not to be called again
  with_them = {'families': families, **options}
  assert ur.budget_ranks(params, moments, **budget, **with_them) == ranks
  assert ur.predict_loss(params, moments, ranks, **with_them) == nats
  again = ur.factorize(params, moments, ranks, **with_them)
  np.testing.assert_array_equal(again['layer']['w'].a, small['layer']['w'].a)
  with pytest.raises(ValueError, match="'loss', True, 0.1.*'loss', True, 0.01"):
    ur.factorize(params, moments, ranks, method='loss', families=families)
  with pytest.raises(KeyError, match="no family of 'layer/v'"):
    families['layer/v']


def test_families_without_factors_or_kernels_say_so():
  params, moments = problem((12, 20))
  light = ur.decompose(params, moments, keep_factors=False, progress=False)
  assert ur.budget_ranks(
    params, moments, params_fraction=0.6, method='output', families=light
  )
  with pytest.raises(ValueError, match='keep_factors=False'):
    ur.factorize(params, moments, {'layer/w': 5}, families=light)
  none = ur.decompose(params, moments, only=[], progress=False)
  with pytest.raises(ValueError, match="no family of 'layer/w'"):
    ur.factorize(params, moments, {'layer/w': 5}, families=none)


def test_a_long_call_does_not_stop_what_was_taken_ahead():
  first = threading.Event()

  def call(i):
    if i == 0:  # until all that may be taken beside it has run
      assert first.wait(timeout=60)
    elif i == 5:
      first.set()
    return i

  results = threads.ordered_map(call, range(9), workers=2, ahead=4)
  assert list(results) == list(range(9))


def test_a_map_keeps_order_takes_few_at_a_time_and_passes_errors_on():
  taken = []

  def items():
    for i in range(20):
      taken.append(i)
      yield i

  results = threads.ordered_map(lambda i: i * i, items(), workers=3)
  assert next(results) == 0
  assert len(taken) == 4  # one more than there are workers
  assert list(results) == [i * i for i in range(1, 20)]
  taken.clear()
  results = threads.ordered_map(lambda i: i * i, items(), workers=2, ahead=5)
  assert next(results) == 0 and len(taken) == 7
  assert list(results) == [i * i for i in range(1, 20)]
  assert list(threads.ordered_map(str, range(3), workers=1)) == ['0', '1', '2']
  with pytest.raises(ZeroDivisionError):
    list(threads.ordered_map(lambda i: 1 // i, [1, 0, 1], workers=2))


@pytest.mark.parametrize('rank', [None, 3])
@pytest.mark.parametrize('shape', SHAPES)
def test_the_smallest_solution_is_numpys(shape, rank):
  rng = np.random.default_rng(0)
  w = rng.normal(size=shape)
  if rank is not None:
    w = w[:, :rank] @ rng.normal(size=(rank, shape[1]))
  y = rng.normal(size=(shape[0], 4))
  want = np.linalg.lstsq(w, y, rcond=1e-9)[0]
  # The Gram matrix squares the condition number, here below 1e3.
  np.testing.assert_allclose(eigh.solve_least(w, y), want, atol=1e-9)

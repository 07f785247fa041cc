"""Pairs with an identity block: the same function of fewer numbers."""

import dataclasses
import functools
import math
import warnings

import evaluate
import forms
import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest
import wrappers

import utilized_rank as ur
from utilized_rank.lowrank import stack
from utilized_rank.products import gauge
from utilized_rank.tree import paths
from utilized_rank.walk import compat

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(0)


def draw(*shape):
  return RNG.normal(size=shape).astype(np.float32)


def written_out(a, b, order):
  """W from the definition, one output at a time, in float64."""
  a, b = np.float64(a), np.float64(b)
  columns = [*a.T, *(a @ b).T]
  return np.stack([columns[i] for i in order], axis=-1)


def identity_pair(layout, rank):
  """A pair drawn at random, in every group with an order of its own."""
  groups, (_, m) = layout.group_shape, layout.matrix_shape
  order = np.stack([RNG.permutation(m) for _ in range(layout.num_groups)])
  return ur.LowRank(
    draw(*groups, *layout.input_shape, rank),
    draw(*groups, rank, m - rank),
    None,
    layout,
    gauge.Order(order.reshape(*groups, m)),
  )


# --- the decomposition ---


def _pairs():
  yield 'plain', RNG.normal(size=(9, 4)), RNG.normal(size=(4, 11))
  yield 'rank one', RNG.normal(size=(3, 1)), RNG.normal(size=(1, 2))
  yield 'all but one', RNG.normal(size=(9, 6)), RNG.normal(size=(6, 7))
  scale = 10.0 ** -np.arange(8)
  yield (
    'steep',
    RNG.normal(size=(9, 8)),
    scale[:, None] * RNG.normal(size=(8, 20)),
  )
  b = RNG.normal(size=(4, 11))
  yield 'zero row', RNG.normal(size=(9, 4)), b * np.c_[[1, 1, 0, 1]]
  yield 'zero', np.zeros((9, 4)), np.zeros((4, 11))
  yield 'equal columns', RNG.normal(size=(9, 3)), np.repeat(b[:3], 3, axis=1)
  # The matrix on which pivoting without exchanges loses most (Kahan).
  c, n = 0.285, 20
  kahan = np.sqrt(1 - c**2) ** np.arange(n)[:, None] * (
    np.eye(n) - c * np.triu(np.ones((n, n)), 1)
  )
  yield 'Kahan', RNG.normal(size=(30, n - 1)), kahan[: n - 1]


PAIRS = {name: (a, b) for name, a, b in _pairs()}


@pytest.mark.parametrize('name', PAIRS)
def test_the_identity_block_changes_nothing(name):
  a, b = PAIRS[name]
  rank, m = b.shape
  new, other, order = gauge.to_identity(a, b)
  assert new.shape == (len(a), rank) and other.shape == (rank, m - rank)
  assert sorted(order) == list(range(m))
  scale = np.abs(a @ b).max() or 1
  # float64: the pair is exact; a few hundred roundings of eps 2e-16.
  np.testing.assert_allclose(
    written_out(new, other, order), a @ b, atol=1e-12 * scale
  )
  # In float32 every entry is as good as a sum of r rounded products.
  rounded = written_out(np.float32(new), np.float32(other), order)
  bound = rank * gauge.LARGEST * np.finfo(np.float32).eps * np.abs(new).max()
  assert np.abs(rounded - a @ b).max() <= bound + 1e-30
  assert np.abs(other).max() <= gauge.LARGEST * (1 + 1e-9)
  block = np.c_[np.eye(rank), other]
  assert np.linalg.cond(block) <= math.sqrt(1 + 4 * rank * (m - rank))


@pytest.mark.quick
def test_columns_that_stand_for_others_too_strongly_are_exchanged():
  share = np.array([[1.0, 0.0, 8.0], [0.0, 1.0, 0.5]])
  pivots = np.array([0, 1])
  assert gauge._exchange(share, pivots)
  assert list(pivots) == [2, 1]
  np.testing.assert_allclose(share, [[0.125, 0, 1], [-0.0625, 1, 0]])


def test_a_wider_pair_is_the_same_kernel():
  a, b = PAIRS['plain']
  new, other, order = gauge.to_identity(a, b)
  for rank in (4, 5, 10):
    wide = gauge.widen(new, other, rank)
    assert wide[0].shape == (9, rank) and wide[1].shape == (rank, 11 - rank)
    np.testing.assert_allclose(written_out(*wide, order), a @ b, atol=1e-12)


def test_an_order_is_hashed_by_what_it_holds():
  one, two = gauge.Order([[1, 0], [0, 1]]), gauge.Order([[1, 0], [0, 1]])
  assert one == two and hash(one) == hash(two) and one is not two
  assert one != gauge.Order([1, 0, 0, 1]) and one != gauge.Order(one.array.T[0])
  assert not one.array.flags.writeable and 'shape=(2, 2)' in repr(one)


# --- every product ---


@pytest.fixture(params=['joined', 'written out'])
def run_as(request, monkeypatch):
  """How pairs are run, however many rows there are."""
  whole = request.param == 'written out'
  monkeypatch.setattr(gauge, 'pays_written_out', lambda *_: whole)
  return request.param


def test_a_block_is_written_out_where_rows_are_many_and_the_rank_is_low():
  pays = gauge.pays_written_out
  assert pays(1576, 104, 768) and pays(1576, 128, 3072)
  assert not pays(1, 104, 768) and not pays(64, 104, 768)  # few rows
  assert not pays(10**9, 512, 768)  # r^2 multiplications take longer
  assert not pays(0, 1, 2)


def test_the_flops_of_many_rows_are_those_that_run():
  layout = ur.Layout.of((256, 300), inputs=(0,), outputs=(1,))
  x = jax.ShapeDtypeStruct((10**6, 256), jnp.float32)
  flops = {}
  for rank in (100, 190, 200, 250):
    w = identity_pair(layout, rank)
    flops[rank] = gauge.pair_flops(layout, rank, 'identity')
    ran, _ = dot_flops(ur.low_rank(USES['x W']), w, x)
    assert ran == 10**6 * flops[rank]
  assert flops[190] == 190 * 556 and flops[200] == 200 * 556 - 200**2
  assert gauge.pair_flops(layout, 200) == 200 * 556


# Between them these slice, stack and spread what is loop-invariant elsewhere.
@pytest.mark.parametrize('wrap', ['scan_stacked', 'shard_map_spread'])
def test_every_form_of_product_in_loops_and_over_devices(wrap, run_as):
  wrapper = wrappers.WRAPPERS[wrap]
  cells = {
    name: wrappers.cell(form, wrapper, forms.seed_of(name))
    for name, form in forms.FORMS.items()
  }
  params = {name: c[0] for name, c in cells.items()}
  xs = {name: c[1] for name, c in cells.items()}
  fn = wrapper.wrap(wrappers.together)
  table = jax.eval_shape(ur.capture(fn), params, xs)[1].table
  named, treedef = paths.flatten(params)
  count = 0
  for entry in table:
    rank = min(entry.layout.full_rank, entry.layout.matrix_shape[1] - 1, 2)
    # A kernel of one output has no pair; exact forms are in a narrow dtype.
    if rank and not forms.FORMS[entry.path.split('/')[0]].exact:
      named[entry.path] = identity_pair(entry.layout, rank)
      count += 1
  assert count > 40
  small = paths.unflatten(treedef, named)
  run = (
    jax.jit
    if wrap in wrappers.COMPILED
    else lambda fn: functools.partial(evaluate.call, fn)
  )
  with warnings.catch_warnings():
    warnings.filterwarnings('ignore', '.*(gather|over other axes)')
    got = run(ur.low_rank(fn))(small, xs)
  want = run(fn)(ur.merge(small), xs)
  for name in cells:
    wrappers.close(got[name], want[name], name)


D, M, R = 12, 11, 3
LAYOUT = ur.Layout.of((D, M), inputs=(0,), outputs=(1,))
STACK = ur.Layout.of((3, D, D), groups=(0,), inputs=(1,), outputs=(2,))
X = draw(5, D)


def dot_flops(fn, *args):
  """Multiplications of all `dot_general`s, and shapes of all values."""

  def walk(jaxpr, times):
    jaxpr, _ = compat.open_jaxpr(jaxpr)
    for eqn in jaxpr.eqns:
      shapes.extend(v.aval.shape for v in eqn.outvars)
      if eqn.primitive.name == 'dot_general':
        (contract, _), _ = eqn.params['dimension_numbers']
        x = eqn.invars[0].aval.shape
        inner = math.prod(x[i] for i in contract)
        flops.append(times * inner * math.prod(eqn.outvars[0].aval.shape))
      more = eqn.params['length'] if eqn.primitive.name == 'scan' else 1
      for inner in compat.sub_jaxprs(eqn):
        walk(inner, times * more)

  flops, shapes = [], []
  walk(jax.make_jaxpr(fn)(*args), 1)
  return sum(flops), shapes


USES = {
  'x W': lambda p, x: x @ p,
  'W.T x.T': lambda p, x: p.T @ x.T,
  'x W.T': lambda p, x: x[:, :M] @ p.T,
  'W x.T': lambda p, x: p @ x[:, :M].T,
}


@pytest.mark.parametrize('name', USES)
def test_every_side_of_a_product_and_no_kernel_made(name, run_as):
  fn = USES[name]
  w = identity_pair(LAYOUT, R)
  small_fn = ur.low_rank(fn)
  flops, shapes = dot_flops(small_fn, w, X)
  # Outputs put in order: no identity is multiplied with.
  stored = None if run_as == 'written out' else 'identity'
  assert flops == len(X) * gauge.pair_cost(LAYOUT, R, stored)
  assert flops == len(X) * ur.count_params(w if stored else ur.write_out(w))
  assert not [s for s in shapes if sorted(s[-2:]) == sorted((D, M))]
  # Two sums of 12 products in another order.
  np.testing.assert_allclose(
    small_fn(w, X), fn(w.dense(), X), rtol=1e-5, atol=1e-5
  )


def scanned(p, x):
  return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p)[0]


WRAPS = {
  'jit': jax.jit,
  'remat': lambda f: jax.jit(jax.checkpoint(f)),
  'vmap': lambda f: lambda p, x: jax.vmap(f, (None, 0))(p, x[None])[0],
}


@pytest.mark.parametrize('wrap', WRAPS)
@pytest.mark.parametrize('model', ['plain', 'scan'])
def test_gradients_are_those_of_the_dense_product(wrap, model, run_as):
  w = identity_pair(LAYOUT if model == 'plain' else STACK, R)
  fn = USES['x W'] if model == 'plain' else scanned
  loss = lambda f: lambda p: jnp.sum(jnp.sin(WRAPS[wrap](f)(p, np.float64(X))))
  with jax.enable_x64(True):
    wide = jax.tree.map(np.float64, w)
    got = jax.grad(loss(ur.low_rank(fn)))(wide)
    want = jax.grad(lambda p: loss(fn)(p.dense()))(wide)
  assert jax.tree.structure(got) == jax.tree.structure(w)
  for g, v in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(g, v, rtol=1e-9, atol=1e-12)


def test_scanned_pairs_of_few_rows_do_the_work_of_their_parameters():
  w, x = identity_pair(STACK, R), X[:R]
  flops, shapes = dot_flops(ur.low_rank(scanned), w, x)
  assert flops == len(x) * ur.count_params(w)
  assert not [s for s in shapes if s[-2:] == (D, D)]


def test_a_convolution_meets_its_block_one_way_only():
  """Turned round, the identity would stand in its window: multiplied out."""
  layout = ur.Layout.of((2, 2, 4, 6), inputs=(0, 1, 2), outputs=(3,))
  w, x = identity_pair(layout, R), draw(2, 5, 5, 6)
  fn = lambda w, x: lax.conv_general_dilated(
    x,
    w,
    (1, 1),
    'SAME',
    dimension_numbers=('NHWC', 'HWOI', 'NHWC'),
  )
  with pytest.warns(UserWarning, match='over other axes'):
    got = ur.low_rank(fn)(w, x)
  np.testing.assert_allclose(got, fn(w.dense(), x), rtol=1e-4, atol=1e-4)


def test_factors_spread_over_a_mesh_of_automatic_axes(run_as):
  mesh = jax.make_mesh((2,), ('d',), axis_types=(AxisType.Auto,))
  put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))
  w, x = identity_pair(LAYOUT, R), draw(4, D)
  spread = dataclasses.replace(w, a=put(w.a), b=put(w.b, None, 'd'))
  # Two sums of 12 products in another order.
  np.testing.assert_allclose(
    jax.jit(ur.low_rank(USES['x W']))(spread, put(x, 'd')),
    x @ w.dense(),
    rtol=1e-5,
    atol=1e-5,
  )


@pytest.mark.parametrize('spec', [(), (None, 'd')])
def test_factors_on_a_mesh_of_explicit_axes(spec):
  """JAX does not say how a lookup is spread: there B is written out."""
  mesh = jax.make_mesh((2,), ('d',), axis_types=(AxisType.Explicit,))
  w, x = identity_pair(LAYOUT, R), draw(4, D)
  want = x @ np.asarray(w.dense())
  with jax.set_mesh(mesh):
    x = jax.device_put(x, NamedSharding(mesh, P(() if spec else 'd')))
    b = jax.device_put(w.b, NamedSharding(mesh, P(*spec)))
    spread = {'w': dataclasses.replace(w, b=b)}
    small_fn = ur.low_rank(lambda p, x: x @ p['w'])
    for tree in (spread, ur.write_out(spread)):
      found = jax.jit(small_fn)(tree, x)
      # Two sums of 12 products in another order.
      np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
      spread['w'].dense(), w.dense(), rtol=1e-5, atol=1e-5
    )


# --- trees ---


@pytest.fixture(scope='module')
def problem():
  """Heads, a stack and a tall kernel whose output has few features."""
  params = {
    'heads': draw(8, 2, 6) / 3,
    'stack': draw(2, 12, 12) / 3,
    'tall': draw(12, 4) / 3,
    'bias': draw(4),
  }

  def fn(p, x):
    y = jnp.einsum('bd,dhe->bhe', x, p['heads']).reshape(len(x), -1)
    y, _ = lax.scan(lambda y, w: (y + jnp.tanh(y @ w), None), y, p['stack'])
    return y @ p['tall'] + p['bias']

  x = draw(200, 8) @ draw(8, 8) + 0.5
  moments = ur.collect(
    fn, params, [x], loss=ur.sampled_cross_entropy(), progress=False
  )
  return fn, jax.tree.map(jnp.asarray, params), moments, x


RANKS = {'heads': 5, 'stack': (3, 7), 'tall': 3}


@pytest.mark.parametrize('method', ['output', 'utilized', 'loss'])
def test_factorize_gives_the_same_function_of_fewer_numbers(problem, method):
  fn, params, moments, x = problem
  plain = ur.factorize(params, moments, RANKS, method=method)
  small = ur.factorize(params, moments, RANKS, method=method, gauge='identity')
  other = x[::-1] * 1.3 - 1
  want = ur.low_rank(fn)(plain, other)
  error = jnp.abs(ur.low_rank(fn)(small, other) - want).max()
  # float32 sums of 12 products through four layers, of size about 5.
  assert float(error / jnp.abs(want).max()) < 3e-6
  assert ur.count_params(plain) - ur.count_params(small) == 25 + 2 * 49 + 9
  assert small['heads'].b.shape == (5, 7) and small['tall'].c is None
  for name in RANKS:
    np.testing.assert_allclose(
      small[name].dense(), plain[name].dense(), atol=2e-6
    )


def test_at_full_width_nothing_is_left_to_store(problem):
  fn, params, moments, x = problem
  small = ur.factorize(params, moments, {'tall': 4}, gauge='identity')
  assert small['tall'].order is None and small['tall'].b.shape == (4, 4)


def test_it_trains_as_the_plain_pair_does(problem):
  fn, params, moments, x = problem
  x, y = x[:64], jnp.sin(3 * x[:64, :4])
  small_fn = ur.low_rank(fn)
  loss = lambda p: jnp.mean((small_fn(p, x) - y) ** 2)
  optimizer = optax.adamw(3e-3, weight_decay=1e-3)

  @jax.jit
  def step(p, state):
    updates, state = optimizer.update(jax.grad(loss)(p), state, p)
    return optax.apply_updates(p, updates), state

  ends = []
  for name in (None, 'identity'):
    p = ur.factorize(params, moments, RANKS, gauge=name)
    state, structure, start = optimizer.init(p), jax.tree.structure(p), loss(p)
    for _ in range(30):
      p, state = step(p, state)
    assert jax.tree.structure(p) == structure
    ends.append(float(loss(p) / start))
  # Once for each structure: the order's hash does not recompile.
  assert step._cache_size() == 2
  # Both learn, the one with fewer numbers nearly as fast.
  assert ends[0] < 0.75 and ends[1] < 0.75
  assert ends[1] < 1.5 * ends[0]


def test_saving_stacking_and_merging_keep_it(problem, tmp_path):
  fn, params, moments, x = problem
  small = ur.factorize(params, moments, RANKS, gauge='identity')
  ur.save(tmp_path / 't', small)
  again = ur.load(tmp_path / 't')
  assert jax.tree.structure(again) == jax.tree.structure(small)
  jax.tree.map(np.testing.assert_array_equal, again, small)
  small = ur.factorize(
    params, moments, RANKS, gauge='identity', compensate_mean=False
  )
  merged = ur.merge(small)
  np.testing.assert_allclose(
    fn(merged, x), ur.low_rank(fn)(small, x), rtol=1e-4, atol=1e-4
  )
  tree = {'blocks': {'w': small['stack']}}
  apart = stack.unstack(tree, 'blocks', 'b{}')
  for i in range(2):
    np.testing.assert_array_equal(
      apart[f'b{i}']['w'].dense(), small['stack'].dense()[i]
    )
  together = stack.stack(apart, 'blocks', 'b{}')
  assert jax.tree.structure(together) == jax.tree.structure(tree)
  jax.tree.map(np.testing.assert_array_equal, together, tree)


@pytest.mark.parametrize('form', ['heads', 'stack', 'experts'])
def test_writing_out_gives_plain_pairs_of_the_same_function(form):
  layout = {
    'heads': ur.Layout.of((8, 2, 6), inputs=(0,), outputs=(1, 2)),
    'stack': STACK,
    'experts': ur.Layout.of((8, 3, 5), groups=(1,), inputs=(0,), outputs=(2,)),
  }[form]
  tree = {'w': identity_pair(layout, R), 'bias': draw(4)}
  whole = ur.write_out(tree)
  assert whole['w'].order is None and whole['bias'] is tree['bias']
  assert ur.count_params(whole) - ur.count_params(tree) == (
    layout.num_groups * R**2
  )
  # Products with an identity: the very numbers, but for the others' sums.
  np.testing.assert_allclose(
    whole['w'].dense(), tree['w'].dense(), rtol=1e-6, atol=1e-6
  )
  again = ur.write_out(whole)
  assert again['w'] is whole['w']
  shapes = jax.eval_shape(ur.write_out, tree)
  assert jax.tree.structure(shapes) == jax.tree.structure(whole)


def test_layers_of_different_rank_are_widened_into_one_stack():
  layout = ur.Layout.of((2, 6, 5), groups=(0,), inputs=(1,), outputs=(2,))
  tree = {f'b{i}': identity_pair(layout, r) for i, r in enumerate((2, 4, 3))}
  leaf = stack.stack({**tree}, 'w', 'b{}')['w']
  assert leaf.rank == 4 and leaf.b.shape == (3, 2, 4, 1)
  for i in range(3):
    # An output that became a pivot was a float32 sum before.
    np.testing.assert_allclose(
      leaf.dense()[i], tree[f'b{i}'].dense(), rtol=1e-5, atol=1e-5
    )
  plain = ur.LowRank(draw(2, 6, 2), draw(2, 2, 5), None, layout)
  with pytest.raises(ValueError, match='an identity block, or none'):
    stack.stack({'b0': tree['b0'], 'b1': plain}, 'w', 'b{}')


# --- costs ---


def test_every_rank_function_counts_what_is_kept(problem):
  _, params, moments, _ = problem
  biases = len(params['bias'])
  dense = ur.count_params(params) - biases
  damage = lambda ranks: ur.predict_loss(
    params, moments, ranks, compensate_mean=False
  )
  for fraction in (0.4, 0.6, 0.9):
    for choose in (
      functools.partial(ur.budget_ranks, compensate_mean=False),
      ur.uniform_ranks,
    ):
      plain, more = (
        choose(params, moments, params_fraction=fraction, gauge=name)
        for name in (None, 'identity')
      )
      assert damage(more) < damage(plain)
      small = ur.factorize(
        params, moments, more, gauge='identity', compensate_mean=False
      )
      assert ur.count_params(small) - biases <= fraction * dense
  ranks = ur.energy_ranks(params, moments, energy=0.9999, gauge='identity')
  assert set(ur.energy_ranks(params, moments, energy=0.9999)) < set(ranks)


def test_a_budget_of_multiplications_counts_those_that_run(problem):
  fn, params, moments, x = problem
  x = jnp.tile(x, (5, 1))
  dense, _ = dot_flops(fn, params, x)
  for fraction in (0.4, 0.7):
    ranks = ur.budget_ranks(
      params, moments, flops_fraction=fraction, gauge='identity'
    )
    small = ur.factorize(params, moments, ranks, gauge='identity')
    flops, _ = dot_flops(ur.low_rank(fn), small, x)
    assert 0.9 * fraction * dense < flops <= fraction * dense


def test_an_unknown_gauge_is_refused(problem):
  _, params, moments, _ = problem
  for call in (
    lambda: ur.factorize(params, moments, RANKS, gauge='qr'),
    lambda: ur.energy_ranks(params, moments, gauge='qr'),
    lambda: ur.uniform_ranks(params, moments, params_fraction=0.5, gauge='qr'),
    lambda: ur.budget_ranks(params, moments, params_fraction=0.5, gauge='qr'),
    lambda: ur.search_ranks(lambda p: 1.0, params, moments, gauge='qr'),
  ):
    with pytest.raises(ValueError, match="unknown gauge 'qr'"):
      call()

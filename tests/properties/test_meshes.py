"""Under the caller's mesh: every verb gives what it gives without one."""

import contextlib
import functools
import warnings

from flax import nnx
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

import utilized_rank as ur

collect = functools.partial(ur.collect, progress=False)
D, F, M = 8, 12, 6
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit


def mesh_of(shape, kind=AUTO):
  names = ('data', 'model')[: len(shape)]
  return jax.make_mesh(shape, names, axis_types=(kind,) * len(shape))


@pytest.fixture(scope='module')
def params():
  rng = np.random.default_rng(0)
  draw = lambda *shape: (rng.normal(size=shape) / 3).astype(np.float32)
  return {'up': draw(D, F), 'b': draw(F), 'down': draw(F, M)}


@pytest.fixture(scope='module')
def batches():
  rng = np.random.default_rng(1)
  return [rng.normal(size=(n, D)).astype(np.float32) for n in (16, 16, 6)]


def fn(params, x):
  h = jnp.tanh(x @ params['up'] + params['b'])
  return h @ params['down']


def constrained(params, x):
  """The same, with bare specs: it runs where a mesh is."""
  x = jax.lax.with_sharding_constraint(x, P('data'))
  return jax.lax.with_sharding_constraint(fn(params, x), P('data'))


def reference(params, batches):
  """S of every kernel in float64."""
  x = np.concatenate(batches).astype(np.float64)
  w = {k: np.asarray(v, np.float64) for k, v in params.items()}
  h = np.tanh(x @ w['up'] + w['b'])
  return {'up': x.T @ x / len(x), 'down': h.T @ h / len(h)}


def assert_right(moments, params, batches):
  want = reference(params, batches)
  assert set(moments) == set(want)
  for path, second in want.items():
    assert int(moments[path].count) == sum(map(len, batches))
    # Float32 sums of 38 products of numbers near 1.
    np.testing.assert_allclose(moments[path].second, second, atol=2e-6)


@contextlib.contextmanager
def legacy(mesh):
  with warnings.catch_warnings():
    warnings.simplefilter('ignore', DeprecationWarning)
    context = mesh
    context.__enter__()
  try:
    yield
  finally:
    context.__exit__(None, None, None)


# --- collect ---


@pytest.mark.parametrize('given', [False, True])
@pytest.mark.parametrize('kind', [AUTO, EXPLICIT])
@pytest.mark.parametrize('shape', [(1,), (4,), (2, 2)])
def test_collect_under_set_mesh(params, batches, shape, kind, given):
  mesh = mesh_of(shape, kind)
  with jax.set_mesh(mesh):
    found = collect(fn, params, batches, mesh=mesh if given else None)
  assert_right(found, params, batches)


@pytest.mark.parametrize('shape', [(1,), (4,), (2, 2)])
@pytest.mark.parametrize('enter', [jax.set_mesh, legacy])
def test_the_functions_own_axis_names_are_the_callers(
  params, batches, enter, shape
):
  with enter(mesh_of(shape)):
    found = collect(constrained, params, batches)
  assert_right(found, params, batches)


def test_a_mesh_that_the_function_itself_holds(params, batches):
  """Nothing is in force: the constraint names its devices."""
  where = NamedSharding(mesh_of((2, 2)), P('data', 'model'))
  held = lambda params, x: fn(
    params, jax.lax.with_sharding_constraint(x, where)
  )
  assert_right(collect(held, params, batches), params, batches)


def test_a_shard_map_inside_the_function(params, batches):
  mesh = mesh_of((4,))
  local = lambda x: jax.shard_map(
    jnp.negative, mesh=mesh, in_specs=P('data'), out_specs=P('data')
  )(-x)
  inner = lambda params, x: fn(params, local(x))
  for enter in (contextlib.nullcontext, jax.set_mesh):
    with enter(mesh):
      found = collect(inner, params, batches[:2])
    assert_right(found, params, batches[:2])


def test_the_function_sees_the_callers_mesh_and_no_other(params, batches):
  seen = set()

  def watching(params, x):
    seen.add(jax.sharding.get_abstract_mesh().axis_names)
    return fn(params, x)

  collect(watching, params, batches)
  assert seen == {()}
  seen.clear()
  with jax.set_mesh(mesh_of((2, 2))):
    collect(watching, params, batches)
  assert seen == {('data', 'model')}


def test_another_mesh_than_the_one_in_force(params, batches):
  other = jax.sharding.Mesh(np.array(jax.devices()[2:]), ('data',))
  with jax.set_mesh(mesh_of((4,))):
    found = collect(constrained, params, batches, mesh=other)
  assert_right(found, params, batches)


def test_batches_keep_their_type_on_explicit_meshes(params, batches):
  mesh, seen = mesh_of((4,), EXPLICIT), []

  def typed(params, x):
    seen.append(jax.typeof(x).sharding.spec)
    return fn(params, x)

  with jax.set_mesh(mesh):
    placed = [jax.device_put(x, P('data')) for x in batches[:2]]
    assert_right(collect(typed, params, placed), params, batches[:2])
    assert set(seen) == {P('data', None)}
    seen.clear()
    collect(typed, params, batches)
    assert set(seen) == {P(None, None)}
    seen.clear()
    collect(typed, params, batches[:2], batch_axes=['data'])
  assert P('data', None) in seen


@pytest.mark.parametrize('kind', [AUTO, EXPLICIT])
def test_losses_rows_masks_and_sums_under_set_mesh(params, batches, kind):
  loss = lambda outputs, x: jnp.sum(outputs**2, -1)
  mask = lambda x: np.arange(len(x)) % 3 > 0
  kwargs = dict(loss=loss, fisher_rows=True, accumulate='compensated')
  want = collect(fn, params, batches, mask=mask, **kwargs)
  with jax.set_mesh(mesh_of((2, 2), kind)):
    found = collect(fn, params, batches, mask=mask, **kwargs)
  for path in want:
    for field in ('second', 'grad_second', 'row_fisher'):
      a, b = (getattr(m[path], field) for m in (found, want))
      # The same numbers, added in another order in float32.
      np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


# --- names of flax ---


RULES = [('batch', 'data'), ('mlp', 'model')]


@pytest.mark.parametrize('boxed', [nn.with_partitioning, None])
def test_boxed_parameters_without_a_mesh(batches, boxed):
  box = boxed or nn.with_logical_partitioning
  init = box(nn.initializers.lecun_normal(), ('embed', 'mlp'))
  model = nn.Dense(M, kernel_init=init)
  params = model.init(jax.random.key(0), batches[0])
  with nn.logical_axis_rules(RULES):
    found = collect(model.apply, params, batches)
  x = np.concatenate(batches).astype(np.float64)
  (moment,) = found.values()
  np.testing.assert_allclose(moment.second, x.T @ x / len(x), atol=2e-6)


@pytest.mark.parametrize('shape', [(1, 1), (2, 2)])
def test_boxed_parameters_and_logical_constraints_on_a_mesh(batches, shape):
  class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
      init = nn.with_logical_partitioning(
        nn.initializers.lecun_normal(), ('embed', 'mlp')
      )
      x = nn.Dense(F, kernel_init=init)(x)
      return nn.with_logical_constraint(x, ('batch', 'mlp'))

  model = Model()
  x = np.concatenate(batches).astype(np.float64)
  rules = [*RULES, ('embed', None)]
  with jax.set_mesh(mesh_of(shape)), nn.logical_axis_rules(rules):
    params = model.init(jax.random.key(0), batches[0])
    found = collect(model.apply, params, batches)
  (moment,) = found.values()
  np.testing.assert_allclose(moment.second, x.T @ x / len(x), atol=2e-6)


@pytest.mark.parametrize('shape', [(1, 1), (2, 2)])
def test_annotated_nnx_parameters(batches, shape):
  """Flax wants a mesh for them, and puts them on it."""
  with jax.set_mesh(mesh_of(shape)):
    init = nnx.with_partitioning(
      nnx.initializers.lecun_normal(), ('data', 'model')
    )
    layer = nnx.Linear(D, F, kernel_init=init, rngs=nnx.Rngs(0))
    graph, state = nnx.split(layer)
    apply = lambda state, x: nnx.merge(graph, state)(x)
    found = collect(apply, state, batches)
    (path,) = found
    small = ur.factorize(state, found, {path: 4}, progress=False)
    outputs = jax.jit(ur.low_rank(apply))(small, batches[0])
  x = np.concatenate(batches).astype(np.float64)
  np.testing.assert_allclose(found[path].second, x.T @ x / len(x), atol=2e-6)
  assert outputs.shape == (len(batches[0]), F)


# --- the other verbs ---


def verbs(fn, params, batches, moments):
  """What each gives, as one array or mapping."""
  quiet = dict(progress=False)
  small_fn = jax.jit(ur.low_rank(fn))
  ranks = {'up': 4, 'down': 3}
  small = ur.factorize(params, moments, ranks, **quiet)
  thin = ur.factorize(params, moments, ranks, gauge='identity', **quiet)
  plain = ur.factorize(params, moments, ranks, compensate_mean=False, **quiet)
  anchored = ur.anchor(fn, params, batches, ranks, **quiet)
  refined = ur.refine(fn, params, small, batches, steps=2, **quiet)
  full, _ = ur.compress(fn, params, batches, params_fraction=0.7, **quiet)
  x = batches[0]
  return {
    'capture': jax.jit(ur.capture(fn))(params, x)[1]['down'].second,
    'factorize': small_fn(small, x),
    'identity': small_fn(thin, x),
    'write_out': small_fn(ur.write_out(thin), x),
    'merge': fn(ur.merge(plain), x),
    'anchor': small_fn(anchored, x),
    'refine': small_fn(refined, x),
    'compress': small_fn(full, x),
  }


@pytest.fixture(scope='module')
def without(params, batches):
  moments = collect(fn, params, batches)
  return verbs(fn, params, batches[:2], moments)


@pytest.mark.parametrize(
  'enter, kind, run',
  [
    (jax.set_mesh, AUTO, constrained),
    (jax.set_mesh, EXPLICIT, fn),
    (legacy, AUTO, constrained),
  ],
)
def test_verbs_under_a_mesh(params, batches, without, enter, kind, run):
  with enter(mesh_of((2, 2), kind)):
    moments = collect(run, params, batches)
    found = verbs(run, params, batches[:2], moments)
  for name, want in without.items():
    # Sums in another order: factors differ in float32's last digits, those
    # that are trained on them by some more.
    np.testing.assert_allclose(
      found[name], want, rtol=1e-3, atol=1e-4, err_msg=name
    )


# --- where factors are ---

SPECS = {'up': P(None, 'model'), 'b': P('model'), 'down': P('model', None)}


@pytest.mark.parametrize('kind', [AUTO, EXPLICIT])
def test_factors_are_spread_as_the_kernel_was(params, batches, kind):
  mesh = mesh_of((2, 2), kind)
  moments = collect(fn, params, batches)
  placed = {
    k: jax.device_put(v, NamedSharding(mesh, SPECS[k]))
    for k, v in params.items()
  }
  ranks = {'up': 4, 'down': 3}
  plain = ur.factorize(placed, moments, ranks, progress=False)
  thin = ur.factorize(placed, moments, ranks, gauge='identity', progress=False)
  where = lambda array, *spec: array.sharding.is_equivalent_to(
    NamedSharding(mesh, P(*spec)), array.ndim
  )
  for tree in (plain, thin):
    assert where(tree['up'].a, None, None)
    assert where(tree['up'].b, None, 'model')
    assert where(tree['b'], 'model')
    assert where(tree['down'].a, 'model', None)
    assert where(tree['down'].b, None, None)
    assert where(tree['down'].c, None)
  dense = ur.factorize(params, moments, ranks, progress=False)
  if kind == AUTO:
    # One float32 program on four devices, and one on one.
    np.testing.assert_allclose(
      jax.jit(ur.low_rank(fn))(plain, batches[0]),
      ur.low_rank(fn)(dense, batches[0]),
      rtol=1e-4,
      atol=1e-5,
    )


def test_axes_of_heads_experts_and_stacks_keep_their_places():
  mesh = mesh_of((2, 2))
  rng = np.random.default_rng(2)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  specs = {
    'heads': P('data', 'model', None),
    'experts': P('data', None, 'model'),
    'odd': P(None, 'model'),
    'both': P(('data', 'model'), None),
  }
  params = {
    'heads': draw(D, 2, 3),
    'experts': draw(2, D, 4),
    'odd': draw(D, 6),
    'both': draw(D, 6),
  }
  batch = {'x': draw(16, D), 'e': draw(16, 2, D)}

  def apply(p, batch):
    x = batch['x']
    heads = jnp.einsum('bd,dhe->bhe', x, p['heads'])
    experts = jnp.einsum('bnd,ndm->bnm', batch['e'], p['experts'])
    return heads, experts, x @ p['odd'], x @ p['both']

  moments = collect(apply, params, [batch])
  placed = {
    k: jax.device_put(v, NamedSharding(mesh, specs[k]))
    for k, v in params.items()
  }
  spec = lambda array: P(*array.sharding.spec)
  small = ur.factorize(
    placed, moments, dict.fromkeys(params, 3), progress=False
  )
  assert spec(small['heads'].a) == P('data', None)
  assert spec(small['heads'].b) == P(None, 'model', None)
  assert spec(small['experts'].a) == P('data', None, None)
  assert spec(small['experts'].b) == P('data', None, 'model')
  assert spec(small['experts'].c) == P('data', 'model')
  assert spec(small['both'].a) == P(('data', 'model'), None)
  # Of six outputs an identity block of three leaves three: not over two.
  thin = ur.factorize(
    placed, moments, {'odd': 3}, gauge='identity', progress=False
  )
  assert spec(thin['odd'].b) == P(None, None)

"""What capture promises beyond the matrix: nothing missed, nothing changed."""

import functools
import operator

from flax import linen as nn
import jax
from jax import lax
from jax.experimental import pallas as pl
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest
from refused import REFUSED

import utilized_rank as ur

RNG = np.random.default_rng(0)
X = RNG.normal(size=(6, 4)).astype(np.float32) + 0.5
W = RNG.normal(size=(4, 4)).astype(np.float32)
B = np.zeros(4, np.float32)


def check(moment, rows):
  """Against sums taken in float64 numpy."""
  rows = np.asarray(rows, np.float64)
  assert int(moment.count) == len(rows)
  np.testing.assert_allclose(moment.mean, rows.mean(0), rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(
    moment.second, rows.T @ rows / len(rows), rtol=1e-5, atol=1e-6
  )


# --- nothing changed ---


class Net(nn.Module):
  @nn.compact
  def __call__(self, x, train=False):
    x = nn.gelu(nn.Dense(8)(x))
    x = nn.BatchNorm(use_running_average=not train)(x)
    x = nn.Dropout(0.5, deterministic=not train)(x)
    x, _ = nn.scan(
      nn.remat(Layer),
      variable_axes={'params': 0},
      split_rngs={'params': True},
      length=3,
    )()(x)
    return nn.Dense(3)(x)


class Layer(nn.Module):
  @nn.compact
  def __call__(self, x):
    y = nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x)[:, None])
    return x + y[:, 0], None


@functools.cache
def net():
  x = jnp.tile(X, (1, 2))
  return Net(), jax.jit(Net().init)(jax.random.key(0), x), x


def test_outputs_are_within_one_unit_in_the_last_place():
  model, variables, x = net()
  plain = jax.jit(model.apply)(variables, x)
  captured, _ = jax.jit(ur.capture(model.apply))(variables, x)
  np.testing.assert_array_max_ulp(
    np.asarray(captured), np.asarray(plain), maxulp=1
  )


def test_batch_split_and_order_change_nothing():
  model, variables, x = net()
  moments = jax.jit(lambda x: ur.capture(model.apply)(variables, x)[1])
  whole = moments(x)
  halves = ur.merge_moments(moments(x[:3]), moments(x[3:]))
  for other in (halves, moments(x[::-1])):
    for path in whole:
      np.testing.assert_allclose(
        other[path].second, whole[path].second, rtol=2e-5, atol=2e-6
      )


def test_training_mode():
  model, variables, x = net()
  rngs = {'dropout': jax.random.key(1)}

  def fn(variables, x, key, train):
    return model.apply(
      variables, x, train=train, mutable=['batch_stats'], rngs={'dropout': key}
    )

  plain = jax.jit(fn, static_argnums=3)(variables, x, rngs['dropout'], True)
  captured = jax.jit(ur.capture(fn), static_argnums=3)
  (y, new), moments = captured(variables, x, rngs['dropout'], True)
  np.testing.assert_array_max_ulp(np.asarray(y), np.asarray(plain[0]), 1)
  assert jax.tree.structure(new) == jax.tree.structure(plain[1])
  jax.tree.map(
    lambda a, b: np.testing.assert_array_max_ulp(
      np.asarray(a), np.asarray(b), 1
    ),
    new,
    plain[1],
  )
  assert 'params/Dense_0/kernel' in moments
  sites = ur.find_sites(fn, variables, x, rngs['dropout'], True)
  # The statistics of a batch come between Dense_0 and what reads it.
  assert sites['params/Dense_0/kernel'].bias == 'params/Dense_0/bias'
  assert 'batch_stats/BatchNorm_0/mean' in sites.unseen


def test_scalars_and_functions_stay_static():
  def fn(params, x, power, act, *, train, seed):
    x = act(x @ params['w']) if train else x
    noise = jax.random.normal(jax.random.wrap_key_data(seed), x.shape)
    return x**power + noise

  seed = jax.random.key_data(jax.random.key(0))
  _, moments = ur.capture(fn)(
    {'w': W, 'name': None}, X, 2, jnp.tanh, train=True, seed=seed
  )
  check(moments['w'], X)
  _, moments = ur.capture(fn)({'w': W}, X, 2, jnp.tanh, train=False, seed=seed)
  assert not moments


def test_derivatives_of_captured_outputs():
  def loss(fn):
    return lambda p: jnp.sum(jnp.tanh(fn(p, X)))

  fn = jax.checkpoint(lambda p, x: jnp.tanh(x @ p['w']) @ p['w'].T)
  want = jax.grad(loss(fn))({'w': W})
  got, moments = jax.grad(
    lambda p: (lambda y, m: (jnp.sum(jnp.tanh(y)), m))(*ur.capture(fn)(p, X)),
    has_aux=True,
  )({'w': W})
  np.testing.assert_allclose(got['w'], want['w'], rtol=1e-6, atol=1e-6)
  assert not moments  # w is read over both of its axes


def test_custom_rules_survive_around_other_parameters():
  @jax.custom_vjp
  def scaled(x, s):
    return x * s

  scaled.defvjp(lambda x, s: (x * s, None), lambda _, t: (t * 0 + 7, t.sum()))

  @jax.custom_vjp
  def multiplied(x, w):
    return x @ w

  multiplied.defvjp(lambda x, w: (x @ w, w), lambda w, t: (t * 0 + 7, w))

  def slope(fn, params, **kwargs):
    run = ur.capture(fn, **kwargs)
    return jax.grad(lambda x: jnp.sum(run(params, x)[0]))(X)

  assert (slope(lambda p, x: scaled(x, p['s']), {'s': jnp.ones(())}) == 7).all()
  params = {'w': W, 'v': W.copy()}  # one object would be one kernel
  fn = lambda p, x: multiplied(x, p['w'])
  # What is differentiated is what is computed, once a kernel inside is wanted.
  np.testing.assert_allclose(slope(fn, params)[0], W.sum(1), rtol=1e-6)
  both = lambda p, x: multiplied(x @ p['v'] * 0 + x, p['w'])
  got = slope(both, params, select=[('v', True)])
  np.testing.assert_allclose(got, np.full_like(X, 7), rtol=1e-6)


def test_a_scanned_model_does_not_grow_with_depth():
  def lines(depth):
    params = {'w': np.zeros((depth, 4, 4), np.float32)}
    fn = lambda p, x: lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p['w'])[
      0
    ]
    return len(jax.jit(ur.capture(fn)).lower(params, X).as_text().splitlines())

  assert lines(2) == lines(48)


# --- nothing missed ---


def test_dead_uses_do_not_count():
  def fn(params, x):
    dead = jnp.ones((30, 4)) @ params['w']
    return x @ params['w'] + 0 * dead.shape[0]

  check(ur.capture(fn)({'w': W}, X)[1]['w'], X)


def test_branches_count_where_they_are_taken():
  fn = lambda p, x, i: lax.switch(
    i, [lambda: x @ p['a'], lambda: x @ p['b'] @ p['a'], lambda: x]
  )
  captured = jax.jit(ur.capture(fn))
  params = {'a': W, 'b': W.T}
  for i, counts in enumerate([(6, 0), (6, 6), (0, 0)]):
    _, moments = captured(params, X, i)
    assert (int(moments['a'].count), int(moments['b'].count)) == counts
    assert np.isfinite(moments['b'].second).all()
  _, moments = jax.jit(jax.vmap(ur.capture(fn), (None, None, 0)))(
    params, X, jnp.arange(3)
  )
  assert moments['a'].count.tolist() == [6, 6, 0]


def test_shared_inputs_share_moments():
  def fn(p, x):
    x = x.astype(jnp.bfloat16)
    q, k = (x @ p[n].astype(x.dtype) for n in 'qk')
    return q * k + jnp.cos(x) @ p['v'].astype(x.dtype)

  sites = ur.find_sites(fn, {'q': W, 'k': W.copy(), 'v': W.copy()}, X)
  assert sites['q'].index == sites['k'].index != sites['v'].index


def test_bfloat16_rows_are_summed_in_float32():
  x = jnp.full((5000, 4), 1.0, jnp.bfloat16)
  _, moments = ur.capture(lambda p, x: x @ p)(jnp.asarray(W, x.dtype), x)
  assert moments[''].sums.total.tolist() == [5000.0] * 4
  assert moments[''].sums.second.dtype == jnp.float32


@pytest.mark.parametrize('kind', [AxisType.Auto, AxisType.Explicit])
def test_sharded_batches(kind):
  mesh = jax.make_mesh((2,), ('d',), axis_types=(kind,))
  conv = lambda x, w: lax.conv_general_dilated(x, w, (1,), 'SAME')
  fn = lambda p, x: jnp.einsum('ncs,cd->nds', jnp.tanh(conv(x, p['c'])), p['w'])
  params = {'w': W, 'c': RNG.normal(size=(4, 3, 2)).astype(np.float32)}
  x = RNG.normal(size=(4, 3, 5)).astype(np.float32)
  _, want = jax.jit(ur.capture(fn))(params, x)
  with jax.set_mesh(mesh):
    put = lambda v, spec: jax.device_put(v, NamedSharding(mesh, spec))
    _, got = jax.jit(ur.capture(fn))(
      jax.tree.map(lambda v: put(v, P()), params), put(x, P('d'))
    )
  for path in want:
    np.testing.assert_allclose(
      got[path].second, want[path].second, rtol=1e-5, atol=1e-6
    )


def test_tensor_parallel_kernels_are_groups():
  mesh = jax.make_mesh((2, 2), ('d', 'm'), axis_types=(AxisType.Auto,) * 2)

  @functools.partial(
    jax.shard_map,
    mesh=mesh,
    in_specs=((P(None, 'm'), P('m')), P('d')),
    out_specs=P('d'),
  )
  def fn(params, x):
    up, down = params
    scan = lambda c, _: (c, jnp.tanh(x @ up) @ down)
    (y,) = lax.scan(scan, 0, None, length=1)[1]
    return lax.psum(y, 'm')

  params = (W, W.T)
  y, moments = jax.jit(ur.capture(fn))(params, X)
  np.testing.assert_allclose(y, np.tanh(X @ W) @ W.T, rtol=1e-5, atol=1e-5)
  hidden = np.tanh(np.float64(X) @ W)
  for group in (0, 1):
    one = jax.tree.map(operator.itemgetter(group), moments)
    check(one['0'], X)
    check(one['1'], hidden[:, 2 * group : 2 * group + 2])
  factors = tuple(
    ur.LowRank(*_pair(w, e.layout), None, e.layout)
    for w, e in zip(params, moments.table)
  )
  np.testing.assert_allclose(
    jax.jit(ur.low_rank(fn))(factors, X), y, rtol=1e-5, atol=1e-5
  )


def test_a_spread_that_cuts_a_kernel_unevenly():
  mesh = jax.make_mesh((2,), ('d',), axis_types=(AxisType.Auto,))
  local = jax.shard_map(
    lambda w, x: lax.psum(x @ w, 'd'),
    mesh=mesh,
    in_specs=(P('d'), P(None, 'd')),
    out_specs=P(),
  )
  fn = lambda p, x: local(p['w'].transpose(1, 0, 2).reshape(6, 4), x)
  params = {'w': RNG.normal(size=(2, 3, 4)).astype(np.float32)}
  sites = ur.find_sites(fn, params, RNG.normal(size=(5, 6)).astype(np.float32))
  assert sites.unseen['w'] == 'used by shard_map'


def test_a_scan_of_no_steps():
  fn = lambda p, x: lax.scan(lambda x, w: (x @ w, None), x, p['w'])[0]
  sites = ur.find_sites(fn, {'w': np.zeros((0, 4, 4), np.float32)}, X)
  assert sites.unseen['w'] == 'used by a scan of no steps'


def _pair(w, layout):
  matrices = layout.to_matrices(w)
  u, s, vt = np.linalg.svd(matrices, full_matrices=False)
  g = layout.group_shape
  return (
    (u * s[..., None, :]).reshape(*g, *layout.input_shape, -1),
    vt.reshape(*g, vt.shape[-2], *layout.output_shape),
  )


# --- nothing guessed: what is refused, and in which words ---


def pallas(x, w):
  def kernel(x_ref, w_ref, out_ref):
    out_ref[...] = x_ref[...] @ w_ref[...]

  shape = jax.ShapeDtypeStruct((len(x), w.shape[1]), x.dtype)
  return pl.pallas_call(kernel, out_shape=shape, interpret=True)(x, w)


def callback(x, w):
  shape = jax.ShapeDtypeStruct((len(x), w.shape[1]), x.dtype)
  return jax.pure_callback(
    lambda x, w: np.asarray(x) @ np.asarray(w), shape, x, w
  )


OPAQUE = {'pallas_call': pallas, 'pure_callback': callback}
WRAPS = {
  'plain': lambda f: f,
  'jit': jax.jit,
  'scan': lambda f: (
    lambda p, x: lax.scan(lambda x, _: (f(p, x), None), x, None, length=2)[0]
  ),
  'custom_vjp': lambda f: _with_rule(f),
  'cond': lambda f: lambda p, x: lax.cond(x[0, 0] > 0, f, f, p, x),
}


def _with_rule(f):
  g = jax.custom_vjp(f)
  g.defvjp(lambda p, x: (f(p, x), None), lambda _, t: (None, t))
  return g


@pytest.mark.parametrize('wrap', WRAPS)
@pytest.mark.parametrize('name', OPAQUE)
def test_opaque_calls(name, wrap):
  fn = WRAPS[wrap](lambda p, x: OPAQUE[name](x, p['w'].T) @ p['v'])
  params = {'w': W, 'v': W.copy()}  # one object would be one kernel
  with pytest.raises(ur.UnsupportedError, match=f"'w'.*'{name}'"):
    ur.find_sites(fn, params, X)
  sites = ur.find_sites(fn, params, X, on_opaque='report')
  assert sites.holes == {'w': name}
  assert f'HOLE: enters {name}' in str(sites)
  assert set(sites) == {'v'}
  out, moments = ur.capture(fn, select=[('v', True)])(params, X)
  np.testing.assert_allclose(out, fn(params, X), rtol=1e-6, atol=1e-6)
  assert set(moments) == {'v'}


def test_a_hole_takes_the_whole_leaf():
  fn = lambda p, x: pallas(x @ p['w'], p['w'])
  sites = ur.find_sites(fn, {'w': W}, X, on_opaque='report')
  assert not sites
  with pytest.raises(KeyError, match='HOLE'):
    sites['w']


def test_debug_prints_are_no_holes(capfd):
  def fn(p, x):
    jax.debug.print('w {}', p['w'])
    return x @ p['w']

  _, moments = ur.capture(fn)({'w': W}, X)
  check(moments['w'], X)


@pytest.mark.parametrize('name', REFUSED)
def test_leaves_that_are_no_kernels_say_why(name):
  fn, params, reason = REFUSED[name]
  params = jax.tree.map(np.float32, params)
  sites = ur.find_sites(fn, params, X)
  assert 'w' not in sites
  assert reason in sites.unseen['w']
  assert reason in str(sites)
  # Of two parameters, the selected one would be the kernel.
  rules = [('w|v' if name == 'two_parameters' else 'w', True)]
  with pytest.raises(ValueError, match="'[wv]' is (selected|contracted)"):
    ur.capture(fn, select=rules)(params, X)


WINDOWS = {
  # As Keras' position embeddings are: added, never multiplied.
  'added': (
    lambda p, x: x[:3] @ p['v'] + lax.dynamic_slice(p['w'], (0, 0), (3, 4)),
    'used by add',
  ),
  'added_somewhere': (
    lambda p, x: (
      x[:3] @ p['v'] + lax.dynamic_slice_in_dim(p['w'], jnp.argmax(x) % 2, 3)
    ),
    'used by add',
  ),
  'multiplied': (
    lambda p, x: x[:, :3] @ lax.dynamic_slice(p['w'], (1, 0), (3, 4)) @ p['v'],
    'HOLE: a slice that is not one of equal parts (3 of 4)',
  ),
}


@pytest.mark.parametrize('name', WINDOWS)
def test_a_window_of_a_leaf_is_what_is_done_with_it(name):
  fn, reason = WINDOWS[name]
  sites = ur.find_sites(fn, {'w': W, 'v': W.copy()}, X)
  assert list(sites) == ['v'] and reason in sites.unseen['w']


def test_a_window_of_all_of_a_kernel_is_the_kernel():
  # Wherever it starts: the index is clamped.
  fn = lambda p, x: x @ lax.dynamic_slice_in_dim(p['w'], jnp.argmax(x), 4)
  _, moments = ur.capture(fn)({'w': W}, X)
  check(moments['w'], X)
  full = ur.factorize({'w': W}, moments, {'w': 4})
  np.testing.assert_allclose(ur.low_rank(fn)(full, X), X @ W, atol=1e-5)


def test_selection_says_which_of_two_parameters_is_the_kernel():
  probe = RNG.normal(size=(2, 4)).astype(np.float32)
  fn = lambda p, x: jnp.broadcast_to(p['probe'], (3, 2, 4)) @ p['w'] @ x.T
  params = {'probe': probe, 'w': W}
  assert not ur.find_sites(fn, params, X)
  _, moments = ur.capture(fn, select=[('w', True)])(params, X)
  check(moments['w'], np.tile(probe, (3, 1)))


@pytest.mark.parametrize(
  'params, x',
  [
    ({'w': np.ones((4, 4), np.int32)}, np.ones((2, 4), np.int32)),
    ({'w': W}, np.ones((2, 4), np.complex64)),
  ],
)
def test_numbers_that_are_not_real(params, x):
  with pytest.raises(TypeError, match='real floating'):
    ur.capture(lambda p, x: x @ p['w'])(params, x)


def test_shard_map_without_checks_is_refused():
  mesh = jax.make_mesh((2,), ('d',), axis_types=(AxisType.Auto,))
  fn = jax.shard_map(
    lambda p, x: x @ p['w'],
    mesh=mesh,
    in_specs=(P(), P('d')),
    out_specs=P('d'),
    check_vma=False,
  )
  with pytest.raises(ur.UnsupportedError, match="'w'.*check_vma=False"):
    ur.find_sites(fn, {'w': W}, X)


def test_bad_arguments():
  fn = lambda p, x: x @ p['w']
  with pytest.raises(ValueError, match="'error' or 'report'"):
    ur.find_sites(fn, {'w': W}, X, on_opaque='ignore')
  with pytest.raises(ValueError, match='holds no array'):
    ur.capture(fn)({}, X)
  with pytest.raises(ValueError, match='does not accept these parameters'):
    ur.capture(fn)({'v': W}, X)
  with pytest.raises(jax.errors.TracerBoolConversionError):
    ur.capture(lambda p, x: x @ p['w'] if x[0, 0] else x)({'w': W}, X)


# --- printing ---


def test_sites_explain_every_leaf():
  model, variables, x = net()
  text = str(ur.find_sites(model.apply, variables, x))
  lines = text.splitlines()
  assert len(lines) == len(jax.tree.leaves(variables)) + 3
  named = {v.split()[0]: v for v in lines}
  (line,) = [v for k, v in named.items() if k.endswith('query/kernel')]
  # Stacked over three layers, two heads of four features.
  assert line.split()[1:5] == ['3×8×2×4', '3', '8×8', '#1']
  assert line.endswith('query/bias')
  assert (
    len(
      {
        v.split()[4]
        for k, v in named.items()
        for n in ('query', 'key', 'value')
        if k.endswith(f'{n}/kernel')
      }
    )
    == 1
  )


def test_unknown_paths_get_help():
  sites = ur.find_sites(lambda p, x: x @ p['kernel'], {'kernel': W}, X)
  with pytest.raises(KeyError, match="did you mean \\['kernel'\\]"):
    sites['kernal']


def test_equal_inputs_of_different_members_are_not_shared():
  """a[0] and b[:, 0] read one value, as other members of their stacks."""
  x = RNG.normal(size=(2, 5, 3)).astype(np.float32)
  params = {name: np.ones((2, 2, 3, 4), np.float32) for name in 'abc'}

  def fn(p, x):
    each = lambda w: jnp.einsum('gnd,gdm->gnm', x, w)
    return each(p['a'][0]) + each(p['b'][:, 0]) + each(p['c'][0])

  _, moments = ur.capture(fn)(params, x)
  np.testing.assert_array_equal(moments['a'].count, [[5, 5], [0, 0]])
  np.testing.assert_array_equal(moments['b'].count, [[5, 0], [5, 0]])
  want = np.einsum('gnd,gne->gde', x, x) / 5
  np.testing.assert_allclose(moments['a'].second[0], want, rtol=1e-5)
  np.testing.assert_allclose(moments['b'].second[:, 0], want, rtol=1e-5)
  assert moments['a'].sums is moments['c'].sums

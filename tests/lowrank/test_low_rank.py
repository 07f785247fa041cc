"""`low_rank(fn)`: pairs are never multiplied out, gradients are the pairs'."""

import warnings

from flax import linen as nn
import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

import utilized_rank as ur
from utilized_rank.walk import compat

RNG = np.random.default_rng(0)
X = RNG.normal(size=(5, 12)).astype(np.float32)
D, R, M = 12, 2, 11  # sizes that occur nowhere else


def draw(*shape):
  return RNG.normal(size=shape).astype(np.float32)


def pair(d=D, r=R, m=M, lead=(), constant=False):
  n = len(lead)
  layout = ur.Layout.of(
    (*lead, d, m), groups=tuple(range(n)), inputs=(n,), outputs=(n + 1,)
  )
  c = draw(*lead, m) if constant else None
  return ur.LowRank(draw(*lead, d, r), draw(*lead, r, m), c, layout)


def dense(tree):
  return jax.tree.map(
    lambda v: v.dense() if isinstance(v, ur.LowRank) else v,
    tree,
    is_leaf=lambda v: isinstance(v, ur.LowRank),
  )


def jaxprs(jaxpr):
  jaxpr, _ = compat.open_jaxpr(jaxpr)
  yield jaxpr
  for eqn in jaxpr.eqns:
    for inner in compat.sub_jaxprs(eqn):
      yield from jaxprs(inner)


def layer(p, x):
  return jnp.tanh(x @ p['w'])[..., :D] @ p['v'].T


def scanned(p, x):
  def body(x, p):
    return jnp.tanh(jnp.pad(x @ p['w'], ((0, 0), (0, 1))) + x), None

  return lax.scan(body, x, p)[0]


WRAPS = {
  'plain': lambda f: f,
  'jit': jax.jit,
  'grad': lambda f: jax.grad(lambda p, x: jnp.sum(jnp.sin(f(p, x)))),
  'remat_grad': lambda f: jax.grad(
    lambda p, x: jnp.sum(jnp.sin(jax.checkpoint(f)(p, x)))
  ),
  'vmap': lambda f: lambda p, x: jax.vmap(f, (None, 0))(p, x[None]),
}
MODELS = {
  'layer': (layer, {'w': pair(), 'v': pair(D, R, M)}),
  'scan': (scanned, {'w': pair(lead=(3,))}),
}


@pytest.mark.parametrize('wrap', WRAPS)
@pytest.mark.parametrize('model', MODELS)
def test_factors_are_never_multiplied_out(model, wrap):
  fn, params = MODELS[model]
  run = WRAPS[wrap](ur.low_rank(fn))
  seen = [
    v.aval.shape
    for j in jaxprs(jax.make_jaxpr(run)(params, X))
    for eqn in j.eqns
    for v in eqn.outvars
  ]
  kernel = sorted((D, M))
  assert not [s for s in seen if sorted(s[-2:]) == kernel]
  # The test can fail: the dense model's gradient has kernels.
  if 'grad' in wrap:
    seen = [
      v.aval.shape
      for j in jaxprs(jax.make_jaxpr(WRAPS[wrap](fn))(dense(params), X))
      for eqn in j.eqns
      for v in eqn.outvars
    ]
    assert [s for s in seen if sorted(s[-2:]) == kernel]


@pytest.mark.parametrize('model', MODELS)
def test_gradient_is_the_dense_one_by_the_chain_rule(model):
  fn, params = MODELS[model]
  loss = lambda f: lambda p: jnp.sum(jnp.sin(f(p, np.float64(X))))
  with jax.enable_x64(True):
    wide = jax.tree.map(np.float64, params)
    got = jax.grad(loss(ur.low_rank(fn)))(wide)
    want = jax.tree.map(np.asarray, jax.grad(loss(fn))(dense(wide)))
  for name, leaf in wide.items():
    dw = want[name]
    np.testing.assert_allclose(
      got[name].a, dw @ np.swapaxes(leaf.b, -1, -2), rtol=1e-9, atol=1e-12
    )
    np.testing.assert_allclose(
      got[name].b, np.swapaxes(leaf.a, -1, -2) @ dw, rtol=1e-9, atol=1e-12
    )


@pytest.mark.quick
def test_remat_stays_remat():
  policy = jax.checkpoint_policies.save_only_these_names('kept')

  def fn(p, x):
    return jnp.tanh(checkpoint_name(x @ p['w'], 'kept'))

  fn = jax.checkpoint(fn, policy=policy, prevent_cse=False)
  (eqn,) = jax.make_jaxpr(ur.low_rank(fn))({'w': pair()}, X).eqns
  assert eqn.primitive.name in compat.REMAT
  assert eqn.params['policy'] is policy
  assert eqn.params['prevent_cse'] is False


def test_constants_are_added_at_every_kind_of_output():
  w = pair(constant=True)
  got = ur.low_rank(lambda p, x: x @ p)(w, X)
  np.testing.assert_allclose(got, X @ w.dense() + w.c, rtol=1e-5, atol=1e-5)
  got = ur.low_rank(lambda p, x: jnp.einsum('de,bd->eb', p, x))(w, X)
  np.testing.assert_allclose(got, (X @ w.dense() + w.c).T, rtol=1e-5, atol=1e-5)
  stack = pair(lead=(3,), constant=True)
  got = ur.low_rank(lambda p, x: lax.scan(lambda _, w: (0, x @ w), 0, p)[1])(
    stack, X
  )
  np.testing.assert_allclose(
    got, X @ stack.dense() + stack.c[:, None], rtol=1e-5, atol=1e-5
  )


@pytest.mark.parametrize(
  'layout, spec',
  [('NHWC', ('NHWC', 'HWIO', 'NHWC')), ('NCHW', ('NCHW', 'HWIO', 'NCHW'))],
)
@pytest.mark.parametrize('groups', [1, 2])
def test_convolutions_with_constants(layout, spec, groups):
  kh, kw, ci, co = 2, 3, 4, 6
  if groups == 1:
    leaf = ur.Layout.of((kh, kw, ci, co), inputs=(0, 1, 2), outputs=(3,))
    a, b, c = draw(kh, kw, ci, R), draw(R, co), draw(co)
  else:
    leaf = ur.Layout(
      (kh, kw, ci // 2, co),
      (kh, kw, ci // 2, 2, co // 2),
      (3,),
      (0, 1, 2),
      (4,),
    )
    a, b, c = (
      draw(2, kh, kw, ci // 2, R),
      draw(2, R, co // 2),
      draw(2, co // 2),
    )
  w = ur.LowRank(a, b, c, leaf)
  x = draw(2, 5, 6, ci)
  x = x if layout == 'NHWC' else x.transpose(0, 3, 1, 2)
  fn = lambda w, x: lax.conv_general_dilated(
    x, w, (2, 1), 'SAME', dimension_numbers=spec, feature_group_count=groups
  )
  want = fn(w.dense(), x)
  bias = c.reshape(-1)
  want += bias if layout == 'NHWC' else bias[:, None, None]
  np.testing.assert_allclose(
    jax.jit(ur.low_rank(fn))(w, x), want, rtol=1e-4, atol=1e-4
  )


def test_other_uses_are_right_and_warn_once_per_place():
  w = pair(m=D)
  fn = lambda p, x: x @ p['w'] + jnp.sum(p['w'] ** 2) + p['w'][jnp.arange(1)]
  with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter('always')
    got = jax.jit(ur.low_rank(fn))({'w': w}, X)
  np.testing.assert_allclose(got, fn({'w': w.dense()}, X), rtol=1e-5, atol=1e-4)
  words = [str(t.message) for t in told]
  assert len(words) == 2 and all("'w' is low-rank" in m for m in words)
  assert 'gather' in ''.join(words)


def _opaque(p, x):
  shape = jax.ShapeDtypeStruct((5, D), jnp.float32)
  return jax.pure_callback(
    lambda x, w: np.asarray(x) @ np.asarray(w), shape, x, p
  )


MULTIPLIED_OUT = {
  'returned': (lambda p, x: p, 'output'),
  'other_axis': (lambda p, x: jnp.einsum('bd,ed->be', x, p), None),
  'opaque': (_opaque, 'pure_callback'),
  'carried': (
    lambda p, x: lax.fori_loop(0, 2, lambda i, w: w * 2, p),
    'scan carry',
  ),
  'scanned_rows': (
    lambda p, x: lax.scan(lambda c, row: (c, row * 2), 0, p)[1],
    'scan',
  ),
  'one_row': (lambda p, x: p[1], 'slice'),
  'image': (
    lambda p, x: lax.conv_general_dilated(
      p[None],
      x[:, :, None],
      (1,),
      'SAME',
      dimension_numbers=('NWC', 'OIW', 'NWC'),
    ),
    'image of a convolution',
  ),
  'joined': (lambda p, x: jnp.concatenate([p, p]), 'concatenate'),
  'squared': (lambda p, x: p @ p, 'dot_general'),
}


@pytest.mark.parametrize('name', MULTIPLIED_OUT)
def test_multiplied_out(name):
  fn, reason = MULTIPLIED_OUT[name]
  w = pair(m=D)
  want = fn(w.dense(), X)
  if reason is None:  # a product over the kernel's outputs: the pair swaps
    np.testing.assert_allclose(
      ur.low_rank(fn)(w, X), want, rtol=1e-4, atol=1e-4
    )
    return
  with pytest.warns(UserWarning, match=reason):
    got = ur.low_rank(fn)(w, X)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_a_kernel_spread_otherwise_than_it_was_factored():
  mesh = jax.make_mesh((2,), ('d',), axis_types=(AxisType.Auto,))
  fn = jax.shard_map(
    lambda p, x: x @ p,
    mesh=mesh,
    in_specs=(P(None, 'd'), P()),
    out_specs=P(None, 'd'),
  )
  w = pair(m=D)
  with pytest.warns(UserWarning, match='shard_map'):
    got = jax.jit(ur.low_rank(fn))(w, X)
  np.testing.assert_allclose(got, X @ w.dense(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('left', [False, True])
def test_explicit_shardings_are_kept(left):
  mesh = jax.make_mesh((2,), ('d',), axis_types=(AxisType.Explicit,))
  subscripts = 'dm,bd->mb' if left else 'bd,dm->bm'
  spec = P(None, 'd') if left else P('d')

  def fn(p, x):
    operands = (p, x) if left else (x, p)
    return jnp.einsum(subscripts, *operands, out_sharding=spec)

  w, x = pair(), draw(4, D)
  with jax.set_mesh(mesh):
    put = lambda v, spec: jax.device_put(v, NamedSharding(mesh, spec))
    # The sum over d is over devices: JAX must be told where x A goes.
    factors = ur.LowRank(put(w.a, P('d')), put(w.b, P()), None, w.layout)
    got = jax.jit(ur.low_rank(fn))(factors, put(x, P(None, 'd')))
    assert got.sharding.is_equivalent_to(NamedSharding(mesh, spec), 2)
  want = x @ w.dense()
  np.testing.assert_allclose(
    got, want.T if left else want, rtol=1e-4, atol=1e-4
  )


def test_wide_accumulation_of_narrow_operands():
  w = jax.tree.map(lambda v: v.astype(jnp.bfloat16), pair())
  fn = lambda p, x: jnp.dot(
    x.astype(jnp.bfloat16), p, preferred_element_type=jnp.float32
  )
  got = ur.low_rank(fn)(w, X)
  assert got.dtype == jnp.float32
  x = np.float32(jnp.asarray(X, jnp.bfloat16))
  np.testing.assert_allclose(
    got, x @ np.float32(w.a) @ np.float32(w.b), rtol=1e-4, atol=1e-4
  )


def test_a_constant_belongs_to_one_direction():
  w = pair(m=D, constant=True)
  with pytest.warns(UserWarning, match='over other axes'):
    got = ur.low_rank(lambda p, x: x @ p.T)(w, X)
  np.testing.assert_allclose(got, X @ w.dense().T, rtol=1e-4, atol=1e-4)


def test_a_tree_without_pairs_is_the_plain_function():
  model = nn.Dense(3)
  params = model.init(jax.random.key(0), X)
  np.testing.assert_array_equal(
    ur.low_rank(model.apply)(params, X), model.apply(params, X)
  )


def test_flax_shape_checks_see_the_dense_kernel():
  model = nn.Dense(M, use_bias=False)
  w = pair()
  got = jax.jit(ur.low_rank(model.apply))({'params': {'kernel': w}}, X)
  np.testing.assert_allclose(got, X @ w.a @ w.b, rtol=1e-5, atol=1e-5)


def test_narrow_factors_run_in_the_models_dtype():
  w = jax.tree.map(lambda v: v.astype(jnp.bfloat16), pair())
  fn = lambda p, x: (x.astype(jnp.bfloat16) @ p['w']).astype(jnp.float32)
  got = ur.low_rank(fn)({'w': w}, X)
  np.testing.assert_allclose(
    got, X @ np.float32(w.a) @ np.float32(w.b), rtol=5e-2, atol=1e-1
  )


def test_merge():
  w, c = pair(), pair(constant=True)
  merged = ur.merge({'w': w, 'b': X})
  np.testing.assert_array_equal(merged['w'], w.dense())
  assert ur.count_params({'w': w, 'n': 'name'}) == R * (D + M)
  with pytest.raises(ValueError, match="'w' has a constant of shape \\(11,\\)"):
    ur.merge({'w': c})

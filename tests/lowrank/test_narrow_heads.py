"""Kernels with narrow heads: what they are, and that their zeros never run."""

import re

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import pytest

import utilized_rank as ur
from utilized_rank.lowrank.leaf import is_low_rank
from utilized_rank.walk import compat

RNG = np.random.default_rng(0)
T, D, H, E, R = 5, 6, 3, 8, 2  # no other axis has 8 or 3 * 8 entries
X = jnp.asarray(RNG.normal(size=(T, D)), jnp.float32)
# Float32 products, the same numbers in another order.
CLOSE = dict(rtol=1e-5, atol=1e-5)


def draw(*shape):
  return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def source(r=R, lead=()):
  n = len(lead)
  layout = ur.Layout.of((*lead, D, H, E), tuple(range(n)), (n,), (n + 1, n + 2))
  return ur.NarrowHeads(draw(*lead, D, H, r), None, None, layout, head=n + 2)


def sink(r=R, lead=()):
  n = len(lead)
  layout = ur.Layout.of((*lead, H, E, D), tuple(range(n)), (n, n + 1), (n + 2,))
  return ur.NarrowHeads(draw(*lead, H, r, D), None, None, layout, head=n + 1)


def tree(lead=()):
  return {n: source(lead=lead) for n in 'qkv'} | {'o': sink(lead=lead)}


def attention(p, x):
  q, k, v = (jnp.einsum('td,dhe->the', x, p[n]) for n in 'qkv')
  weights = jax.nn.softmax(jnp.einsum('qhe,khe->hqk', q, k))
  z = jnp.einsum('hqk,khe->qhe', weights, v)
  return jnp.einsum('qhe,hem->qm', z, p['o'])


def merged(p, x):
  """The same with heads as parts of longer axes, features outermost."""
  q, k, v = (
    (x @ p[n].transpose(0, 2, 1).reshape(D, E * H)).reshape(T, E, H)
    for n in 'qkv'
  )
  weights = jax.nn.softmax(jnp.einsum('qeh,keh->hqk', q, k))
  z = jnp.einsum('hqk,keh->qeh', weights, v).reshape(T, E * H)
  return z @ p['o'].transpose(1, 0, 2).reshape(E * H, D)


def kernel_first(p, x):
  """Kernels on the left of their products, heads in the middle of an axis."""
  q, k, v = (
    lax.dot_general(p[n], x, (((0,), (1,)), ((), ()))) for n in 'qkv'
  )  # (h, e, t)
  weights = jax.nn.softmax(jnp.einsum('heq,hek->hqk', q, k))
  z = jnp.einsum('hqk,hek->heq', weights, v)
  return lax.dot_general(p['o'], z, (((0, 1), (0, 1)), ((), ()))).T


def scanned(p, x):
  body = lambda x, p: (x + attention(p, x), None)
  return lax.scan(body, x, p)[0]


def indexed(p, x):
  for i in range(2):
    x = x + attention({k: w[i] for k, w in p.items()}, x)
  return x


FUNCTIONS = {
  'einsum': (attention, ()),
  'merged': (merged, ()),
  'kernel_first': (kernel_first, ()),
  'scan': (scanned, (2,)),
  'index': (indexed, (2,)),
  'remat_jit': (jax.checkpoint(jax.jit(attention)), ()),
}


def equations(jaxpr):
  jaxpr, _ = compat.open_jaxpr(jaxpr)
  for eqn in jaxpr.eqns:
    yield eqn
    for inner in compat.sub_jaxprs(eqn):
      yield from equations(inner)


def sizes(eqn):
  return [set(a.aval.shape) for a in eqn.invars]


@pytest.mark.parametrize('name', FUNCTIONS)
def test_runs_as_the_padded_kernels_do_without_multiplying_zeros(name):
  fn, lead = FUNCTIONS[name]
  params = tree(lead)
  with jax.enable_x64(True):  # what is left is the order of additions
    wide = jax.tree.map(lambda v: v.astype(np.float64), params)
    got = ur.low_rank(fn)(wide, X.astype(np.float64))
    want = fn(ur.merge(wide), X.astype(np.float64))
    np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)
  products = lambda fn, params: [
    sizes(eqn)
    for eqn in equations(jax.make_jaxpr(fn)(params, X))
    if eqn.primitive.name == 'dot_general'
  ]
  # D is an axis of kernels alone among what meets in a product; none that
  # has it has a head's full width beside it.
  wide_kernels = lambda found: [
    s for pair in found for s in pair if D in s and s & {E, H * E}
  ]
  assert not wide_kernels(products(ur.low_rank(fn), params))
  assert wide_kernels(products(fn, ur.merge(params)))  # the test can fail


def test_padded_products_are_the_function_s_own():
  """Nothing is padded but the outputs of query, key and value kernels."""
  jaxpr = jax.make_jaxpr(ur.low_rank(attention))(tree(), X)
  pads = [e for e in equations(jaxpr) if e.primitive.name == 'pad']
  assert [e.outvars[0].aval.shape for e in pads] == [(T, H, E)] * 3


def test_gradient_is_that_of_the_kept_features():
  with jax.enable_x64(True):  # what is left is the order of additions
    params = jax.tree.map(lambda v: v.astype(np.float64), tree())
    x = X.astype(np.float64)
    loss = lambda fn: lambda p: jnp.sum(jnp.sin(fn(p, x)))
    got = jax.grad(loss(ur.low_rank(attention)))(params)
    want = jax.grad(loss(attention))(ur.merge(params))
    for name, leaf in got.items():
      kept = want[name][:, :R] if name == 'o' else want[name][..., :R]
      np.testing.assert_allclose(leaf.a, kept, rtol=1e-10, atol=1e-12)


def test_leaf():
  leaf = source()
  assert is_low_rank(leaf)
  assert (leaf.rank, leaf.shape, leaf.dtype) == (R, (D, H, E), jnp.float32)
  np.testing.assert_array_equal(leaf.dense()[..., :R], leaf.a)
  assert not leaf.dense()[..., R:].any()
  assert ur.count_params({'w': leaf}) == D * H * R
  assert ur.merge({'w': sink()})['w'].shape == (H, E, D)
  (path, _), = jax.tree_util.tree_leaves_with_path({'w': leaf})  # fmt: skip
  assert jax.tree_util.keystr(path, simple=True, separator='/') == 'w/a'
  again = jax.tree.map(lambda v: v, leaf)
  assert (again.layout, again.head) == (leaf.layout, leaf.head)


def test_features_across_an_axis_of_the_leaf():
  """A head's features may be part of an axis, of plain matrices."""
  layout = ur.Layout((D, H * E), (D, H, E), (), (0,), (1, 2))
  leaf = ur.NarrowHeads(draw(D, H, R), None, None, layout, head=2)
  got = ur.low_rank(lambda w, x: x @ w)(leaf, X)
  np.testing.assert_allclose(got, X @ leaf.dense(), **CLOSE)


def test_save_and_load(tmp_path):
  params = {'block': tree(), 'scale': jnp.ones(3)}
  ur.save(tmp_path / 'tree', params)
  loaded = ur.load(tmp_path / 'tree')
  assert jax.tree.structure(loaded) == jax.tree.structure(params)
  jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_stacks_of_different_ranks():
  layers = {'block_0': {'w': sink(2)}, 'block_1': {'w': sink(3)}}
  stack = ur.stack(layers, 'blocks', 'block_{}')
  leaf = stack['blocks']['w']
  assert (leaf.rank, leaf.shape) == (3, (2, H, E, D))
  for i in range(2):
    np.testing.assert_array_equal(
      leaf.dense()[i], layers[f'block_{i}']['w'].dense()
    )
  apart = ur.unstack(stack, 'blocks', 'block_{}')
  assert apart['block_1']['w'].shape == (H, E, D)
  np.testing.assert_array_equal(
    apart['block_0']['w'].dense(), layers['block_0']['w'].dense()
  )


def test_narrow_heads_do_not_stack_with_others():
  leaf = sink()
  pair = ur.LowRank(draw(H, E, 2), draw(2, D), None, leaf.layout)
  with pytest.raises(ValueError, match='can be stacked with others'):
    ur.stack({'0': {'w': leaf}, '1': {'w': pair}}, 'w', '{}')


def check_multiplied_out(fn, leaf, x, reason):
  with pytest.warns(UserWarning, match=re.escape(reason)):
    got = ur.low_rank(fn)(leaf, x)
  np.testing.assert_allclose(got, fn(leaf.dense(), x), **CLOSE)


def test_other_products_get_the_padded_kernel():
  leaf = source()
  other = 'other axes than its heads were narrowed for'
  check_multiplied_out(
    lambda w, x: jnp.einsum('the,dhe->td', x, w), leaf, draw(T, H, E), other
  )
  check_multiplied_out(
    lambda w, x: x @ w.reshape(D, H, 2, 4)[:, 0, 0], leaf, X, 'slice'
  )
  check_multiplied_out(  # each head's features are cut in two
    lambda w, x: jnp.einsum('tk,dhke->tdhe', x, w.reshape(D, H, 2, 4)),
    leaf,
    draw(T, 2),
    other,
  )
  layout = ur.Layout(
    (3, D, 2 * E), (3, D, 2, E), groups=(2,), inputs=(0, 1), outputs=(3,)
  )
  check_multiplied_out(
    lambda w, x: convolve(x, w, feature_group_count=2),
    ur.NarrowHeads(draw(2, 3, D, R), None, None, layout, head=3),
    draw(1, T, 2 * D),
    'conv_general_dilated over heads, or in groups',
  )


def convolve(x, w, **options):
  numbers = ('NWC', 'WIO', 'NWC')
  return lax.conv_general_dilated(
    x, w, (2,), 'SAME', dimension_numbers=numbers, **options
  )


@pytest.mark.parametrize('side', ['inputs', 'outputs'])
def test_convolutions_run_with_fewer_channels(side):
  layout = ur.Layout.of((3, D, E), inputs=(0, 1), outputs=(2,))
  shape, head = ((3, R, E), 1) if side == 'inputs' else ((3, D, R), 2)
  leaf, x = (
    ur.NarrowHeads(draw(*shape), None, None, layout, head=head),
    draw(2, T, D),
  )
  got = ur.low_rank(lambda w, x: convolve(x, w))(leaf, x)
  np.testing.assert_allclose(got, convolve(x, leaf.dense()), **CLOSE)
  jaxpr = str(jax.make_jaxpr(ur.low_rank(lambda w, x: convolve(x, w)))(leaf, x))
  assert jaxpr.count('conv_general_dilated[') == 1
  assert jaxpr.count(' pad[') == (side == 'outputs')


def test_products_that_say_how_they_are_sharded_get_the_padded_kernel():
  mesh = jax.make_mesh((1,), ('data',), axis_types=(AxisType.Explicit,))
  with jax.set_mesh(mesh):
    sharding = NamedSharding(mesh, PartitionSpec(None, None, None))
    fn = lambda w, x: lax.dot_general(
      x, w, (((1,), (0,)), ((), ())), out_sharding=sharding
    )
    check_multiplied_out(fn, source(), X, 'dot_general of another kind')


def test_layers_spread_over_devices():
  mesh = jax.make_mesh((2,), ('layer',), axis_types=(AxisType.Auto,))
  spec = PartitionSpec('layer')
  fn = jax.shard_map(
    lambda p, x: attention(jax.tree.map(lambda w: w[0], p), x[0])[None],
    mesh=mesh,
    in_specs=(spec, spec),
    out_specs=spec,
  )
  params, x = tree((2,)), jnp.stack([X, 2 * X])
  np.testing.assert_allclose(
    jax.jit(ur.low_rank(fn))(params, x), fn(ur.merge(params), x), **CLOSE
  )

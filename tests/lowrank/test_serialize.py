"""Trees with low-rank leaves in `jax.export` and in `flax.serialization`."""

import subprocess
import sys

from flax import linen as nn
from flax import serialization
from flax.training import train_state
import jax
from jax import export
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import utilized_rank as ur

D, H, E = 8, 2, 4


def normal(seed, *shape):
  draw = jax.random.normal(jax.random.key(seed), shape)
  return draw / np.sqrt(np.prod(shape[:-1]))


# --- exported with a symbolic batch ---


def dense(p, x):
  return jnp.tanh(x @ p['w'] + p['b']) @ p['o']


def merged_rows(p, x):
  y = x.reshape(-1, D) @ p['w'] + p['b']
  return jnp.tanh(y.reshape(*x.shape[:2], -1)) @ p['o']


def attention(p, x):
  heads = lambda n: (x @ p[n]).reshape(*x.shape[:2], -1, E).swapaxes(1, 2)
  q, k, v = heads('q'), heads('k'), heads('v')
  z = jax.nn.softmax(q @ k.swapaxes(-1, -2)) @ v
  return z.swapaxes(1, 2).reshape(*x.shape[:2], -1) @ p['o']


def grouped(p, x):
  heads = lambda n: (x @ p[n]).reshape(*x.shape[:2], -1, E).swapaxes(1, 2)
  k, v = (jnp.repeat(heads(n), H, 1) for n in 'kv')
  z = jax.nn.softmax(heads('q') @ k.swapaxes(-1, -2)) @ v
  return z.swapaxes(1, 2).reshape(*x.shape[:2], -1) @ p['o']


def convolved(groups, strides, reshaped):
  def fn(p, x):
    y = lax.conv_general_dilated(
      x, p['k'], strides, 'SAME', feature_group_count=groups,
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )  # fmt: skip
    y = y.reshape(x.shape[0], -1) if reshaped else y.mean((1, 2))
    return jax.nn.relu(y) @ p['o']

  return fn


def scanned(p, x):
  return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p['w'])[0]


SQUARE = {'w': normal(0, D, D), 'b': normal(1, D), 'o': normal(2, D, 6)}
QKVO = {n: normal(i, D, D) for i, n in enumerate('qkvo')}
KERNEL = {'k': normal(0, 3, 3, 4, D), 'o': normal(1, D, 6)}
# Function, parameters, shape of an example. 200 tokens: from one example on it
# pays to write an identity block out; 3 tokens: it depends on how many.
CASES = {
  'rows': (dense, SQUARE, (D,)),
  'tokens': (dense, SQUARE, (3, D)),
  'many_tokens': (dense, SQUARE, (200, D)),
  'merged_rows': (merged_rows, SQUARE, (3, D)),
  'attention': (attention, QKVO, (5, D)),
  'grouped': (
    grouped, QKVO | {n: normal(7, D, E) for n in 'kv'}, (5, D),
  ),
  'convolution': (convolved(1, (1, 1), False), KERNEL, (5, 5, 4)),
  'strided': (
    convolved(1, (2, 2), True), KERNEL | {'o': normal(1, 9 * D, 6)}, (5, 5, 4),
  ),
  'groups': (
    convolved(2, (1, 1), False), KERNEL | {'k': normal(0, 3, 3, 2, D)},
    (5, 5, 4),
  ),
  'scan': (scanned, {'w': normal(0, 3, D, D)}, (D,)),
}  # fmt: skip


def symbolic(shape, batch='b'):
  dims = export.symbolic_shape(', '.join([batch, *map(str, shape)]))
  return jax.ShapeDtypeStruct(dims, jnp.float32)


@pytest.mark.parametrize('batch', ['b', '4*b'])
@pytest.mark.parametrize('name', CASES)
def test_sites_and_pairs_of_a_symbolic_batch(name, batch):
  fn, params, shape = CASES[name]
  x = jax.ShapeDtypeStruct((4, *shape), jnp.float32)
  spec = symbolic(shape, batch)
  want = ur.find_sites(fn, params, x)
  found = ur.find_sites(fn, params, spec)
  assert list(found) == list(want)
  assert [found[p].layout for p in found] == [want[p].layout for p in want]
  assert [found[p].bias for p in found] == [want[p].bias for p in want]
  assert str(found)
  pairs = ur.find_attention(fn, params, x)
  assert dict(ur.find_attention(fn, params, spec)) == dict(pairs)


def trees(fn, params, x):
  """What a network may be stored as: name to tree."""
  moments = ur.collect(fn, params, [x], progress=False)
  ranks = {p: max(2, moments[p].layout.full_rank // 2) for p in moments}
  out = {
    str(gauge): ur.factorize(
      params, moments, ranks, gauge=gauge, progress=False
    )
    for gauge in (None, 'identity')
  }
  out['written out'] = ur.write_out(out['identity'])
  pairs = ur.find_attention(fn, params, x)
  if pairs:
    ranks = ur.uniform_head_ranks(pairs, params_fraction=0.5)
    out['heads'] = ur.factorize_heads(params, moments, pairs, ranks)
  return out


@pytest.mark.parametrize('name', CASES)
def test_export_with_a_symbolic_batch(name):
  fn, params, shape = CASES[name]
  x = normal(9, 64, *shape)
  small = ur.low_rank(fn)
  for tree in trees(fn, params, x).values():
    exported = export.export(jax.jit(lambda x, t=tree: small(t, x)))(
      symbolic(shape)
    )
    for n in (1, 7, 64):
      # Float32 sums in another order, where an identity is written out.
      np.testing.assert_allclose(
        exported.call(x[:n]), small(tree, x[:n]), atol=2e-5
      )


@pytest.mark.parametrize('name', ['tokens', 'attention', 'groups', 'scan'])
def test_exported_functions_of_a_tree_are_serialized(name):
  pytest.importorskip('flatbuffers')  # of jax.export's own
  fn, params, shape = CASES[name]
  x = normal(9, 64, *shape)
  small = jax.jit(ur.low_rank(fn))
  for tree in trees(fn, params, x).values():
    data = export.export(small)(jax.eval_shape(lambda t=tree: t), x).serialize()
    again = export.deserialize(data)
    np.testing.assert_allclose(again.call(tree, x), small(tree, x), atol=1e-6)
    # What is static came back: the tree that is wanted is this very tree.
    assert again.in_tree == jax.tree.structure(((tree, x), {}))


def test_a_tree_that_a_function_gives_is_serialized():
  pytest.importorskip('flatbuffers')
  fn, params, shape = CASES['many_tokens']
  tree = trees(fn, params, normal(9, 64, *shape))['identity']
  double = jax.jit(lambda t: jax.tree.map(lambda v: 2 * v, t))
  data = export.export(double)(tree).serialize()
  twice = export.deserialize(data).call(tree)
  assert jax.tree.structure(twice) == jax.tree.structure(tree)
  np.testing.assert_array_equal(twice['w'].b, 2 * tree['w'].b)


# --- flax.serialization ---


def same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize('name', ['tokens', 'attention', 'groups', 'scan'])
def test_flax_writes_and_reads_trees(name):
  fn, params, shape = CASES[name]
  for tree in trees(fn, params, normal(9, 64, *shape)).values():
    zeros = jax.tree.map(jnp.zeros_like, tree)
    same(serialization.from_bytes(zeros, serialization.to_bytes(tree)), tree)
    state = serialization.to_state_dict(tree)
    kinds = (dict, str, int, np.ndarray, jax.Array, type(None))
    flat = jax.tree.leaves(state, is_leaf=lambda v: v is None)
    assert all(isinstance(v, kinds) for v in flat)
    same(serialization.from_state_dict(zeros, state), tree)


def test_what_decides_the_function_travels():
  """Into a tree of the same ranks, whose outputs are ordered otherwise."""
  fn, params, shape = CASES['rows']
  x = normal(9, 64, *shape)
  tree = trees(fn, params, x)['identity']
  other = trees(fn, jax.tree.map(lambda v: v[::-1], params), x)['identity']
  assert other['w'].order != tree['w'].order
  got = serialization.from_bytes(other, serialization.to_bytes(tree))
  same(got, tree)
  np.testing.assert_array_equal(
    ur.low_rank(fn)(got, x), ur.low_rank(fn)(tree, x)
  )


def test_shared_left_factors_and_constants_travel():
  params = {n: normal(i, D, D) for i, n in enumerate('qk')}
  fn = lambda p, x: jnp.tanh(x @ p['q']) + jnp.sin(x @ p['k'])
  x = normal(5, 64, D) + 1
  moments = ur.collect(fn, params, [x], progress=False)
  tree = ur.factorize(params, moments, {('q', 'k'): 2}, progress=False)
  assert {tree['q'].left, tree['k'].left} == {None, 'q'}
  assert tree['q'].c is not None
  zeros = jax.tree.map(jnp.zeros_like, tree)
  same(serialization.from_bytes(zeros, serialization.to_bytes(tree)), tree)


def test_a_training_state_is_written():
  model = nn.Dense(6)
  x = normal(3, 64, D)
  params = model.init(jax.random.key(0), x)
  fn = model.apply
  moments = ur.collect(fn, params, [x], progress=False)
  ranks = dict.fromkeys(moments, 3)
  params = ur.factorize(
    params, moments, ranks, gauge='identity', progress=False
  )
  state = train_state.TrainState.create(
    apply_fn=ur.low_rank(fn), params=params, tx=optax.adam(1e-3)
  )
  loss = lambda p: jnp.sum(state.apply_fn(p, x) ** 2)
  state = state.apply_gradients(grads=jax.grad(loss)(state.params))
  fresh = train_state.TrainState.create(
    apply_fn=state.apply_fn, params=params, tx=state.tx
  )
  got = serialization.from_bytes(fresh, serialization.to_bytes(state))
  same(got, state)


def test_another_leaf_is_refused():
  fn, params, shape = CASES['attention']
  found = trees(fn, params, normal(9, 64, *shape))
  state = serialization.to_state_dict(found['None'])
  with pytest.raises(ValueError, match='NarrowHeads leaf cannot be restored'):
    serialization.from_state_dict(found['heads'], state)
  rows = trees(*CASES['rows'][:2], normal(9, 64, D))['None']
  state = serialization.to_state_dict(rows)
  with pytest.raises(ValueError, match=r'\(8, 8\) cannot be restored from one'):
    serialization.from_state_dict(
      {**rows, 'w': rows['o'], 'o': rows['w']}, state
    )


PROGRAM = """
import sys
{first}
import jax.numpy as jnp, numpy as np
layout = ur.Layout.of((4, 3), inputs=(0,), outputs=(1,))
leaf = ur.LowRank(jnp.ones((4, 1)), jnp.ones((1, 3)), None, layout)
{then}
data = serialization.to_bytes({{'w': leaf}})
got = serialization.from_bytes({{'w': leaf}}, data)['w']
assert got.layout == layout and np.all(got.b == leaf.b), got
"""
FLAX, OURS = 'from flax import serialization', 'import utilized_rank as ur'


@pytest.mark.parametrize(
  ('first', 'then'),
  [
    (f'{FLAX}\n{OURS}', ''),
    (f'{OURS}\nassert "flax" not in sys.modules', FLAX),
    (f'{OURS}\nimport flax.linen\n{FLAX}', ''),
  ],
)
def test_flax_may_be_imported_before_or_after(first, then):
  program = PROGRAM.format(first=first, then=then)
  subprocess.run([sys.executable, '-c', program], check=True, timeout=300)


ELSEWHERE = """
import sys
sys.modules['utilized_rank'] = None  # whoever imports it fails
import numpy as np
from jax import export

folder = sys.argv[1]
with open(f'{folder}/program', 'rb') as file:
  program = export.deserialize(bytearray(file.read()))
x = np.load(f'{folder}/x.npy')
for n in (1, 7, 64):
  np.save(f'{folder}/{n}.npy', program.call(x[:n]))
"""


def test_a_program_runs_where_this_library_is_not(tmp_path):
  pytest.importorskip('flatbuffers')
  fn, params, shape = CASES['tokens']
  x = np.asarray(normal(9, 64, *shape))
  tree = trees(fn, params, x)['identity']
  small = ur.low_rank(fn)
  program = export.export(jax.jit(lambda x: small(tree, x)))(symbolic(shape))
  (tmp_path / 'program').write_bytes(program.serialize())
  np.save(tmp_path / 'x.npy', x)
  subprocess.run([sys.executable, '-c', ELSEWHERE, tmp_path], check=True)
  for n in (1, 7, 64):
    # The same products in float32, compiled for another number of rows.
    np.testing.assert_allclose(
      np.load(tmp_path / f'{n}.npy'), small(tree, x[:n]), atol=1e-6
    )


def test_a_leaf_in_a_variable_is_told_where_to_go():
  layout = ur.Layout.of((4, 3), inputs=(0,), outputs=(1,))
  box = jax.tree.structure([0])
  leaf = ur.LowRank(jnp.ones((4, 1)), jnp.ones((1, 3)), None, layout, box=box)
  exported = jax.export.export(jax.jit(lambda w: w))(leaf)
  with pytest.raises(
    ValueError, match='give the exported function nnx.to_pure'
  ):
    exported.serialize()

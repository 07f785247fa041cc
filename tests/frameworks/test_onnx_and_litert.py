"""docs/onnx_and_litert.md: compressed networks in two other runtimes."""

import collections
import functools
import importlib.util
import math
import re
import subprocess
import sys

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest
import scripts

import utilized_rank as ur

# Theirs: names that Python, JAX and numpy will take away one day.
pytestmark = pytest.mark.filterwarnings('ignore::DeprecationWarning')
PAGE = scripts.PAGE.with_name('onnx_and_litert.md')
# What a runtime needs, and what no other extra of tests brings.
NEEDS = {
  'onnx': ('jax2onnx', 'onnxruntime'),
  'litert': ('litert_converter', 'ai_edge_litert'),
}
BATCHES = (1, 7, 64)
D, TOKENS = 16, 5


def skip_without(runtime):
  for name in NEEDS[runtime]:
    if importlib.util.find_spec(name) is None:
      pytest.skip(f'{name} is not installed')


def normal(seed, *shape):
  draw = jax.random.normal(jax.random.key(seed), shape)
  return draw / math.sqrt(math.prod(shape[:-1]))


# --- networks, each with a kernel of every kind that it can have ---


def mlp(p, x):
  return jnp.tanh(x @ p['up'] + p['bias']) @ p['down']


def convolutional(p, x):
  dims = ('NHWC', 'HWIO', 'NHWC')
  x = lax.conv_general_dilated(x, p['k1'], (1, 1), 'SAME', None, None, dims)
  x = lax.conv_general_dilated(
    jax.nn.relu(x), p['k2'], (2, 2), 'SAME', None, None, dims
  )
  return jax.nn.relu(x).mean((1, 2)) @ p['head']


def rescale(x):
  x = x - x.mean(-1, keepdims=True)
  return x * lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6)


def transformer(p, x):
  y = rescale(x)
  heads = lambda n: (y @ p[n]).reshape(*x.shape[:2], 2, -1).swapaxes(1, 2)
  q, k, v = heads('q'), heads('k'), heads('v')
  z = jax.nn.softmax(q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1])) @ v
  x = x + z.swapaxes(1, 2).reshape(*x.shape[:2], -1) @ p['o']
  x = x + jax.nn.gelu(rescale(x) @ p['up'] + p['bias']) @ p['down']
  return rescale(x).mean(1) @ p['head']


UP_DOWN = {
  'up': normal(0, D, 2 * D), 'bias': normal(1, 2 * D),
  'down': normal(2, 2 * D, D),
}  # fmt: skip
# Function, parameters, shape of an example.
NETWORKS = {
  'mlp': (mlp, UP_DOWN, (D,)),
  'convolutional': (
    convolutional,
    {
      'k1': normal(0, 3, 3, 4, D), 'k2': normal(1, 3, 3, D, D),
      'head': normal(2, D, 6),
    },
    (6, 6, 4),
  ),
  'transformer': (
    transformer,
    {n: normal(3 + i, D, D) for i, n in enumerate('qkvo')}
    | UP_DOWN | {'head': normal(7, D, 6)},
    (TOKENS, D),
  ),
}  # fmt: skip
# What a network is stored as, and where it can be.
KINDS = [
  *((name, kind) for name in NETWORKS for kind in ('pairs', 'identity')),
  ('mlp', 'narrowed'),
  ('transformer', 'narrowed'),
  ('transformer', 'heads'),
]


@functools.cache
def stored(name, kind):
  """(function, its tree, 64 examples)."""
  fn, params, shape = NETWORKS[name]
  x = np.asarray(normal(9, 64, *shape))
  moments = ur.collect(fn, params, [x], progress=False)
  if kind == 'narrowed':
    hidden = ur.find_hidden(fn, params, x)
    tree = ur.narrow_hidden(params, moments, hidden, {'up': D})
    return fn, tree, x
  if kind == 'heads':
    pairs = ur.find_attention(fn, params, x)
    ranks = ur.uniform_head_ranks(pairs, params_fraction=0.5)
    tree = ur.factorize_heads(params, moments, pairs, ranks)
    return fn, tree, x
  ranks = {p: moments[p].layout.full_rank // 4 for p in moments}
  gauge = {'pairs': None, 'identity': 'identity'}[kind]
  tree = ur.factorize(params, moments, ranks, gauge=gauge, progress=False)
  return fn, tree, x


def assert_holds(sizes, tree):
  """Arrays of a file are the leaves of the tree: no pair is multiplied out."""
  sizes = collections.Counter(sizes)
  leaves = collections.Counter(v.size for v in jax.tree.leaves(tree))
  assert leaves <= sizes
  # Beside them: scales, bounds, and shapes of what is made.
  assert sum((sizes - leaves).elements()) <= 128


def assert_near(run, name, kind):
  """Outputs of every number of rows against `low_rank(fn)`."""
  fn, tree, x = stored(name, kind)
  for n in BATCHES:
    want = np.asarray(ur.low_rank(fn)(tree, x[:n]))
    # The same float32 products, summed in another order: some units in the last
    # place (1.2e-7) of the largest terms, which the largest outputs are like.
    bound = 1e-6 * np.abs(want).max()
    np.testing.assert_allclose(run(x[:n]), want, rtol=1e-6, atol=bound)


# --- ONNX ---


def onnx_of(fn, shape, *more):
  import jax2onnx

  return jax2onnx.to_onnx(
    fn, [('B', *shape), *more], input_names=['x'], output_names=['y']
  )


@pytest.mark.parametrize(('name', 'kind'), KINDS)
def test_onnx_runtime_gives_the_outputs(name, kind):
  skip_without('onnx')
  import onnx
  import onnxruntime

  fn, tree, x = stored(name, kind)
  model = onnx_of(lambda x: ur.low_rank(fn)(tree, x), x.shape[1:])
  assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == 'B'
  assert_holds(
    [
      math.prod(v.dims)
      for v in model.graph.initializer
      if v.data_type == onnx.TensorProto.FLOAT
    ],
    tree,
  )
  session = onnxruntime.InferenceSession(model.SerializeToString())
  assert_near(lambda x: session.run(['y'], {'x': x})[0], name, kind)


def test_what_onnx_cannot_take_is_said():
  skip_without('onnx')
  fn, tree, x = stored('mlp', 'pairs')
  with pytest.raises(TypeError, match='called without low_rank'):
    onnx_of(lambda x: fn(tree, x), x.shape[1:])
  with pytest.raises(TypeError, match=r"Invalid 'inputs' entry.*dict"):
    onnx_of(lambda x, tree: ur.low_rank(fn)(tree, x), x.shape[1:], tree)


# --- LiteRT ---


@functools.cache
def page_names():
  names: dict = {'__name__': 'page'}
  exec(script('with_litert.py'), names)
  return names


@pytest.mark.parametrize(('name', 'kind'), KINDS)
def test_litert_gives_the_outputs(name, kind):
  skip_without('litert')
  from ai_edge_litert.interpreter import Interpreter
  from litert_converter import schema_py_generated

  fn, tree, x = stored(name, kind)
  plain = ur.write_out(tree)
  shape = ', '.join(map(str, ('b', *x.shape[1:])))
  data = page_names()['to_litert'](lambda x: ur.low_rank(fn)(plain, x), shape)
  model = schema_py_generated.Model.GetRootAs(data, 0)
  buffers = (model.Buffers(i) for i in range(model.BuffersLength()))
  assert_holds([b.DataLength() // 4 for b in buffers], plain)
  run = Interpreter(model_content=data).get_signature_runner()
  assert_near(lambda x: run(x=x)['y'], name, kind)


def test_litert_gathers_along_no_last_axis():
  """As docs says; once this fails, `write_out` is not needed before."""
  skip_without('litert')
  fn, tree, _ = stored('mlp', 'identity')
  with pytest.raises(ValueError, match='Failed to export flatbuffer'):
    page_names()['to_litert'](lambda x: ur.low_rank(fn)(tree, x), f'b, {D}')


def test_litert_takes_a_scan_that_is_unrolled():
  skip_without('litert')
  from ai_edge_litert.interpreter import Interpreter

  def fn(p, x, unroll=True):
    step = lambda x, w: (jnp.tanh(x @ w), None)
    return lax.scan(step, x, p['w'], unroll=unroll)[0]

  to_litert = page_names()['to_litert']
  params, x = {'w': normal(0, 3, D, D)}, np.asarray(normal(1, 64, D))
  for rows in ('b', 7):
    with pytest.raises(ValueError, match='Failed to export flatbuffer'):
      to_litert(lambda x: fn(params, x, unroll=1), f'{rows}, {D}')
  moments = ur.collect(fn, params, [x], progress=False)
  tree = ur.factorize(params, moments, {'w': 3}, progress=False)
  small = ur.low_rank(fn)
  data = to_litert(lambda x: small(tree, x), f'b, {D}')
  run = Interpreter(model_content=data).get_signature_runner()
  for n in BATCHES:
    want = small(tree, x[:n])
    bound = 1e-6 * np.abs(want).max()
    np.testing.assert_allclose(run(x=x[:n])['y'], want, rtol=1e-6, atol=bound)


# --- the page ---


def script(name):
  found = re.search(
    rf'^```python\n(# {name}\n.*?)^```$', PAGE.read_text('utf-8'), re.M | re.S
  )
  assert found is not None, name
  return found[1]


@pytest.mark.parametrize('runtime', NEEDS)
def test_the_scripts_run(runtime, tmp_path):
  skip_without(runtime)
  with_, serve = f'with_{runtime}.py', f'serve_{runtime}.py'
  (tmp_path / with_).write_text(script(with_))
  alone = "sys.modules['utilized_rank'] = sys.modules['jax'] = None\n"
  (tmp_path / serve).write_text(f'import sys\n{alone}{script(serve)}')
  for name in (with_, serve):
    subprocess.run(
      [sys.executable, '-W', 'ignore', name],
      cwd=tmp_path, check=True, timeout=600,
    )  # fmt: skip

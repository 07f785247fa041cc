"""What is said of leaves that are no kernels, and of functions to unwrap."""

import functools

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

import utilized_rank as ur

RNG = np.random.default_rng(0)


def normal(*shape):
  return RNG.normal(size=shape).astype(np.float32)


X, W, B = normal(6, 4), normal(4, 4), normal(4)


def test_a_bias_and_its_kernel_have_whole_paths():
  fn = lambda p, x: (
    jnp.tanh(x @ p['one']['kernel']['value'] + p['one']['bias']['value'])
    @ p['two']['kernel']['value']
    + p['two']['bias']['value']
  )
  layer = lambda: {'kernel': {'value': normal(4, 4)}, 'bias': {'value': B + 0}}
  sites = ur.find_sites(fn, {'one': layer(), 'two': layer()}, X)
  for name in 'one', 'two':
    kernel, bias = f'{name}/kernel/value', f'{name}/bias/value'
    assert sites.unseen[bias] == f'bias of {kernel}'
    (line,) = [v for v in str(sites).splitlines() if v.startswith(kernel)]
    assert line.endswith(f'dot; bias {bias}')


def test_the_paths_of_an_nnx_module():
  nnx = pytest.importorskip('flax.nnx')
  model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
  sites = ur.find_sites(lambda model, x: model(x), model, X)
  (kernel,) = sites
  assert kernel.startswith('kernel')
  assert f'bias of {kernel}' in sites.unseen.values()


@pytest.mark.parametrize(
  'fn, said',
  [
    (lambda p, x: x @ p['w'] + x @ p['v'], 'not used by the outputs'),
    (
      lambda p, x: (x @ p['w'] + p['b']) @ p['v'] + p['b'],
      'added to products of w and v',
    ),
    (
      lambda p, x: jnp.tanh(x @ p['w'] + p['b']) + x[:, ::-1] @ p['w'] @ p['v'],
      'added to products of w',
    ),
    (lambda p, x: x @ p['w'] @ p['v'] + p['b'], 'bias of v'),
    (lambda p, x: x @ p['w'] @ p['v'] + jnp.sin(p['b']), 'used by sin'),
  ],
)
def test_added_or_not_used(fn, said):
  params = {'w': normal(4, 4), 'v': normal(4, 4), 'b': B}
  assert ur.find_sites(fn, params, X).unseen['b'] == said


# --- integer kernels ---


def quantized(p, x):
  ints = jnp.round(x * 8).astype(jnp.int8)
  if 'stack' in p:
    step = lambda h, w: (lax.dot(ints, w).astype(jnp.float32) + h, None)
    return lax.scan(step, x, p['stack'])[0] @ p['w']
  return lax.dot(ints, p['q']).astype(jnp.float32) / 64 @ p['w']


@pytest.mark.parametrize(
  'params',
  [
    {'q': np.ones((4, 4), np.int8), 'w': W},
    {'q': np.ones((4, 4), np.int8), 'w': W, 'also': np.ones(3, np.int32)},
    {'stack': np.ones((3, 4, 4), np.int8), 'w': W},
  ],
)
def test_an_integer_kernel_is_listed(params):
  sites = ur.find_sites(quantized, params, X)
  (name,) = {'q', 'stack'} & set(params)
  assert list(sites) == ['w']
  assert sites.unseen[name] == 'used by dot_general as int8'
  assert f'{name} (dot_general as int8)' in str(sites.coverage)
  moments = ur.capture(quantized)(params, X)[1]
  # What the float kernel reads is what the plain function gives it.
  at = params | {'w': np.eye(4, dtype=np.float32)}
  rows = np.asarray(quantized(at, X), np.float64)
  np.testing.assert_allclose(
    moments['w'].second, rows.T @ rows / len(rows), rtol=1e-5, atol=1e-6
  )
  with pytest.raises(TypeError, match=f"'{name}' is int8 .* real floating"):
    ur.find_sites(quantized, params, X, select=[('.*', True)])


def test_integers_in_an_einsum_and_mixed_with_floats():
  fn = lambda p, x: jnp.einsum('bd,dhk->bhk', x, p['q']).sum(1) @ p['w']
  params = {'q': np.ones((4, 2, 4), np.int8), 'w': W}
  sites = ur.find_sites(fn, params, X)
  # Cast to float on its way, it is still an integer leaf.
  assert list(sites) == ['w'] and 'as int8' in sites.unseen['q']


def test_nothing_but_integers_is_an_error():
  with pytest.raises(TypeError, match="'q' is int8 .* real floating"):
    ur.find_sites(
      lambda p, x: x @ p['q'], {'q': np.ones((4, 4), np.int8)}, np.int8(X)
    )


# --- leaves that are no arrays ---


class Variable:
  """A mutable box that is no pytree, as penzai's Parameter is."""

  def __init__(self, value):
    self.value = value


class Parameter(Variable):
  """The same of that name."""


Parameter.__module__ = 'penzai.core.variables'


class Tensor:
  """An array of another framework."""

  shape, dtype = (4, 4), 'float32'


@pytest.mark.parametrize(
  'leaf, said',
  [
    (0.1, 'no array: a float, which stays as it is'),
    (True, 'no array: a bool, which stays as it is'),
    ('gelu', 'no array: a str, which stays as it is'),
    (jnp.tanh, 'which stays as it is'),
    (Variable({'a': W}), 'HIDDEN: a Variable of test_reasons that JAX cannot'),
    (Parameter(W), 'params = pz.unbind_params(model, freeze=True)'),
    (Tensor(), 'HIDDEN: a Tensor of test_reasons: make an array of it'),
  ],
)
def test_other_leaves_are_listed(leaf, said):
  params = {'w': W, 'layers': [{'other': leaf}]}
  sites = ur.find_sites(lambda p, x: x @ p['w'], params, X)
  assert said in sites.others['layers/0/other']
  (line,) = [v for v in str(sites).splitlines() if v.startswith('layers/0/')]
  assert said in line
  with pytest.raises(KeyError, match='layers/0/other.*is not a site'):
    sites['layers/0/other']


def test_a_model_of_hidden_arrays_says_how_to_unbind():
  params = {'scale': np.float32(2), 'kernel': Parameter(W)}
  fn = lambda p, x: p['scale'] * (x @ p['kernel'].value)
  with pytest.raises(
    ValueError, match='no kernel(.|\n)*kernel .*unbind_params'
  ):
    ur.collect(fn, params, [X], progress=False)


# --- pmap ---


@pytest.mark.parametrize(
  'options, name',
  [
    ({'axis_name': 'devices'}, 'devices'),
    ({}, 'axis'),
    ({'axis_name': 'd', 'in_axes': (None, 0)}, 'd'),
  ],
)
@pytest.mark.parametrize('outer', [lambda fn: fn, jax.jit])
def test_a_pmapped_function_is_told_of_pmap_axis(options, name, outer):
  n = jax.local_device_count()
  fn = outer(jax.pmap(lambda p, x: jnp.tanh(x @ p['w']), **options))
  w = W if options.get('in_axes') else np.stack([W] * n)
  with pytest.raises(ur.UnsupportedError) as error:
    ur.find_sites(fn, {'w': w}, np.stack([X] * n))
  assert f"pmap_axis='{name}'" in str(error.value)
  assert 'check_vma' not in str(error.value)


def test_what_the_error_asks_for_works():
  n = jax.local_device_count()
  mapped = lambda p, x: lax.pmean(x @ p['w'], 'd')
  moments = ur.collect(
    mapped,
    {'w': np.stack([W] * n)},
    [np.stack([X + i for i in range(n)])],
    pmap_axis='d',
    progress=False,
  )
  rows = np.concatenate([X + i for i in range(n)]).astype(np.float64)
  np.testing.assert_allclose(
    moments['w'].second, rows.T @ rows / len(rows), rtol=1e-5
  )


@pytest.mark.parametrize('first', [lambda a: a, lambda a: a[:1]])
def test_a_shard_map_is_told_of_check_vma(first):
  mesh = jax.make_mesh((2,), ('d',), axis_types=(AxisType.Auto,))
  wrap = functools.partial(
    jax.shard_map,
    mesh=mesh,
    in_specs=(P(), P('d')),
    out_specs=P('d'),
    check_vma=False,
  )
  fn = wrap(lambda p, x: first(x) @ p['w'])
  with pytest.raises(ur.UnsupportedError, match="'w'.*check_vma=False"):
    # One row for each device, as in a pmap, and it stays an axis.
    ur.find_sites(fn, {'w': W}, X[:2])


def test_an_integer_kernel_beside_gradients():
  params = {'q': np.ones((4, 4), np.int8), 'w': W}
  fn = lambda p, x: jnp.tanh(x) @ p['q'] @ p['w']
  moments = ur.collect(
    fn, params, [X], loss=ur.sampled_cross_entropy(), progress=False
  )
  assert list(moments) == ['w'] and moments['w'].grad is not None
  tree = ur.factorize(params, moments, {'w': 2}, progress=False)
  assert tree['q'].dtype == np.int8
  assert ur.low_rank(fn)(tree, X).shape == (6, 4)

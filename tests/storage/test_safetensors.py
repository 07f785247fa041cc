"""Factors in safetensors, read by numpy and json alone."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import utilized_rank as ur

X = np.random.default_rng(0).normal(size=(64, 2, 4)).astype(np.float32)

# What docs/guide.md shows, in a process that has numpy and safetensors.
READER = """
import json, sys
import numpy as np
from safetensors.numpy import load_file

folder = sys.argv[1]
tensors = load_file(f'{folder}/model.safetensors')
kernels = json.load(open(f'{folder}/config.json'))['kernels']

def apply(name, x):  # x: (rows, *inputs)
  a, b = tensors[f'{name}.a'], tensors[f'{name}.b']
  count = len(kernels[name]['inputs'])
  y = np.tensordot(np.tensordot(x, a, count), b, 1)
  return y + tensors.get(f'{name}.c', 0)

x = np.load(f'{folder}/x.npy')
y = np.tanh(apply('layers.0.w', x) + tensors['layers.0.b'])
np.save(f'{folder}/y.npy', apply('layers.1.w', y))
assert not {'jax', 'utilized_rank'} & set(sys.modules)
"""


def fn(p, x):
  one, two = p['layers']
  y = jnp.tanh(jnp.einsum('bij,ijk->bk', x, one['w']) + one['b'])
  return y @ two['w'].T


def params():
  draw = lambda i, *s: jax.random.normal(jax.random.key(i), s)
  return {
    'layers': [
      {'w': draw(0, 2, 4, 6), 'b': draw(1, 6)},
      {'w': draw(2, 5, 6)},  # stored as (outputs, inputs)
    ]
  }


@pytest.fixture
def compressed():
  tree = params()
  moments = ur.collect(fn, tree, [X], progress=False)
  ranks = {'layers/0/w': 2, 'layers/1/w': 3}
  small = ur.factorize(tree, moments, ranks, gauge='identity', progress=False)
  return small, ur.Recipe.of(small, moments, ranks)


@pytest.mark.quick
def test_numpy_alone_gives_the_outputs(compressed, tmp_path):
  small, recipe = compressed
  out = tmp_path / 'out'
  ur.save_safetensors(out, small, recipe=recipe)
  np.save(out / 'x.npy', X)
  subprocess.run([sys.executable, '-c', READER, out], check=True)
  # Two products in another order.
  np.testing.assert_allclose(
    np.load(out / 'y.npy'), ur.low_rank(fn)(small, X), atol=1e-5
  )


def test_the_recipe_travels_in_the_metadata(compressed, tmp_path):
  from safetensors import safe_open

  small, recipe = compressed
  ur.save_safetensors(tmp_path / 'out', small, recipe=recipe)
  with safe_open(tmp_path / 'out' / 'model.safetensors', 'np') as file:
    about = json.loads(file.metadata()['utilized_rank'])
  assert about == json.loads((tmp_path / 'out' / 'config.json').read_text())
  again = tmp_path / 'recipe.json'
  again.write_text(json.dumps(about['recipe']))
  assert ur.Recipe.load(again) == recipe
  assert about['kernels']['layers.1.w']['inputs'] == [1]


def test_strided_arrays_and_bfloat16_come_back_as_they_were(tmp_path):
  from safetensors.numpy import load
  from safetensors.numpy import load_file
  from safetensors.numpy import save

  strided = np.arange(6, dtype=np.float32).reshape(2, 3).T
  # Why they are copied first; when it writes what is there, they need not be.
  assert not np.array_equal(load(save({'a': strided}))['a'], strided)
  tree = {
    'a': strided,
    'b': jnp.arange(3, dtype=jnp.bfloat16),
    'c': np.float64(2.5),
    'd': np.broadcast_to(np.int32(7), (2, 2)),
  }
  ur.save_safetensors(tmp_path / 'out', tree)
  found = load_file(tmp_path / 'out' / 'model.safetensors')
  for name, value in tree.items():
    np.testing.assert_array_equal(found[name], np.asarray(value))
  assert found['b'].dtype == ml_dtypes.bfloat16
  assert found['c'].shape == ()


def test_what_cannot_be_written_leaves_nothing(tmp_path):
  with pytest.raises(TypeError, match="'f' is a function: safetensors holds"):
    ur.save_safetensors(tmp_path / 'out', {'f': fn})
  with pytest.raises(ValueError, match="two leaves have the name 'a.b'"):
    ur.save_safetensors(
      tmp_path / 'out', {'a': {'b': np.ones(1)}, 'a.b': np.ones(1)}
    )
  assert not (tmp_path / 'out').exists()
  ur.save_safetensors(tmp_path / 'out', {'a': np.ones(1)})
  with pytest.raises(FileExistsError, match='pass overwrite=True'):
    ur.save_safetensors(tmp_path / 'out', {'a': np.ones(1)})
  ur.save_safetensors(tmp_path / 'out', {'a': np.zeros(1)}, overwrite=True)

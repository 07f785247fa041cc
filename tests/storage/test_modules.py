"""NNX and Equinox modules written with `ur.save`, and read into others."""

import equinox as eqx
from flax import nnx
import jax
import numpy as np
import pytest

import utilized_rank as ur

X = np.random.default_rng(0).normal(size=(96, 12)).astype(np.float32)


class Module(nnx.Module):
  def __init__(self, rngs):
    self.up = nnx.Linear(12, 16, rngs=rngs)
    self.drop = nnx.Dropout(0.1, deterministic=True, rngs=rngs)
    self.norm = nnx.BatchNorm(16, use_running_average=True, rngs=rngs)
    self.down = nnx.Linear(16, 8, use_bias=False, rngs=rngs)

  def __call__(self, x):
    return self.down(nnx.gelu(self.drop(self.norm(self.up(x)))))


def mlp(seed):
  return eqx.nn.MLP(12, 8, 16, 1, key=jax.random.key(seed))


MAKE = {'nnx': lambda seed: Module(nnx.Rngs(seed)), 'equinox': mlp}
RUN = {
  'nnx': lambda module, x: module(x),
  'equinox': lambda module, x: jax.vmap(module)(x),
}


@pytest.fixture(scope='module', params=MAKE)
def network(request):
  run, module = RUN[request.param], MAKE[request.param](0)
  moments = ur.collect(run, module, [X], progress=False)
  small = ur.factorize(
    module, moments, dict.fromkeys(moments, 3), gauge='identity', progress=False
  )
  return MAKE[request.param], ur.low_rank(run), module, small


def test_a_module_comes_back_into_one_of_other_numbers(network, tmp_path):
  make, run, module, small = network
  for name, saved in (('dense', module), ('small', small)):
    ur.save(tmp_path / name, saved)
    again = ur.load(tmp_path / name, like=make(1))
    assert type(again) is type(module)
    assert jax.tree.structure(again) == jax.tree.structure(saved)
    np.testing.assert_array_equal(run(again, X), run(saved, X))


@pytest.mark.parametrize('kind', MAKE)
def test_narrower_layers_come_back_by_their_recipe(kind, tmp_path):
  run, module = RUN[kind], MAKE[kind](0)
  hidden = ur.find_hidden(run, module, X)
  moments = ur.collect(run, module, [X], progress=False)
  (layer,) = hidden
  small = ur.narrow_hidden(module, moments, hidden, {layer: 9})
  ur.save(tmp_path / 'small', small)
  with pytest.raises(ValueError, match=r'recipe\.abstract'):
    ur.load(tmp_path / 'small', like=MAKE[kind](1))
  recipe = ur.Recipe.of(small, moments, {}, params=module)
  again = ur.load(tmp_path / 'small', like=recipe.abstract(MAKE[kind](1)))
  assert jax.tree.structure(again) == jax.tree.structure(small)
  np.testing.assert_array_equal(
    ur.low_rank(run)(again, X), ur.low_rank(run)(small, X)
  )


def test_without_it_a_module_is_dictionaries(network, tmp_path):
  _, _, module, _ = network
  ur.save(tmp_path / 'dense', {'step': 3, 'module': module})
  found = ur.load(tmp_path / 'dense')
  assert found['step'] == 3
  arrays = [v for v in jax.tree.leaves(found['module']) if np.ndim(v) == 2]
  assert sorted(v.shape for v in arrays) in (
    [(12, 16), (16, 8)],
    [(8, 16), (16, 12)],
  )


def test_a_state_of_nnx(tmp_path):
  module = Module(nnx.Rngs(0))
  graph, params, rest = nnx.split(module, nnx.Param, ...)
  ur.save(tmp_path / 'state', params)
  other = nnx.split(Module(nnx.Rngs(1)), nnx.Param, ...)[1]
  again = ur.load(tmp_path / 'state', like=other)
  assert type(again) is type(params)
  np.testing.assert_array_equal(nnx.merge(graph, again, rest)(X), module(X))


def test_another_module_is_refused(tmp_path):
  ur.save(tmp_path / 'x', mlp(0))
  wide = eqx.nn.MLP(12, 8, 20, 1, key=jax.random.key(0))
  with pytest.raises(
    ValueError, match=r'is of shape \(16.* and \(20.* in like'
  ):
    ur.load(tmp_path / 'x', like=wide)
  deep = eqx.nn.MLP(12, 8, 16, 2, key=jax.random.key(0))
  with pytest.raises(ValueError, match="'layers/2/.*' is in like= alone"):
    ur.load(tmp_path / 'x', like=deep)
  flat = eqx.nn.MLP(12, 8, 16, 0, key=jax.random.key(0))
  with pytest.raises(ValueError, match="'layers/1/bias' is in the checkpoint"):
    ur.load(tmp_path / 'x', like=flat)

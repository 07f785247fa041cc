"""Models of frameworks that the extra `frameworks` installs; see `frameworks/`.

Each that is not installed is skipped.
"""

import functools
import importlib.util

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frameworks import running
import utilized_rank as ur

# Name: (what must be installed, file, function).
MODELS = {
  'keras cnn': ('keras', 'keras_models', 'cnn'),
  'keras recurrent': ('keras', 'keras_models', 'recurrent'),
  'keras transformer': ('keras', 'keras_models', 'transformer'),
  'keras-hub bert': ('keras keras_hub', 'keras_models', 'bert'),
  'keras-hub llama': ('keras keras_hub', 'keras_models', 'llama'),
  'haliax': ('haliax', 'haliax_models', 'transformer'),
  'penzai': ('penzai', 'penzai_models', 'llamalike'),
  'gemma': ('gemma', 'gemma_models', 'transformer'),
  'qwix lora': ('qwix', 'nnx_zoo_models', 'qwix_lora'),
  'equimo vit': ('equimo', 'equinox_zoo_models', 'equimo_vit'),
  'eqx-zoo qwen': ('eqx_zoo', 'equinox_zoo_models', 'zoo_qwen'),
  'eqx-zoo bert': ('eqx_zoo', 'equinox_zoo_models', 'zoo_bert'),
  'flowjax': ('flowjax', 'equinox_zoo_models', 'flowjax_coupling'),
  'jraph': ('jraph', 'graph_models', 'jraph_network'),
  'e3nn-jax': ('e3nn_jax', 'graph_models', 'e3nn_network'),
}
# One of every framework: a search takes longer than all other tests of a model.
COMPRESSED = sorted(
  set(MODELS)
  - {'keras recurrent', 'keras transformer', 'keras-hub llama', 'eqx-zoo bert'}
)
every_model = pytest.mark.parametrize('name', MODELS)
# Theirs: names that Python, JAX and Equinox will take away one day.
pytestmark = [
  pytest.mark.filterwarnings('ignore::DeprecationWarning'),
  pytest.mark.filterwarnings('ignore::FutureWarning'),
  pytest.mark.filterwarnings('ignore:.*static_field:UserWarning'),
  # Ours, of words that are both looked up and multiplied with.
  pytest.mark.filterwarnings('ignore:.*meets .a lookup:UserWarning'),
]


def installed(packages):
  """Skips the test where one of the packages is not there."""
  for package in packages.split():
    if importlib.util.find_spec(package) is None:
      pytest.skip(f'{package} is not installed')


@functools.cache
def case(name):
  package, file, function = MODELS[name]
  installed(package)
  return getattr(importlib.import_module(f'frameworks.{file}'), function)()


@functools.cache
def captured(name):
  model = case(name)
  run = running.jitted(ur.capture(model.fn), model.params)
  outputs, moments = run(model.params, model.batch)
  return outputs, jax.device_get(moments)


@functools.cache
def stock(name):
  return running.jitted(case(name).fn, case(name).params)


@functools.cache
def half(name):
  """The model at half of the full ranks, and what it computes."""
  model = case(name)
  small = running.factorized(model, captured(name)[1], 0.5)
  run = running.jitted(ur.low_rank(model.fn), small)
  return small, run, run(small, model.batch)


@every_model
def test_every_matrix_is_a_kernel_or_explained(name):
  model = case(name)
  sites = running.assert_kernels(model)
  wide = {path for path, shape in sites.shapes.items() if len(shape) > 1}
  biases = {k for k, why in sites.unseen.items() if why.startswith('bias of')}
  assert wide - biases == set(model.kernels) | set(model.unseen)


@every_model
def test_moments_are_those_of_the_frameworks_own_inputs(name):
  inputs = case(name).inputs()
  _, moments = captured(name)
  assert set(moments) == set(inputs)
  running.assert_moments(moments, inputs)


@every_model
def test_capture_and_full_rank_compute_the_same_function(name):
  model = case(name)
  outputs, moments = captured(name)
  want = stock(name)(model.params, model.batch)
  running.assert_same(outputs, want)
  full = running.factorized(model, moments, 1.0, compensate_mean=True)
  got = running.jitted(ur.low_rank(model.fn), full)(full, model.batch)
  running.assert_same(got, want)


@every_model
def test_half_of_the_ranks_merge_into_the_stock_model(name):
  model, (small, _, got) = case(name), half(name)
  merged = ur.merge(small)
  assert jax.tree.structure(merged) == jax.tree.structure(model.params)
  running.assert_same(got, stock(name)(merged, model.batch))
  dense = jax.tree.leaves(captured(name)[0])
  assert any(
    np.abs(a - b).max() > 1e-3
    for a, b in zip(dense, jax.tree.leaves(got), strict=True)
  )


@every_model
def test_is_saved_and_loaded(name, tmp_path):
  """As the list of its leaves: functions and modules are code."""
  model, (small, run, want) = case(name), half(name)
  leaves, treedef = jax.tree.flatten(
    small, is_leaf=lambda leaf: isinstance(leaf, ur.LowRank)
  )
  kept = [isinstance(v, (jax.Array, ur.LowRank)) for v in leaves]
  ur.save(tmp_path / 'small', [v for v, k in zip(leaves, kept) if k])
  loaded = iter(ur.load(tmp_path / 'small'))
  again = [next(loaded) if k else v for v, k in zip(leaves, kept)]
  got = run(jax.tree.unflatten(treedef, again), model.batch)
  jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize('name', COMPRESSED)
def test_compresses_to_half_of_the_parameters(name):
  running.assert_compresses(case(name))


def test_what_qwix_quantizes_is_named():
  installed('qwix')
  import qwix

  from frameworks import nnx_zoo_models

  model, x = nnx_zoo_models.MLP(nnx.Rngs(0)), jnp.ones((4, 8))
  sites = lambda model: ur.find_sites(lambda m, x: m(x), model, x)
  # Of one layer: its integers are no kernel, and the other layer's are one.
  rule = qwix.QuantizationRule(module_path='up', weight_qtype=jnp.int8)
  found = sites(qwix.quantize_model(model, qwix.PtqProvider([rule]), x))
  assert list(found) == ['down/kernel/value']
  assert 'up/kernel/array/qvalue/value' in found.unseen
  assert 'as a scale of' in found.unseen['up/kernel/array/scale/value']
  # Trained for it: what is multiplied is not the kernel but its rounding.
  rule = qwix.QtRule(
    module_path='.*', weight_qtype=jnp.int8, act_qtype=jnp.int8
  )
  found = sites(qwix.quantize_model(model, qwix.QtProvider([rule]), x))
  assert not found
  assert 'custom_vjp' in found.unseen['up/kernel/value']


def test_masked_weights_of_flowjax_are_named():
  installed('flowjax')
  from flowjax import flows

  from frameworks import equinox_zoo_models

  fn, params, _ = equinox_zoo_models.flowjax_flow(
    flows.masked_autoregressive_flow
  )
  sites = ur.find_sites(fn, params, jnp.ones((8, 4)))
  wide = {path for path, shape in sites.shapes.items() if len(shape) > 2}
  assert len(wide) == 2 and not sites
  assert all('select_n' in sites.unseen[path] for path in wide)


def test_every_matrix_of_a_published_vision_transformer_of_canvit():
  installed('canvit_nnx')
  from frameworks import nnx_zoo_models

  fn, model, glimpse = nnx_zoo_models.canvit()
  sites = ur.find_sites(fn, model, glimpse)
  kernels = {p for p in sites.shapes if p.endswith('kernel/value')}
  # What the last canvas is written with reaches no logits.
  assert kernels - set(sites) == {
    f'canvit/canvas_writes/2/{name}_map/kernel/value' for name in 'kv'
  }

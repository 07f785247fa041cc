"""Unmodified models of every framework: found, measured, shrunk, trained.

References come from activations that each framework hands out by its own
means, in float64; see `frameworks/`.
"""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from frameworks import big_vision_models
from frameworks import equinox_models
from frameworks import haiku_models
from frameworks import linen_models
from frameworks import nnx_models
from frameworks import plain_models
from frameworks import running
from frameworks.running import assert_same
from frameworks.running import jitted
import utilized_rank as ur

MODELS = {
  'nnx module': nnx_models.module,
  'nnx split': nnx_models.split,
  'haiku transformer': haiku_models.transformer,
  'haiku resnet': haiku_models.resnet,
  'haiku gru': haiku_models.recurrent,
  'equinox mlp': equinox_models.mlp,
  'equinox attention': equinox_models.attention,
  'equinox cnn': equinox_models.cnn,
  'linen layers': linen_models.layers,
  'linen scan remat': linen_models.scanned,
  'linen resnet': linen_models.resnet,
  'big_vision gap': big_vision_models.gap,
  'big_vision map': big_vision_models.attention_pooled,
  'dictionary': plain_models.transformer,
}
# One network of every framework, and what is unlike the others.
COMPRESSED = [
  'nnx module',
  'haiku transformer',
  'equinox mlp',
  'equinox attention',
  'equinox cnn',
  'linen layers',
]
every_model = pytest.mark.parametrize('name', MODELS)


@functools.cache
def case(name):
  return MODELS[name]()


@functools.cache
def captured(name):
  """Outputs and moments, from inside the caller's own jit."""
  model = case(name)
  run = jitted(ur.capture(model.fn), model.params)
  outputs, moments = run(model.params, model.batch)
  return outputs, jax.device_get(moments)


@functools.cache
def stock(name):
  """The model as its author runs it."""
  return jitted(case(name).fn, case(name).params)


def factorized(name, share, compensate_mean=False):
  moments = captured(name)[1]
  return running.factorized(case(name), moments, share, compensate_mean)


@functools.cache
def trained(name):
  """Outputs, loss and gradients of the factors of half rank, compiled."""
  fn = ur.low_rank(case(name).fn)

  def loss_and_outputs(params, batch):
    outputs = fn(params, batch)
    logits = jax.tree.leaves(outputs)[0]
    return jnp.mean(jnp.square(logits - 1.0)), outputs

  return jitted(value_and_float_grad(loss_and_outputs), factorized(name, 0.5))


def value_and_float_grad(fn):
  """`jax.value_and_grad` of the leaves that have a gradient, as a list."""

  def run(params, batch):
    leaves, treedef = jax.tree.flatten(params)
    at = float_leaves(leaves)

    def inner(floats):
      whole = list(leaves)
      for i, value in zip(at, floats, strict=True):
        whole[i] = value
      return fn(jax.tree.unflatten(treedef, whole), batch)

    return jax.value_and_grad(inner, has_aux=True)([leaves[i] for i in at])

  return run


def float_leaves(leaves):
  return [
    i for i, leaf in enumerate(leaves)
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jnp.floating)
  ]  # fmt: skip


@every_model
def test_finds_the_kernels_and_no_others(name):
  running.assert_kernels(case(name))


@every_model
def test_moments_equal_those_of_the_frameworks_activations(name):
  running.assert_moments(captured(name)[1], case(name).inputs())


@every_model
def test_capture_leaves_the_outputs_alone(name):
  model = case(name)
  assert_same(captured(name)[0], stock(name)(model.params, model.batch))


@every_model
def test_full_rank_computes_the_same_function(name):
  model = case(name)
  full = factorized(name, 1.0, compensate_mean=True)
  got = jitted(ur.low_rank(model.fn), full)(full, model.batch)
  assert_same(got, stock(name)(model.params, model.batch))


@every_model
def test_half_rank_merges_into_the_stock_model(name):
  model, half = case(name), factorized(name, 0.5)
  merged = ur.merge(half)
  assert jax.tree.structure(merged) == jax.tree.structure(model.params)
  (_, got), _ = trained(name)(half, model.batch)
  assert_same(got, stock(name)(merged, model.batch))
  # And it is another function than the dense one: something was cut.
  dense, cut = jax.tree.leaves(captured(name)[0])[0], jax.tree.leaves(got)[0]
  assert np.abs(dense - cut).max() > 1e-3


@every_model
def test_factors_train_with_optax(name):
  model, half = case(name), factorized(name, 0.5)
  (before, _), grads = trained(name)(half, model.batch)
  assert all(np.all(np.isfinite(grad)) for grad in grads)
  leaves, treedef = jax.tree.flatten(half)
  at = float_leaves(leaves)
  floats = [leaves[i] for i in at]
  optimizer = optax.sgd(1e-3)
  updates, _ = optimizer.update(grads, optimizer.init(floats))
  for i, value in zip(at, optax.apply_updates(floats, updates), strict=True):
    leaves[i] = value
  (after, _), _ = trained(name)(
    jax.tree.unflatten(treedef, leaves), model.batch
  )
  assert after < before


def test_a_head_that_is_called_again_for_nothing_counts_once():
  model = case('big_vision gap')
  site = ur.find_sites(model.fn, model.params, model.batch)['head/kernel']
  assert (site.uses, site.rows) == (1, len(model.batch))

  def with_out(params, image):
    vit = big_vision_models.ViT('gap', 'sincos2d')
    return vit.apply({'params': params}, image)

  # Returned, the second call is no longer dead, and counts.
  site = ur.find_sites(with_out, model.params, model.batch)['head/kernel']
  assert (site.uses, site.rows) == (2, 7 * len(model.batch))


@pytest.mark.parametrize(
  'name',
  [
    'nnx module',
    'haiku transformer',
    'equinox mlp',
    'equinox attention',
    'equinox cnn',
    'dictionary',
  ],  # fmt: skip
)
def test_collect_streams_what_capture_sees(name):
  model, (_, once) = case(name), captured(name)
  half = len(model.batch) // 2
  moments = ur.collect(
    model.fn, model.params, [model.batch[:half], model.batch[half:]],
    progress=False,
  )  # fmt: skip
  for path in once:
    assert np.all(moments[path].count == once[path].count)
    scale = np.abs(once[path].second).max()
    np.testing.assert_allclose(
      moments[path].second, once[path].second, rtol=0, atol=2e-6 * scale
    )


@pytest.mark.parametrize(
  'name',
  # What a version of JAX changes in a framework's model, the others show too.
  [
    COMPRESSED[0],
    *(pytest.param(n, marks=pytest.mark.slow) for n in COMPRESSED[1:]),
  ],
)
def test_compresses_to_half_of_the_parameters(name):
  running.assert_compresses(case(name))


def test_a_module_comes_out_as_a_module():
  model, tokens = case('nnx module').params, case('nnx module').batch
  merged = ur.merge(factorized('nnx module', 0.5))
  assert isinstance(merged, nnx_models.Transformer)
  assert merged(tokens).shape == model(tokens).shape
  merged = ur.merge(factorized('equinox mlp', 0.5))
  assert isinstance(merged, type(case('equinox mlp').params))


def test_an_nnx_state_is_saved_as_a_pure_dictionary(tmp_path):
  model, half = case('nnx split'), factorized('nnx split', 0.5)
  # A list of blocks has integers for keys.
  ur.save(tmp_path / 'small', nnx.to_pure_dict(half))
  restored = jax.tree.map(jnp.zeros_like, half)
  nnx.replace_by_pure_dict(restored, ur.load(tmp_path / 'small'))
  fn = ur.low_rank(model.fn)
  assert_same(fn(restored, model.batch), fn(half, model.batch))

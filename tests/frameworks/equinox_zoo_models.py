"""Other people's Equinox models: equimo, eqx-zoo, flowjax."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from frameworks.case import Case
from frameworks.case import filled
from frameworks.case import normal
from frameworks.case import tokens
from frameworks.taps import equinox_inputs


def equimo_vit() -> Case:
  from equimo.vision.models.vit import VisionTransformer

  model = filled(
    eqx.filter_eval_shape(
      lambda key: VisionTransformer(
        8, 3, 8, 4, 2, [1], reg_tokens=1, num_classes=5, key=key
      ),
      jax.random.key(0),
    )
  )
  images = normal(16, 3, 8, 8)
  block = 'blocks/0/blocks/0/'
  kernels = {
    'patch_embed/proj/weight': (48, 8),
    block + 'attn/qkv/weight': (8, 24),
    block + 'attn/proj/weight': (8, 8),
    block + 'mlp/fc1/weight': (8, 32),
    block + 'mlp/fc2/weight': (32, 8),
    'head/weight': (8, 5),
  }

  def fn(model, images):
    return jax.vmap(lambda image: model(image, inference=True))(images)

  unseen = {
    'global_pos_embed/weight': 'used by add',
    'cls_token': 'used by concatenate',
    'reg_tokens': 'used by concatenate',
  }
  return Case(
    fn, model, images, kernels,
    lambda: equinox_inputs(model, lambda tapped: fn(tapped, images)), unseen,
  )  # fmt: skip


def zoo_qwen() -> Case:
  """A causal language model with biases at query, key and value alone."""
  import eqx_zoo

  config = eqx_zoo.Config(
    architecture='Qwen2ForCausalLM', vocab_size=11, hidden_size=8,
    intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, head_dim=4, rms_norm_eps=1e-6, rope_theta=1e4,
    tie_word_embeddings=False, attention_bias=True, qk_norm=False,
    rope_scaling=None,
  )  # fmt: skip
  model = filled(
    eqx.filter_eval_shape(eqx_zoo.CausalLM, config, key=jax.random.key(0))
  )
  layer = 'model/layers/0/'
  kernels = {
    layer + 'self_attn/q_proj/weight': (8, 8),
    layer + 'self_attn/k_proj/weight': (8, 4),
    layer + 'self_attn/v_proj/weight': (8, 4),
    layer + 'self_attn/o_proj/weight': (8, 8),
    layer + 'mlp/gate_proj/weight': (8, 12),
    layer + 'mlp/up_proj/weight': (8, 12),
    layer + 'mlp/down_proj/weight': (12, 8),
    'lm_head/weight': (8, 11),
  }
  fn = lambda model, ids: jax.vmap(model)(ids)
  return Case(
    fn, model, tokens(), kernels,
    lambda: equinox_inputs(model, lambda tapped: fn(tapped, tokens())),
    {'model/embed_tokens/weight': 'gather'},
  )  # fmt: skip


def zoo_bert() -> Case:
  import eqx_zoo

  config = eqx_zoo.EncoderConfig('BertModel', 11, 8, 1, 2, 12, 9, 2, 1e-12)
  model = filled(
    eqx.filter_eval_shape(eqx_zoo.Encoder, config, key=jax.random.key(0))
  )
  layer = 'encoder/layer/0/'
  kernels = {
    layer + 'attention/output/dense/weight': (8, 8),
    layer + 'intermediate/dense/weight': (8, 12),
    layer + 'output/dense/weight': (12, 8),
  }
  for name in ('query', 'key', 'value'):
    kernels[f'{layer}attention/self/{name}/weight'] = (8, 8)
  fn = lambda model, ids: jax.vmap(model)(ids)
  unseen = {
    'embeddings/word_embeddings/weight': 'gather',
    'embeddings/position_embeddings/weight': 'used by',
    'embeddings/token_type_embeddings/weight': 'gather',
  }
  return Case(
    fn, model, tokens(), kernels,
    lambda: equinox_inputs(model, lambda tapped: fn(tapped, tokens())), unseen,
  )  # fmt: skip


def flowjax_flow(make):
  """(log density, its parameters) of a flow of two scanned layers."""
  from flowjax.distributions import Normal
  import paramax

  flow = make(
    jax.random.key(0), base_dist=Normal(jnp.zeros(4)), flow_layers=2,
    nn_width=8, nn_depth=1,
  )  # fmt: skip
  fixed = lambda leaf: isinstance(leaf, paramax.NonTrainable)
  params, static = eqx.partition(flow, eqx.is_inexact_array, is_leaf=fixed)

  def fn(params, x):
    return paramax.unwrap(eqx.combine(params, static)).log_prob(x)

  return fn, filled(jax.eval_shape(lambda: params)), static


def flowjax_coupling() -> Case:
  """The likelihood of a coupling flow; its conditioners are scanned over."""
  from flowjax.flows import coupling_flow
  import paramax

  fn, params, static = flowjax_flow(coupling_flow)
  x = normal(64, 4)
  stem = 'bijection/bijection/bijection/bijections/0/conditioner/layers/'
  kernels = {stem + '0/weight': (2, 2, 8), stem + '1/weight': (2, 8, 4)}

  def inputs():
    flow = paramax.unwrap(eqx.combine(params, static))
    stacked = flow.bijection.bijection.bijection
    nth = lambda i: jax.tree.map(
      lambda leaf: leaf[i] if eqx.is_array(leaf) else leaf, stacked
    )
    read = lambda layer, z: equinox_inputs(
      layer, lambda tapped: jax.vmap(tapped.transform)(z)
    )
    found = [read(nth(0), x), read(nth(1), jax.vmap(nth(0).transform)(x))]
    short = len('bijection/bijection/bijection/')
    return {k: np.stack([each[k[short:]] for each in found]) for k in kernels}

  return Case(fn, params, x, kernels, inputs)

"""penzai: a transformer of its own, its variables taken out and bound again."""

from __future__ import annotations

from unittest import mock

import jax
import numpy as np
from penzai import pz
from penzai.models.transformer.variants import llamalike_common

from frameworks.case import Case
from frameworks.case import filled
from frameworks.case import tokens


def llamalike() -> Case:
  config = llamalike_common.LlamalikeTransformerConfig(
    num_kv_heads=2, query_head_multiplier=2, embedding_dim=8, projection_dim=4,
    mlp_hidden_dim=12, num_decoder_blocks=1, vocab_size=11,
    mlp_variant='swiglu', tie_embedder_and_logits=False,
  )  # fmt: skip
  whole = llamalike_common.build_llamalike_transformer(
    config, init_base_rng=jax.random.key(0)
  )
  model, variables = pz.unbind_params(whole)
  held = {v.label: v.value for v in variables}
  params = filled(jax.eval_shape(lambda: held))

  def bound(params):
    values = [
      pz.ParameterValue(label=label, value=value)
      for label, value in params.items()
    ]
    return pz.bind_variables(model, values)

  def fn(params, ids):
    out = bound(params)(
      pz.nx.wrap(ids, 'batch', 'seq'), token_positions=pz.nx.arange('seq', 7)
    )
    return out.unwrap('batch', 'seq', 'vocabulary')

  block = 'transformer/block_0/'
  kernels = {
    block + 'attention/query.weights': (8, 16),
    block + 'attention/key.weights': (8, 8),
    block + 'attention/value.weights': (8, 8),
    block + 'attention/output.weights': (16, 8),
    block + 'mlp/gating_linear.weights': (8, 12),
    block + 'mlp/value_linear.weights': (8, 12),
    block + 'mlp/out_linear.weights': (12, 8),
    'transformer/lm_head.weights': (8, 11),
  }

  def inputs():
    seen = {}
    call = pz.nn.Linear.__call__

    def recording(layer, x, **side_inputs):
      value = layer.weights.value
      read = [a for a in value.named_axes if a in x.named_axes]
      x_rows = np.asarray(x.unwrap('batch', 'seq', *read), np.float64)
      label = layer.weights.label
      if label in kernels:  # a norm's scale is one of them, too
        seen[label + '/data_array'] = x_rows.reshape(28, -1)
      return call(layer, x, **side_inputs)

    with mock.patch.object(pz.nn.Linear, '__call__', recording):
      fn(params, tokens())
    return seen

  return Case(
    fn, params, tokens(),
    {path + '/data_array': shape for path, shape in kernels.items()}, inputs,
    {'transformer/embedder.embeddings/data_array': 'gather'},
  )  # fmt: skip

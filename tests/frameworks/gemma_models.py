"""Google's own Gemma: its blocks, which need none of the package's others."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from frameworks.case import Case
from frameworks.case import filled
from frameworks.case import rows
from frameworks.case import tokens

WIDTH, HEADS, KEYS, HEAD, HIDDEN, WORDS = 8, 4, 2, 6, 12, 11


def transformer() -> Case:
  """A small decoder of the third generation: grouped queries, a window of
  three tokens, capped scores, four norms a block, tied words."""
  from gemma import layers
  from gemma import modules

  class Decoder(nn.Module):
    @nn.compact
    def __call__(self, batch):
      words = modules.Embedder(WORDS, WIDTH, name='embedder')
      positions = jnp.broadcast_to(jnp.arange(batch.shape[1]), batch.shape)
      sees = jnp.tril(jnp.ones((batch.shape[1],) * 2, bool))
      x = words.encode(batch)
      for i, kind in enumerate(('LOCAL_SLIDING', 'GLOBAL')):
        _, x = modules.Block(
          num_heads=HEADS,
          num_kv_heads=KEYS,
          embed_dim=WIDTH,
          head_dim=HEAD,
          hidden_dim=HIDDEN,
          use_post_attn_norm=True,
          use_post_ffw_norm=True,
          attn_type=modules.AttentionType[kind],
          query_pre_attn_scalar=HEAD**-0.5,
          transpose_gating_einsum=True,
          attn_logits_soft_cap=50.0,
          sliding_window_size=3,
          use_qk_norm=True,
          name=f'layer_{i}',
        )(x, positions, None, jnp.broadcast_to(sees, (len(batch), *sees.shape)))
      return words.decode(layers.RMSNorm(name='final_norm')(x))

  model, batch = Decoder(), tokens()
  params = filled(jax.eval_shape(model.init, jax.random.key(0), batch))
  kernels = {'params/embedder/input_embedding': (WIDTH, WORDS)}
  for i in range(2):
    of = f'params/layer_{i}'
    kernels[f'{of}/attn/q_einsum/w'] = (WIDTH, HEADS * HEAD)
    kernels[f'{of}/attn/kv_einsum/w'] = (WIDTH, 2 * KEYS * HEAD)
    kernels[f'{of}/attn/attn_vec_einsum/w'] = (HEADS * HEAD, WIDTH)
    kernels[f'{of}/mlp/gating_einsum'] = (WIDTH, 2 * HIDDEN)
    kernels[f'{of}/mlp/linear'] = (HIDDEN, WIDTH)

  def inputs():
    seen = {}

    def interceptor(method, args, kwargs, context):
      path = '/'.join(('params', *context.module.path))
      if context.method_name == 'decode':
        path, x = f'{path}/input_embedding', args[0]
        seen[path] = rows(x, kernels[path][0])
      elif isinstance(context.module, layers.Einsum):
        path, x = f'{path}/{context.module.weight_name}', args[1]
        seen[path] = rows(x, kernels[path][0])
      return method(*args, **kwargs)

    with nn.intercept_methods(interceptor):
      model.apply(params, batch)
    return seen

  return Case(model.apply, params, batch, kernels, inputs)

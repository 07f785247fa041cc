"""An encoder of text: BERT and DistilBERT.

Devlin et al., https://arxiv.org/abs/1810.04805; MiniLM is a BERT.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from utilized_rank.host.extras import extra
from utilized_rank.models import transformer_parts

with extra('models'):
  import flax.linen as nn

Array = jax.Array

_OUTPUTS = ('tokens', 'mean', 'classes', 'vocabulary')


class Bert(nn.Module):
  """Tokens `(B, T)` of integers to float32 features or logits.

  >>> import jax, jax.numpy as jnp
  >>> model = Bert(vocabulary=7, context=6, width=8, depth=1, heads=2,
  ...              mlp_dim=12)
  >>> tokens = jnp.zeros((2, 5), int)
  >>> init = model.init_with_output
  >>> jax.eval_shape(init, jax.random.key(0), tokens)[0].shape
  (2, 5, 8)

  Attributes:
    vocabulary: number of tokens.
    context: number of positions; at least T.
    width: width of the residual stream; a multiple of `heads`.
    depth: number of blocks.
    heads: number of attention heads.
    mlp_dim: hidden width of the MLPs.
    types: number of kinds of tokens (sentence A, sentence B), or 0.
    output: `'tokens'`: features `(B, T, width)`; `'mean'`: their mean over what
      is no padding, `(B, width)`, as sentence embeddings are made; `'classes'`:
      logits `(B, num_classes)` behind a layer on the first token;
      `'vocabulary'`: logits `(B, T, vocabulary)`, with the embedding's table.
    num_classes: width of the head of `'classes'`.
    activation: a key of `transformer_parts.ACTIVATIONS`.
    pooler_activation: `'tanh'` or `'relu'` (DistilBERT) behind the layer on the
      first token.
    epsilon: of the layer norms.
    dtype: type of the computation.

  Raises (when called):
    ValueError: T is larger than `context`, or there is no such output.
  """

  vocabulary: int
  context: int
  width: int
  depth: int
  heads: int
  mlp_dim: int
  types: int = 2
  output: str = 'tokens'
  num_classes: int = 0
  activation: str = 'gelu'
  pooler_activation: str = 'tanh'
  epsilon: float = 1e-12
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self, tokens: Array, mask: Array | None = None, types: Array | None = None
  ) -> Array:
    """Where `mask` (B, T) is 0 there is padding, which no token sees.

    `types` (B, T) are zeros if they are not given.
    """
    length = tokens.shape[1]
    if length > self.context:
      raise ValueError(
        f'{length} tokens do not fit into context={self.context}.'
      )
    if self.output not in _OUTPUTS:
      raise ValueError(f'output={self.output!r}; it is one of {_OUTPUTS}.')
    embedding = nn.Embed(
      self.vocabulary, self.width, dtype=self.dtype, name='embedding'
    )
    x = embedding(tokens)
    table = self.param(
      'positions', nn.initializers.normal(0.02), (self.context, self.width)
    )
    x = x + table[:length].astype(x.dtype)
    if self.types:
      kinds = nn.Embed(self.types, self.width, dtype=self.dtype, name='types')
      x = x + kinds(jnp.zeros_like(tokens) if types is None else types)
    x = self._norm('embedding_norm')(x)
    options = transformer_parts.BlockOptions(
      heads=self.heads,
      mlp_dim=self.mlp_dim,
      activation=self.activation,
      norm_order='after',
      epsilon=self.epsilon,
      dtype=self.dtype,
    )
    seen = None if mask is None else mask[:, None, None] != 0
    for i in range(self.depth):
      x, _ = transformer_parts.EncoderBlock(options, True, name=f'block_{i}')(
        x, seen
      )
    return self._head(x, embedding, mask).astype(jnp.float32)

  def _norm(self, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=self.epsilon, dtype=self.dtype, name=name)

  def _head(self, x: Array, embedding: nn.Embed, mask: Array | None) -> Array:
    dense = lambda features, name: nn.Dense(
      features, dtype=self.dtype, name=name
    )
    if self.output == 'mean':
      if mask is None:
        return x.mean(axis=1)
      rows = (mask != 0).astype(x.dtype)[..., None]
      return (x * rows).sum(axis=1) / rows.sum(axis=1)
    if self.output == 'classes':
      x = dense(self.width, 'pooler')(x[:, 0])
      x = {'tanh': jnp.tanh, 'relu': nn.relu}[self.pooler_activation](x)
      return dense(self.num_classes, 'head')(x)
    if self.output == 'vocabulary':
      activation = transformer_parts.ACTIVATIONS[self.activation]
      x = activation(dense(self.width, 'pre_logits')(x))
      x = self._norm('pre_logits_norm')(x)
      bias = self.param('logits_bias', nn.initializers.zeros, self.vocabulary)
      return embedding.attend(x) + bias
    return x

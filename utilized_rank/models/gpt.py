"""A GPT-2 style decoder: learned positions, causal pre-norm blocks."""

from __future__ import annotations

import jax

from utilized_rank.host.extras import extra
from utilized_rank.models import transformer_parts

with extra('models'):
  import flax.linen as nn

Array = jax.Array


class GPT(nn.Module):
  """Tokens `(B, T)` of integers to logits `(B, T, vocabulary)`.

  >>> import jax, jax.numpy as jnp
  >>> model = GPT(vocabulary=3, context=8, width=8, depth=1, heads=2)
  >>> tokens = jnp.zeros((2, 5), int)
  >>> init = model.init_with_output
  >>> jax.eval_shape(init, jax.random.key(0), tokens)[0].shape
  (2, 5, 3)

  Attributes:
    vocabulary: number of tokens.
    context: number of positions; at least T.
    width: width of the residual stream; a multiple of `heads`.
    depth: number of blocks, whose MLPs are four times as wide.
    heads: number of attention heads.

  Raises (when called):
    ValueError: T is larger than `context`.
  """

  vocabulary: int
  context: int
  width: int
  depth: int
  heads: int

  @nn.compact
  def __call__(self, tokens: Array) -> Array:
    if tokens.shape[1] > self.context:
      raise ValueError(
        f'{tokens.shape[1]} tokens do not fit into context={self.context}.'
      )
    x = nn.Embed(self.vocabulary, self.width, name='embedding')(tokens)
    positions = self.param(
      'positions', nn.initializers.normal(0.02), (self.context, self.width)
    )
    x = x + positions[: x.shape[1]]
    options = transformer_parts.BlockOptions(
      heads=self.heads, mlp_dim=4 * self.width, causal=True, epsilon=1e-5
    )
    for i in range(self.depth):
      x, _ = transformer_parts.EncoderBlock(options, True, name=f'block_{i}')(x)
    x = nn.LayerNorm(epsilon=options.epsilon, name='norm')(x)
    return nn.Dense(self.vocabulary, use_bias=False, name='head')(x)

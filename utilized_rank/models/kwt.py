"""The Keyword Transformer: a post-norm ViT on the frames of a spectrogram.

Berg, O'Connor, Cruz, "Keyword Transformer", https://arxiv.org/abs/2104.00769.
"""

from __future__ import annotations

import jax

from utilized_rank.host.extras import extra
from utilized_rank.models import transformer_parts
from utilized_rank.models import vit

with extra('models'):
  import flax.linen as nn

Array = jax.Array


class KeywordTransformer(nn.Module):
  """Features `(B, frames, coefficients)` to logits `(B, num_classes)`.

  The defaults are KWT-1. The names of the tree are the ViT's.

  >>> import jax, jax.numpy as jnp
  >>> model = KeywordTransformer(12, width=8, depth=1, mlp_dim=16)
  >>> x = jnp.zeros((2, 5, 4))
  >>> init = model.init_with_output
  >>> jax.eval_shape(init, jax.random.key(0), x)[0].shape
  (2, 12)

  Attributes:
    num_classes: width of the head.
    width: width of the residual stream; a multiple of `heads`.
    depth: number of blocks.
    heads: number of attention heads.
    mlp_dim: hidden width of the MLPs.
    activation: a key of `transformer_parts.ACTIVATIONS`.
    dropout: rate after the attention and the dense layers.
  """

  num_classes: int
  width: int = 64
  depth: int = 12
  heads: int = 1
  mlp_dim: int = 256
  activation: str = 'gelu_tanh'
  dropout: float = 0.0

  @nn.compact
  def __call__(self, x: Array, *, train: bool = False) -> Array:
    x = nn.Dense(self.width, name='embedding')(x)
    cls = self.param('cls', nn.initializers.zeros, (1, 1, self.width))
    options = transformer_parts.BlockOptions(
      heads=self.heads,
      mlp_dim=self.mlp_dim,
      activation=self.activation,
      qkv_bias=False,
      norm_order='after',
      dropout=self.dropout,
    )
    grid = (1, x.shape[1])
    x = vit.Encoder(
      options, self.depth, grid, last_norm=False, name='Transformer'
    )(x, cls, train=train)
    return nn.Dense(self.num_classes, name='head')(x[:, 0])

"""A plain multilayer perceptron."""

from __future__ import annotations

from collections.abc import Sequence

import jax

from utilized_rank.host.extras import extra
from utilized_rank.models.transformer_parts import ACTIVATIONS

with extra('models'):
  import flax.linen as nn

Array = jax.Array


class MLP(nn.Module):
  """Arrays `(B, ...)`, flattened, to `(B, widths[-1])`.

  >>> import jax, jax.numpy as jnp
  >>> model, x = MLP((5, 3)), jnp.zeros((2, 4, 4))
  >>> init = model.init_with_output
  >>> jax.eval_shape(init, jax.random.key(0), x)[0].shape
  (2, 3)

  Attributes:
    widths: of the layers' outputs, the last one's included.
    activation: between them, a key of `transformer_parts.ACTIVATIONS`.
  """

  widths: Sequence[int]
  activation: str = 'relu'

  @nn.compact
  def __call__(self, x: Array) -> Array:
    x = x.reshape(x.shape[0], -1)
    activation = ACTIVATIONS[self.activation]
    for i, width in enumerate(self.widths):
      x = nn.Dense(width)(activation(x) if i else x)
    return x

"""The parts that the transformers of this package share."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from utilized_rank.host.extras import extra

with extra('models'):
  import flax.linen as nn

Array = jax.Array

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
  'gelu': functools.partial(nn.gelu, approximate=False),
  'gelu_tanh': functools.partial(nn.gelu, approximate=True),
  # OpenAI's CLIP.
  'quick_gelu': lambda x: x * nn.sigmoid(1.702 * x),
}
_XAVIER = nn.initializers.xavier_uniform()


@dataclasses.dataclass(frozen=True)
class BlockOptions:
  """What the blocks of one transformer have in common.

  Attributes:
    heads: attention heads; the width is a multiple of it.
    mlp_dim: hidden width of the MLP.
    activation: a key of `ACTIVATIONS`; of no meaning with `swiglu`.
    swiglu: the gated MLP of Shazeer (https://arxiv.org/abs/2002.05202).
    qkv_bias: queries, keys and values have biases.
    qk_norm: queries and keys are normalised per head
      (https://arxiv.org/abs/2302.05442).
    layer_scale: what the scales of the residual branches start from, or None
      for no scales (https://arxiv.org/abs/2103.17239).
    post_norm: norms after the residual sums, as in the first transformer.
    causal: a position sees itself and those before it.
    epsilon: of the layer norms.
    dropout: rate after the attention and the dense layers.
    attention_dropout: rate on the attention weights.
    dtype: type of the computation.
  """

  heads: int
  mlp_dim: int
  activation: str = 'gelu_tanh'
  swiglu: bool = False
  qkv_bias: bool = True
  qk_norm: bool = False
  layer_scale: float | None = None
  post_norm: bool = False
  causal: bool = False
  epsilon: float = 1e-6
  dropout: float = 0.0
  attention_dropout: float = 0.0
  dtype: Any = jnp.float32

  def __post_init__(self) -> None:
    if self.activation not in ACTIVATIONS:
      raise ValueError(
        f'activation={self.activation!r}; it is one of {sorted(ACTIVATIONS)}.'
      )


class MlpBlock(nn.Module):
  """Dense, activation, dense back to the input width; `(B, N, D)` to same."""

  mlp_dim: int
  activation: str
  dropout: float
  deterministic: bool
  dtype: Any

  @nn.compact
  def __call__(self, x: Array) -> Array:
    init = {
      'kernel_init': _XAVIER,
      'bias_init': nn.initializers.normal(1e-6),
      'dtype': self.dtype,
    }
    width = x.shape[-1]
    x = ACTIVATIONS[self.activation](nn.Dense(self.mlp_dim, **init)(x))
    x = nn.Dropout(self.dropout, deterministic=self.deterministic)(x)
    x = nn.Dense(width, **init)(x)
    return nn.Dropout(self.dropout, deterministic=self.deterministic)(x)


class SwiGLU(nn.Module):
  """`down(silu(gate(x)) * up(x))`; `(B, N, D)` to the same."""

  mlp_dim: int
  use_bias: bool
  dtype: Any

  @nn.compact
  def __call__(self, x: Array) -> Array:
    dense = functools.partial(
      nn.Dense, use_bias=self.use_bias, dtype=self.dtype, kernel_init=_XAVIER
    )
    hidden = nn.silu(dense(self.mlp_dim, name='gate')(x))
    hidden = hidden * dense(self.mlp_dim, name='up')(x)
    return dense(x.shape[-1], name='down')(hidden)


def attend(q: Array, k: Array, v: Array, *, causal: bool = False) -> Array:
  """Attention with weights softmax(q k^T / sqrt(E)), in float32.

  Weights are summed and divided by behind the product with the values, as
  FlashAttention does (https://arxiv.org/abs/2205.14135), and heads lead in both
  products. On two CPU cores XLA takes a quarter of the time that
  `jax.nn.dot_product_attention` takes (`python -m benchmarks.attend`), which
  divides every weight and has heads behind the positions. Queries are scaled,
  as in Flax, and not scores: for those XLA makes an array of the one number, as
  large as they are, once for all layers, and each layer reads it.

  Args:
    q: (B, T, H, E).
    k: (B, S, H, E).
    v: (B, S, H, E).
    causal: a position sees itself and those before it.

  Returns:
    (B, T, H, E) in the values' dtype.

  >>> q = k = v = jnp.arange(24.0).reshape(1, 3, 2, 4) / 10
  >>> expected = jax.nn.dot_product_attention(q, k, v, is_causal=True)
  >>> bool(jnp.allclose(attend(q, k, v, causal=True), expected, atol=1e-6))
  True
  """
  q = q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
  q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
  wide = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  scores = wide('bhte,bhse->bhts', q, k)
  if causal:
    seen = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    scores = jnp.where(seen, scores, -jnp.inf)
  most = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
  weights = jnp.exp(scores - most)
  y = wide('bhts,bhse->bhte', weights.astype(v.dtype), v)
  y = y / weights.sum(-1, keepdims=True)
  return y.astype(v.dtype).swapaxes(1, 2)


class Attention(nn.Module):
  """Self-attention on `(B, N, D)`, with the tree of Flax's own module."""

  options: BlockOptions
  deterministic: bool

  @nn.compact
  def __call__(self, x: Array) -> Array:
    o = self.options
    width = x.shape[-1]
    project = functools.partial(
      nn.DenseGeneral,
      features=(o.heads, width // o.heads),
      use_bias=o.qkv_bias,
      kernel_init=_XAVIER,
      dtype=o.dtype,
    )
    q, k, v = (project(name=name)(x) for name in ('query', 'key', 'value'))
    if o.qk_norm:
      norm = functools.partial(nn.LayerNorm, epsilon=o.epsilon, dtype=o.dtype)
      q, k = norm(name='query_norm')(q), norm(name='key_norm')(k)
    if o.attention_dropout > 0 and not self.deterministic:
      y = nn.dot_product_attention(
        q,
        k,
        v,
        mask=nn.make_causal_mask(x[..., 0]) if o.causal else None,
        dropout_rng=self.make_rng('dropout'),
        dropout_rate=o.attention_dropout,
        broadcast_dropout=False,
        dtype=o.dtype,
      )
    else:
      y = attend(q, k, v, causal=o.causal)
    return nn.DenseGeneral(
      width, axis=(-2, -1), kernel_init=_XAVIER, dtype=o.dtype, name='out'
    )(y)


class LayerScale(nn.Module):
  """Multiplies every channel by a learned number."""

  start: float

  @nn.compact
  def __call__(self, x: Array) -> Array:
    start = nn.initializers.constant(self.start)
    return x * self.param('gamma', start, (x.shape[-1],)).astype(x.dtype)


class EncoderBlock(nn.Module):
  """One block. Returns `(x, None)`, the form that `nn.scan` needs."""

  options: BlockOptions
  # An attribute, not an argument: remat and scan then see only arrays.
  deterministic: bool

  @nn.compact
  def __call__(self, x: Array, _: None = None) -> tuple[Array, None]:
    # The explicit names are those that the AugReg checkpoints' automatic
    # numbering gave to the second to fourth submodule of a block.
    o = self.options
    attention = Attention(
      o, self.deterministic, name='MultiHeadDotProductAttention_1'
    )
    drop = nn.Dropout(o.dropout, deterministic=self.deterministic)
    mlp: nn.Module
    if o.swiglu:
      mlp = SwiGLU(o.mlp_dim, use_bias=True, dtype=o.dtype, name='MlpBlock_3')
    else:
      mlp = MlpBlock(
        o.mlp_dim,
        o.activation,
        o.dropout,
        self.deterministic,
        o.dtype,
        name='MlpBlock_3',
      )
    x = self._residual(x, lambda y: drop(attention(y)), 0)
    return self._residual(x, mlp, 2), None

  def _residual(
    self, x: Array, branch: Callable[[Array], Array], place: int
  ) -> Array:
    o = self.options
    norm = nn.LayerNorm(
      epsilon=o.epsilon, dtype=o.dtype, name=f'LayerNorm_{place}'
    )
    y = branch(x if o.post_norm else norm(x))
    if o.layer_scale is not None:
      y = LayerScale(o.layer_scale, name=f'LayerScale_{place + 1}')(y)
    return norm(x + y) if o.post_norm else x + y

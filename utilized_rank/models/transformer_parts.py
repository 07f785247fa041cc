"""The parts that the transformers of this package share."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from utilized_rank.host.extras import extra
from utilized_rank.models.rotary import GridRotation
from utilized_rank.models.rotary import rotate

with extra('models'):
  import flax.linen as nn

Array = jax.Array

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
  'gelu': functools.partial(nn.gelu, approximate=False),
  'gelu_tanh': functools.partial(nn.gelu, approximate=True),
  # OpenAI's CLIP.
  'quick_gelu': lambda x: x * nn.sigmoid(1.702 * x),
  'relu': nn.relu,
  'silu': nn.silu,
  # Of networks for phones.
  'relu6': nn.relu6,
  'hard_swish': nn.hard_swish,
}
NORM_ORDERS = ('before', 'after', 'branch')
_XAVIER = nn.initializers.xavier_uniform()


@dataclasses.dataclass(frozen=True)
class BlockOptions:
  """What the blocks of one transformer have in common.

  Attributes:
    heads: attention heads; the width is a multiple of it.
    mlp_dim: hidden width of the MLP.
    activation: a key of `ACTIVATIONS`; of no meaning with `swiglu`.
    swiglu: the gated MLP of Shazeer (https://arxiv.org/abs/2002.05202).
    gate_activation: of the gate of `swiglu`, a key of `ACTIVATIONS`.
    mlp_bias: the MLP has biases.
    mlp_norm: a norm before the last layer of the MLP, and of the attention
    attention_norm: (https://arxiv.org/abs/2210.06423).
    qkv_bias: queries, keys and values have biases.
    key_bias: keys have, or None for as the others.
    out_bias: the last layer of the attention has a bias.
    qk_norm: queries and keys are normalised per head
      (https://arxiv.org/abs/2302.05442).
    layer_scale: what the scales of the residual branches start from, or None
      for no scales (https://arxiv.org/abs/2103.17239).
    norm_order: norms `'before'` the branches, `'after'` the residual sums, as
      in the first transformer, or on what a `'branch'` adds.
    causal: a position sees itself and those before it.
    norm: `'layer'`, or `'rms'` without mean and bias.
    rotation: of queries and keys of patches, or None.
    relative_positions: a learned number for each two places of patches and
      each head is added to the scores (https://arxiv.org/abs/2106.08254).
    relative_tokens: such numbers are there for a token before the patches.
    grid: rows and columns of patches, for these two.
    epsilon: of the norms.
    dropout: rate after the attention and the dense layers.
    attention_dropout: rate on the attention weights.
    dtype: type of the computation.
  """

  heads: int
  mlp_dim: int
  activation: str = 'gelu_tanh'
  swiglu: bool = False
  gate_activation: str = 'silu'
  mlp_bias: bool = True
  mlp_norm: bool = False
  attention_norm: bool = False
  qkv_bias: bool = True
  key_bias: bool | None = None
  out_bias: bool = True
  qk_norm: bool = False
  layer_scale: float | None = None
  norm_order: str = 'before'
  causal: bool = False
  norm: str = 'layer'
  rotation: GridRotation | None = None
  relative_positions: bool = False
  relative_tokens: bool = True
  grid: tuple[int, int] | None = None
  epsilon: float = 1e-6
  dropout: float = 0.0
  attention_dropout: float = 0.0
  dtype: Any = jnp.float32

  def __post_init__(self) -> None:
    if self.activation not in ACTIVATIONS:
      raise ValueError(
        f'activation={self.activation!r}; it is one of {sorted(ACTIVATIONS)}.'
      )
    if self.grid is None and (self.rotation or self.relative_positions):
      raise ValueError('rotation and relative_positions need grid=.')
    if self.norm_order not in NORM_ORDERS:
      raise ValueError(
        f'norm_order={self.norm_order!r}; it is one of {NORM_ORDERS}.'
      )


def make_norm(options: BlockOptions, name: str) -> nn.Module:
  """The norm of all places of a transformer."""
  kind = {'layer': nn.LayerNorm, 'rms': nn.RMSNorm}[options.norm]
  return kind(epsilon=options.epsilon, dtype=options.dtype, name=name)


class MlpBlock(nn.Module):
  """Dense, activation, dense back to the input width; `(B, N, D)` to same."""

  options: BlockOptions
  deterministic: bool

  @nn.compact
  def __call__(self, x: Array) -> Array:
    o = self.options
    init = {
      'kernel_init': _XAVIER,
      'bias_init': nn.initializers.normal(1e-6),
      'use_bias': o.mlp_bias,
      'dtype': o.dtype,
    }
    width = x.shape[-1]
    x = ACTIVATIONS[o.activation](nn.Dense(o.mlp_dim, **init)(x))
    x = nn.Dropout(o.dropout, deterministic=self.deterministic)(x)
    if o.mlp_norm:
      x = make_norm(o, 'norm')(x)
    x = nn.Dense(width, **init)(x)
    return nn.Dropout(o.dropout, deterministic=self.deterministic)(x)


class GatedMlp(nn.Module):
  """`down(activation(gate(x)) * up(x))`; `(B, N, D)` to the same.

  Shazeer, https://arxiv.org/abs/2002.05202.
  """

  mlp_dim: int
  use_bias: bool
  dtype: Any
  activation: str = 'silu'
  norm: Callable[[str], nn.Module] | None = None

  @nn.compact
  def __call__(self, x: Array) -> Array:
    dense = functools.partial(
      nn.Dense, use_bias=self.use_bias, dtype=self.dtype, kernel_init=_XAVIER
    )
    hidden = ACTIVATIONS[self.activation](dense(self.mlp_dim, name='gate')(x))
    hidden = hidden * dense(self.mlp_dim, name='up')(x)
    if self.norm is not None:
      hidden = self.norm('norm')(hidden)
    return dense(x.shape[-1], name='down')(hidden)


def attend(
  q: Array,
  k: Array,
  v: Array,
  *,
  causal: bool = False,
  scale: float | None = None,
  bias: Array | None = None,
  cap: float | None = None,
  seen: Array | None = None,
) -> Array:
  """Attention with weights softmax(scale q k^T + bias), in float32.

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
    scale: of the scores, or None for 1 / sqrt(E).
    bias: added to the scores, of their shape (B, H, T, S) or one that grows to
      it.
    cap: c of c tanh(score / c), or None (https://arxiv.org/abs/2408.00118).
    seen: booleans of the scores' shape; False where a position is not seen.

  Returns:
    (B, T, H, E) in the values' dtype.

  >>> q = k = v = jnp.arange(24.0).reshape(1, 3, 2, 4) / 10
  >>> expected = jax.nn.dot_product_attention(q, k, v, is_causal=True)
  >>> bool(jnp.allclose(attend(q, k, v, causal=True), expected, atol=1e-6))
  True
  """
  scale = q.shape[-1] ** -0.5 if scale is None else scale
  q = q * jnp.asarray(scale, q.dtype)
  q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
  wide = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  scores = wide('bhte,bhse->bhts', q, k)
  if bias is not None:
    scores = scores + bias
  if cap is not None:
    scores = cap * jnp.tanh(scores / cap)
  if causal:
    before = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    seen = before if seen is None else seen & before
  if seen is not None:
    # Not -inf: a row of padding that sees nothing stays finite.
    scores = jnp.where(seen, scores, jnp.finfo(scores.dtype).min)
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
  def __call__(self, x: Array, seen: Array | None = None) -> Array:
    o = self.options
    width = x.shape[-1]
    project = functools.partial(into_heads, o, width)
    key_bias = o.qkv_bias if o.key_bias is None else o.key_bias
    q = project(use_bias=o.qkv_bias, name='query')(x)
    k = project(use_bias=key_bias, name='key')(x)
    v = project(use_bias=o.qkv_bias, name='value')(x)
    if o.qk_norm:
      q, k = make_norm(o, 'query_norm')(q), make_norm(o, 'key_norm')(k)
    if o.rotation is not None and o.grid is not None:
      turn = functools.partial(_turned, rotation=o.rotation, grid=o.grid)
      q, k = turn(q), turn(k)
    bias = None
    if o.relative_positions and o.grid is not None:
      bias = RelativePositions(
        o.grid, o.heads, o.relative_tokens, name='relative'
      )(x.shape[1])
    if o.attention_dropout > 0 and not self.deterministic:
      causal = nn.make_causal_mask(x[..., 0], dtype=bool) if o.causal else None
      y = nn.dot_product_attention(
        q,
        k,
        v,
        bias=bias,
        mask=nn.combine_masks(causal, seen, dtype=bool),
        dropout_rng=self.make_rng('dropout'),
        dropout_rate=o.attention_dropout,
        broadcast_dropout=False,
        dtype=o.dtype,
      )
    else:
      y = attend(q, k, v, causal=o.causal, bias=bias, seen=seen)
    if o.attention_norm:
      y = make_norm(o, 'norm')(y.reshape(*y.shape[:-2], width)).reshape(y.shape)
    return out_of_heads(o, width)(y)


def into_heads(options: BlockOptions, width: int, **named: Any) -> nn.Module:
  """Queries, keys or values `(..., heads, width / heads)`, by `name`."""
  return nn.DenseGeneral(
    (options.heads, width // options.heads),
    kernel_init=_XAVIER,
    dtype=options.dtype,
    **named,
  )


def out_of_heads(options: BlockOptions, width: int) -> nn.Module:
  """What attention ends with: `(..., heads, width / heads)` to `width`."""
  return nn.DenseGeneral(
    width,
    axis=(-2, -1),
    use_bias=options.out_bias,
    kernel_init=_XAVIER,
    dtype=options.dtype,
    name='out',
  )


def _turned(x: Array, rotation: GridRotation, grid: tuple[int, int]) -> Array:
  """Patches are; tokens before them have no position."""
  tokens = x.shape[1] - grid[0] * grid[1]
  patches = rotate(
    x[:, tokens:], rotation.angles(grid), interleaved=rotation.interleaved
  )
  return (
    jnp.concatenate([x[:, :tokens], patches], axis=1) if tokens else patches
  )


class RelativePositions(nn.Module):
  """A learned number for each head, and each offset of two patches.

  With `tokens`, behind the offsets of patches come three: from a token to a
  patch, from a patch to a token, from a token to itself.
  """

  grid: tuple[int, int]
  heads: int
  tokens: bool = True

  @nn.compact
  def __call__(self, length: int) -> Array:
    """`(heads, length, length)`, of the patches and at most one token."""
    rows, columns = self.grid
    offsets = (2 * rows - 1) * (2 * columns - 1)
    rows_of_table = offsets + 3 * self.tokens
    table = self.param(
      'table', nn.initializers.normal(0.02), (rows_of_table, self.heads)
    )
    at = np.indices(self.grid).reshape(2, -1)
    away = at[:, :, None] - at[:, None]
    index = (away[0] + rows - 1) * (2 * columns - 1) + away[1] + columns - 1
    if length > rows * columns:
      index = np.pad(index, ((1, 0), (1, 0)))
      index[0], index[:, 0], index[0, 0] = offsets, offsets + 1, offsets + 2
    return table[index].transpose(2, 0, 1)


class LayerScale(nn.Module):
  """Multiplies every channel by a learned number."""

  start: float

  @nn.compact
  def __call__(self, x: Array) -> Array:
    start = nn.initializers.constant(self.start)
    return x * self.param('gamma', start, (x.shape[-1],)).astype(x.dtype)


class EncoderBlock(nn.Module):
  """One block. Returns `(x, None)`, the form that `nn.scan` needs.

  `seen` are booleans that grow to `(B, H, N, N)`, False where a position is not
  seen, or None.
  """

  options: BlockOptions
  # An attribute, not an argument: remat and scan then see only arrays.
  deterministic: bool

  @nn.compact
  def __call__(self, x: Array, seen: Array | None = None) -> tuple[Array, None]:
    # The explicit names are those that the AugReg checkpoints' automatic
    # numbering gave to the second to fourth submodule of a block.
    o = self.options
    attention = Attention(
      o, self.deterministic, name='MultiHeadDotProductAttention_1'
    )
    drop = nn.Dropout(o.dropout, deterministic=self.deterministic)
    mlp: nn.Module
    if o.swiglu:
      mlp = GatedMlp(
        o.mlp_dim,
        use_bias=o.mlp_bias,
        dtype=o.dtype,
        activation=o.gate_activation,
        norm=functools.partial(make_norm, o) if o.mlp_norm else None,
        name='MlpBlock_3',
      )
    else:
      mlp = MlpBlock(o, self.deterministic, name='MlpBlock_3')
    x = self._residual(x, lambda y: drop(attention(y, seen)), 0)
    return self._residual(x, mlp, 2), None

  def _residual(
    self, x: Array, branch: Callable[[Array], Array], place: int
  ) -> Array:
    o = self.options
    norm = make_norm(o, f'LayerNorm_{place}')
    y = branch(norm(x) if o.norm_order == 'before' else x)
    if o.layer_scale is not None:
      y = LayerScale(o.layer_scale, name=f'LayerScale_{place + 1}')(y)
    if o.norm_order == 'branch':
      return x + norm(y)
    return norm(x + y) if o.norm_order == 'after' else x + y

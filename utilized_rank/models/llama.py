"""A decoder of rotary positions and gated MLPs: Llama, and what grew from it.

Touvron et al., https://arxiv.org/abs/2302.13971. With the defaults it is
Llama; the options are what others changed: Mistral, Qwen, Gemma, Phi-3, OLMo,
Granite, Helium, SmolLM3, Ernie.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from utilized_rank.host.extras import extra
from utilized_rank.models import transformer_parts
from utilized_rank.models.rotary import Rotation
from utilized_rank.models.rotary import rotate

with extra('models'):
  import flax.linen as nn

Array = jax.Array

_NORMS = ('rms', 'fixed')
_ORDERS = ('before', 'branch', 'both')
_QK_NORMS = (None, 'head', 'width')


class Llama(nn.Module):
  """Tokens `(B, T)` of integers to float32 logits `(B, T, vocabulary)`.

  >>> import jax, jax.numpy as jnp
  >>> model = Llama(vocabulary=7, width=8, depth=1, heads=2, kv_heads=1,
  ...               mlp_dim=12)
  >>> tokens = jnp.zeros((2, 5), int)
  >>> init = model.init_with_output
  >>> jax.eval_shape(init, jax.random.key(0), tokens)[0].shape
  (2, 5, 7)

  Attributes:
    vocabulary: number of tokens.
    width: width of the residual stream.
    depth: number of blocks.
    heads: number of query heads.
    kv_heads: number of key and value heads; it divides `heads`
      (https://arxiv.org/abs/2305.13245).
    mlp_dim: hidden width of the gated MLPs.
    head_dim: width of a head, or None for `width // heads`.
    tied: the output shares the embedding's table.
    interleaved: see `rotary.rotate`.
    theta: base of the wavelengths, where `rotations` is None.
    epsilon: of the norms.
    dtype: type of the computation.
    rotations: for each block its `rotary.Rotation`, or None for no positions.
    windows: for each block how many of the last positions are seen, or None
      for all (https://arxiv.org/abs/2310.06825).
    activation: of the gate, a key of `transformer_parts.ACTIVATIONS`.
    qkv_bias: queries, keys and values have biases.
    out_bias: the attention's output has a bias.
    mlp_bias: the MLPs have biases.
    norm: `'rms'`, or `'fixed'`: mean and variance, without parameters (OLMo).
    norm_order: norms `'before'` the branches, on what a `'branch'` adds
      (OLMo 2), or `'both'` (Gemma 2).
    qk_norm: queries and keys are normalised per `'head'`, over the whole
      `'width'`, or not.
    embedding_scale: factor of the embeddings.
    residual_scale: factor of what a branch adds.
    attention_scale: factor of the scores, or None for `head_dim ** -0.5`.
    attention_cap: scores are c tanh(score / c), or None.
    logits_scale: factor of the logits.
    logits_cap: as `attention_cap`, of the logits.
    head: whether there are logits; else features `(B, T, width)` float32.

  Raises (when called):
    ValueError: `heads` is no multiple of `kv_heads`, or an option has no such
      value.
  """

  vocabulary: int
  width: int
  depth: int
  heads: int
  kv_heads: int
  mlp_dim: int
  head_dim: int | None = None
  tied: bool = True
  interleaved: bool = False
  theta: float = 1e4
  epsilon: float = 1e-5
  dtype: Any = jnp.float32
  rotations: tuple[Rotation | None, ...] | None = None
  windows: tuple[int | None, ...] | None = None
  activation: str = 'silu'
  qkv_bias: bool = False
  out_bias: bool = False
  mlp_bias: bool = False
  norm: str = 'rms'
  norm_order: str = 'before'
  qk_norm: str | None = None
  embedding_scale: float = 1.0
  residual_scale: float = 1.0
  attention_scale: float | None = None
  attention_cap: float | None = None
  logits_scale: float = 1.0
  logits_cap: float | None = None
  head: bool = True

  @nn.compact
  def __call__(self, tokens: Array, mask: Array | None = None) -> Array:
    """Logits; positions where `mask` (B, T) is 0 are padding that none sees."""
    self._check()
    embedding = nn.Embed(
      self.vocabulary, self.width, dtype=self.dtype, name='embedding'
    )
    x = embedding(tokens)
    if self.embedding_scale != 1:
      x = x * jnp.asarray(self.embedding_scale, x.dtype)
    for i in range(self.depth):
      x = LlamaBlock(self._block_options(i), name=f'block_{i}')(x, mask)
    x = _norm(self, 'norm')(x)
    if not self.head:
      return x.astype(jnp.float32)
    if self.tied:
      y = embedding.attend(x).astype(jnp.float32)
    else:
      y = nn.Dense(
        self.vocabulary, use_bias=False, dtype=self.dtype, name='head'
      )(x).astype(jnp.float32)
    if self.logits_scale != 1:
      y = y * self.logits_scale
    return y if self.logits_cap is None else _capped(y, self.logits_cap)

  def _block_options(self, i: int) -> LlamaOptions:
    head_dim = self.head_dim or self.width // self.heads
    same = dataclasses.fields(LlamaOptions)
    read = {
      f.name: getattr(self, f.name) for f in same if hasattr(self, f.name)
    }
    if self.rotations is None:
      rotation: Rotation | None = Rotation.plain(self.theta, head_dim)
    else:
      rotation = self.rotations[i]
    return LlamaOptions(
      **{**read, 'head_dim': head_dim},
      rotation=rotation,
      window=None if self.windows is None else self.windows[i],
    )

  def _check(self) -> None:
    if self.heads % self.kv_heads:
      raise ValueError(
        f'heads={self.heads} is no multiple of kv_heads={self.kv_heads}.'
      )
    for name, allowed in (
      ('norm', _NORMS),
      ('norm_order', _ORDERS),
      ('qk_norm', _QK_NORMS),
      ('activation', tuple(transformer_parts.ACTIVATIONS)),
    ):
      if getattr(self, name) not in allowed:
        raise ValueError(
          f'{name}={getattr(self, name)!r}; it is one of {allowed}.'
        )
    for name in ('rotations', 'windows'):
      given = getattr(self, name)
      if given is not None and len(given) != self.depth:
        raise ValueError(f'{len(given)} {name} for depth={self.depth} blocks.')


@dataclasses.dataclass(frozen=True)
class LlamaOptions:
  """What one block has: as in `Llama`, with its own rotation and window."""

  heads: int
  kv_heads: int
  head_dim: int
  mlp_dim: int
  rotation: Rotation | None
  interleaved: bool
  window: int | None
  epsilon: float
  dtype: Any
  activation: str
  qkv_bias: bool
  out_bias: bool
  mlp_bias: bool
  norm: str
  norm_order: str
  qk_norm: str | None
  residual_scale: float
  attention_scale: float | None
  attention_cap: float | None


class LlamaBlock(nn.Module):
  """Causal attention and a gated MLP; `(B, T, D)` to the same."""

  options: LlamaOptions

  @nn.compact
  def __call__(self, x: Array, mask: Array | None = None) -> Array:
    o = self.options
    mlp = transformer_parts.GatedMlp(
      o.mlp_dim,
      use_bias=o.mlp_bias,
      activation=o.activation,
      dtype=o.dtype,
      name='mlp',
    )
    x = self._residual(x, lambda y: self._attention(y, mask), 'attention_norm')
    return self._residual(x, mlp, 'mlp_norm')

  def _residual(
    self, x: Array, branch: Callable[[Array], Array], name: str
  ) -> Array:
    o = self.options
    y = x if o.norm_order == 'branch' else _norm(o, name)(x)
    y = branch(y)
    if o.norm_order != 'before':
      y = _norm(o, f'{name}_after')(y)
    return x + (y if o.residual_scale == 1 else y * o.residual_scale)

  def _attention(self, x: Array, mask: Array | None) -> Array:
    o = self.options
    dense = functools.partial(nn.DenseGeneral, dtype=o.dtype)
    project = functools.partial(dense, use_bias=o.qkv_bias)
    q = project((o.heads, o.head_dim), name='query')(x)
    k = project((o.kv_heads, o.head_dim), name='key')(x)
    v = project((o.kv_heads, o.head_dim), name='value')(x)
    if o.qk_norm is not None:
      q, k = self._qk_norm(q, 'query_norm'), self._qk_norm(k, 'key_norm')
    if o.rotation is not None:
      turn = functools.partial(
        rotate,
        angles=o.rotation.angles(jnp.arange(x.shape[1])),
        interleaved=o.interleaved,
        scale=o.rotation.scale,
      )
      q, k = turn(q), turn(k)
    y = _attend(o, q, k, v, mask)
    return dense(x.shape[-1], axis=(-2, -1), use_bias=o.out_bias, name='out')(y)

  def _qk_norm(self, x: Array, name: str) -> Array:
    if self.options.qk_norm == 'head':
      return _norm(self.options, name)(x)
    wide = x.reshape(*x.shape[:-2], -1)
    return _norm(self.options, name)(wide).reshape(x.shape)


def _norm(options: Any, name: str) -> nn.Module:
  common = {'epsilon': options.epsilon, 'dtype': options.dtype, 'name': name}
  if options.norm == 'fixed':
    return nn.LayerNorm(use_scale=False, use_bias=False, **common)
  return nn.RMSNorm(**common)


def _attend(
  o: LlamaOptions, q: Array, k: Array, v: Array, mask: Array | None
) -> Array:
  scale = o.head_dim**-0.5 if o.attention_scale is None else o.attention_scale
  if o.attention_cap is None and o.window is None and mask is None:
    return jax.nn.dot_product_attention(q, k, v, scale=scale, is_causal=True)
  k, v = (jnp.repeat(x, o.heads // o.kv_heads, axis=2) for x in (k, v))
  return transformer_parts.attend(
    q,
    k,
    v,
    scale=scale,
    cap=o.attention_cap,
    seen=seen_before(q.shape[1], o.window, mask),
  )


def seen_before(
  length: int, window: int | None = None, mask: Array | None = None
) -> Array:
  """What each position sees, `(1 or B, 1, T, T)` of booleans.

  Args:
    length: T.
    window: how many of the last positions, itself counted; None for all.
    mask: (B, T), 0 where there is padding.

  >>> seen_before(3, window=2)[0, 0].astype(int).tolist()
  [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
  """
  seen = jnp.tril(jnp.ones((length, length), bool))[None, None]
  if window is not None:
    seen &= jnp.triu(jnp.ones((length, length), bool), 1 - window)
  return seen if mask is None else seen & (mask[:, None, None] != 0)


def _capped(x: Array, cap: float) -> Array:
  return cap * jnp.tanh(x / cap)

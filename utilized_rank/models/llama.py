"""A Llama-style decoder (Touvron et al., https://arxiv.org/abs/2302.13971)."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from utilized_rank.host.extras import extra
from utilized_rank.models import transformer_parts

with extra('models'):
  import flax.linen as nn

Array = jax.Array


def rotate(x: Array, *, interleaved: bool, theta: float) -> Array:
  """Rotary positions (https://arxiv.org/abs/2104.09864) on `(B, T, H, D)`.

  Args:
    x: queries or keys; D is even.
    interleaved: pairs are neighbours (Llama's own files), not the two halves
      (Hugging Face). The same function for permuted kernels.
    theta: base of the wavelengths.

  Returns:
    The same shape and dtype, turned at position t by t times the pair's rate.

  >>> turned = rotate(jnp.ones((1, 2, 1, 2)), interleaved=True, theta=1e4)
  >>> expected = [np.cos(1) - np.sin(1), np.sin(1) + np.cos(1)]
  >>> np.allclose(turned[0, 1, 0], expected)
  True
  """
  half = x.shape[-1] // 2
  rates = theta ** (-jnp.arange(half) / half)
  angles = (jnp.arange(x.shape[1])[:, None] * rates)[:, None]
  cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
  pairs = (*x.shape[:-1], half, 2) if interleaved else (*x.shape[:-1], 2, half)
  axis = -1 if interleaved else -2
  a, b = jnp.moveaxis(x.reshape(pairs), axis, 0)
  turned = jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=axis)
  return turned.reshape(x.shape)


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
    mlp_dim: hidden width of the SwiGLU MLPs.
    head_dim: width of a head, or None for `width // heads`.
    tied: the output shares the embedding's table.
    interleaved: see `rotate`.
    theta: see `rotate`.
    epsilon: of the RMS norms.
    dtype: type of the computation.

  Raises (when called):
    ValueError: `heads` is no multiple of `kv_heads`.
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

  @nn.compact
  def __call__(self, tokens: Array) -> Array:
    if self.heads % self.kv_heads:
      raise ValueError(
        f'heads={self.heads} is no multiple of kv_heads={self.kv_heads}.'
      )
    embedding = nn.Embed(
      self.vocabulary, self.width, dtype=self.dtype, name='embedding'
    )
    x = embedding(tokens)
    for i in range(self.depth):
      x = LlamaBlock(
        self.heads,
        self.kv_heads,
        self.head_dim or self.width // self.heads,
        self.mlp_dim,
        self.interleaved,
        self.theta,
        self.epsilon,
        self.dtype,
        name=f'block_{i}',
      )(x)
    x = nn.RMSNorm(epsilon=self.epsilon, dtype=self.dtype, name='norm')(x)
    if self.tied:
      return embedding.attend(x).astype(jnp.float32)
    return nn.Dense(
      self.vocabulary, use_bias=False, dtype=self.dtype, name='head'
    )(x).astype(jnp.float32)


class LlamaBlock(nn.Module):
  """Causal rotary attention and a gated MLP; `(B, T, D)` to the same.

  Attributes: as in `Llama`.
  """

  heads: int
  kv_heads: int
  head_dim: int
  mlp_dim: int
  interleaved: bool
  theta: float
  epsilon: float
  dtype: Any

  @nn.compact
  def __call__(self, x: Array) -> Array:
    norm = functools.partial(nn.RMSNorm, epsilon=self.epsilon, dtype=self.dtype)
    dense = functools.partial(nn.DenseGeneral, use_bias=False, dtype=self.dtype)
    turn = functools.partial(
      rotate, interleaved=self.interleaved, theta=self.theta
    )
    y = norm(name='attention_norm')(x)
    q = turn(dense((self.heads, self.head_dim), name='query')(y))
    k = turn(dense((self.kv_heads, self.head_dim), name='key')(y))
    v = dense((self.kv_heads, self.head_dim), name='value')(y)
    y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    x = x + dense(x.shape[-1], axis=(-2, -1), name='out')(y)
    y = norm(name='mlp_norm')(x)
    return x + transformer_parts.SwiGLU(
      self.mlp_dim, use_bias=False, dtype=self.dtype, name='mlp'
    )(y)

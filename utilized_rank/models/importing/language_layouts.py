"""Layouts of language models; see `layout`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
import functools
from typing import Any

from utilized_rank.models.importing import by_shape
from utilized_rank.models.importing.layouts import Convert
from utilized_rank.models.importing.layouts import Layout
from utilized_rank.models.importing.layouts import Rule
from utilized_rank.models.importing.layouts import Shapes
from utilized_rank.models.importing.layouts import Usual
from utilized_rank.models.importing.layouts import dense
from utilized_rank.models.importing.layouts import fused
from utilized_rank.models.importing.layouts import norm
from utilized_rank.models.importing.layouts import one_more
from utilized_rank.models.importing.layouts import same
from utilized_rank.models.importing.layouts import transposed

_PARTS = ('query', 'key', 'value', 'out')
_MLP_PARTS = ('gate', 'up', 'down')
_GPT_QKV = [
  f'block_#/MultiHeadDotProductAttention_1/{name}' for name in _PARTS[:3]
]


def _decoder(
  shapes: Shapes,
  root: str,
  norms: Mapping[str, str],
  scale: Convert = same,
) -> Iterable[Rule]:
  """Of Hugging Face: what its decoders call the same.

  Args:
    shapes: of the file.
    root: `'model.'` below a head, else `''`.
    norms: theirs to ours, of a block.
    scale: of the norms.
  """
  block, ours = f'{root}layers.#.', 'block_#/'
  yield Rule(f'{root}embed_tokens.weight', 'embedding/embedding', same)
  for name in _PARTS:
    yield from dense(f'{block}self_attn.{name[0]}_proj', f'{ours}{name}')
  out = shapes.get(f'{root}layers.0.self_attn.o_proj.weight')
  qkv = shapes.get(f'{root}layers.0.self_attn.qkv_proj.weight')
  if out and qkv:
    keys = (qkv[0] - out[1]) // 2
    yield from fused(
      f'{block}self_attn.qkv_proj',
      [f'{ours}{name}' for name in _PARTS[:3]],
      (out[1], keys, keys),
    )
  for name in _MLP_PARTS:
    yield from dense(f'{block}mlp.{name}_proj', f'{ours}mlp/{name}')
  gated = [f'{ours}mlp/{name}' for name in _MLP_PARTS[:2]]
  yield from fused(f'{block}mlp.gate_up_proj', gated)
  for letter, name in (('q', 'query'), ('k', 'key')):
    yield from norm(
      f'{block}self_attn.{letter}_norm', f'{ours}{name}_norm', scale
    )
  for theirs, name in norms.items():
    yield from norm(f'{block}{theirs}', f'{ours}{name}', scale)
  yield from norm(f'{root}norm', 'norm', scale)
  if root:
    yield Rule('lm_head.weight', 'head/kernel', transposed)


def _conv1d(pattern: str, path: str) -> list[Rule]:
  """GPT-2's layers are (in, out) already."""
  return dense(pattern, path, same)


def _gpt(shapes: Shapes, root: str) -> Iterable[Rule]:
  """GPT-2 and minGPT: the same names, the first one's matrices transposed."""
  block, ours = f'{root}h.#.', 'block_#/'
  attention, mlp = f'{ours}MultiHeadDotProductAttention_1', f'{ours}MlpBlock_3'
  rows, columns = shapes.get(f'{root}h.0.attn.c_attn.weight', (0, 0))[:2]
  if rows == 3 * columns:
    layer: Callable[..., list[Rule]] = dense
    yield from fused(f'{block}attn.c_attn', _GPT_QKV)
  else:
    layer = _conv1d
    for rule in fused(f'{block}attn.c_attn', _GPT_QKV):
      kernel = rule.path.endswith('kernel')
      yield rule._replace(convert=_turned(rule.convert)) if kernel else rule
  yield Rule(f'{root}wte.weight', 'embedding/embedding', same)
  yield Rule(f'{root}wpe.weight', 'positions', same)
  yield from norm(f'{block}ln_1', f'{ours}LayerNorm_0')
  yield from layer(f'{block}attn.c_proj', f'{attention}/out')
  yield from norm(f'{block}ln_2', f'{ours}LayerNorm_2')
  yield from layer(f'{block}mlp.c_fc', f'{mlp}/Dense_0')
  yield from layer(f'{block}mlp.c_proj', f'{mlp}/Dense_1')
  yield from norm(f'{root}ln_f', 'norm')
  yield Rule('lm_head.weight', 'head/kernel', transposed)


def _turned(convert: Convert) -> Convert:
  return lambda x: convert(x.T)


def _bert(shapes: Shapes) -> Iterable[Rule]:
  block, ours = 'encoder.layer.#.', 'block_#/'
  attention = f'{ours}MultiHeadDotProductAttention_1'
  for root in ('', 'bert.'):
    yield Rule(
      f'{root}embeddings.word_embeddings.weight', 'embedding/embedding', same
    )
    yield Rule(
      f'{root}embeddings.position_embeddings.weight', 'positions', same
    )
    yield Rule(
      f'{root}embeddings.token_type_embeddings.weight', 'types/embedding', same
    )
    yield Rule(f'{root}embeddings.position_ids', '', same)
    for leaf in (('weight', 'bias'), ('gamma', 'beta')):  # new files, old files
      for theirs, place in (
        ('embeddings', 'embedding_norm'),
        (f'{block}attention.output', f'{ours}LayerNorm_0'),
        (f'{block}output', f'{ours}LayerNorm_2'),
      ):
        for name, our in zip(leaf, ('scale', 'bias'), strict=True):
          yield Rule(f'{root}{theirs}.LayerNorm.{name}', f'{place}/{our}', same)
    for name in _PARTS[:3]:
      yield from dense(
        f'{root}{block}attention.self.{name}', f'{attention}/{name}'
      )
    yield from dense(f'{root}{block}attention.output.dense', f'{attention}/out')
    yield from dense(
      f'{root}{block}intermediate.dense', f'{ours}MlpBlock_3/Dense_0'
    )
    yield from dense(f'{root}{block}output.dense', f'{ours}MlpBlock_3/Dense_1')
    # Features are of all tokens: the layer on the first is for classes.
    used = 'pooler' if 'classifier.weight' in shapes else None
    for rule in dense(f'{root}pooler.dense', 'pooler'):
      yield rule if used else rule._replace(path='')
  yield from dense('classifier', 'head')
  root = 'cls.predictions.'
  yield from dense(f'{root}transform.dense', 'pre_logits')
  yield from norm(f'{root}transform.LayerNorm', 'pre_logits_norm')
  yield Rule(f'{root}bias', 'logits_bias', same)
  # The embedding's table and that bias again.
  yield Rule(f'{root}decoder.weight', '', same)
  yield Rule(f'{root}decoder.bias', '', same)
  if f'{root}bias' in shapes:  # beside it, whether sentences follow
    yield Rule('cls.seq_relationship.weight', '', same)
    yield Rule('cls.seq_relationship.bias', '', same)


def _distilbert(shapes: Shapes) -> Iterable[Rule]:
  del shapes
  ours = 'block_#/'
  attention = f'{ours}MultiHeadDotProductAttention_1'
  for root in ('', 'distilbert.'):
    block = f'{root}transformer.layer.#.'
    yield Rule(
      f'{root}embeddings.word_embeddings.weight', 'embedding/embedding', same
    )
    yield Rule(
      f'{root}embeddings.position_embeddings.weight', 'positions', same
    )
    yield from norm(f'{root}embeddings.LayerNorm', 'embedding_norm')
    for name in _PARTS:
      theirs = f'{name[0]}_lin' if name != 'out' else 'out_lin'
      yield from dense(f'{block}attention.{theirs}', f'{attention}/{name}')
    yield from norm(f'{block}sa_layer_norm', f'{ours}LayerNorm_0')
    for i in (1, 2):
      yield from dense(f'{block}ffn.lin{i}', f'{ours}MlpBlock_3/Dense_{i - 1}')
    yield from norm(f'{block}output_layer_norm', f'{ours}LayerNorm_2')
  yield from dense('pre_classifier', 'pooler')
  yield from dense('classifier', 'head')
  yield from dense('vocab_transform', 'pre_logits')
  yield from norm('vocab_layer_norm', 'pre_logits_norm')
  yield Rule('vocab_projector.weight', '', same)
  yield Rule('vocab_projector.bias', 'logits_bias', same)


_BEFORE = {
  'input_layernorm': 'attention_norm',
  'post_attention_layernorm': 'mlp_norm',
}
_BOTH = {
  'input_layernorm': 'attention_norm',
  'post_attention_layernorm': 'attention_norm_after',
  'pre_feedforward_layernorm': 'mlp_norm',
  'post_feedforward_layernorm': 'mlp_norm_after',
}
_ROTARY = (r'.*\.rotary_emb\.inv_freq',)
# Llama's names are also those of other models.
_LIKE_LLAMA = {
  'theta': Usual(1e4, '5e5 in Llama 3, 1e6 in Qwen'),
  'epsilon': Usual(1e-6, '1e-5'),
  'activation': Usual('silu', "'gelu_tanh' in Gemma"),
  'interleaved': Usual(False, 'True in Helium and Ernie'),
  'embedding_scale': Usual(1.0, 'sqrt(width) in Gemma, others in Granite'),
  'residual_scale': Usual(1.0, 'others in Granite'),
  'attention_scale': Usual(None, 'others in Granite'),
  'logits_scale': Usual(1.0, 'others in Granite'),
}


def _decoders(
  name: str,
  types: tuple[str, ...],
  norms: Mapping[str, str],
  scale: Convert = same,
  projection: str = 'q_proj',
  **more: Any,
) -> Iterable[Layout]:
  """A layout below a head, and one of the same model without."""
  for root, kind in (('model.', ''), ('', 'headless ')):
    yield Layout(
      f'{kind}{name} of Hugging Face',
      (f'{root}layers.0.self_attn.{projection}.weight',),
      functools.partial(_decoder, root=root, norms=norms, scale=scale),
      by_shape.llama,
      ignored=_ROTARY,
      model_types=types,
      **more,
    )


LAYOUTS = (
  *_decoders(
    'Llama',
    (
      'llama',
      'mistral',
      'qwen2',
      'qwen3',
      'granite',
      'helium',
      'smollm3',
      'ernie4_5',
    ),
    _BEFORE,
    assumed=_LIKE_LLAMA,
  ),
  *_decoders('Gemma', ('gemma',), _BEFORE, one_more, by_config=True),
  *_decoders(
    'Gemma 2 and 3', ('gemma2', 'gemma3_text'), _BOTH, one_more, by_config=True
  ),
  *_decoders(
    'OLMo 2',
    ('olmo2',),
    {
      'post_attention_layernorm': 'attention_norm_after',
      'post_feedforward_layernorm': 'mlp_norm_after',
    },
    by_config=True,
  ),
  *_decoders('OLMo', ('olmo',), {}, by_config=True),
  *_decoders(
    'Phi-3', ('phi3',), _BEFORE, projection='qkv_proj', by_config=True
  ),
  Layout(
    'GPT-2 or minGPT',
    ('transformer.h.0.attn.c_attn.weight',),
    functools.partial(_gpt, root='transformer.'),
    by_shape.gpt,
    ignored=(r'transformer\.h\.\d+\.attn\.(masked_)?bias',),
    model_types=('gpt2',),
    assumed={'activation': Usual('gelu_tanh', "'gelu' in nanoGPT")},
  ),
  Layout(
    'headless GPT-2',
    ('h.0.attn.c_attn.weight',),
    functools.partial(_gpt, root=''),
    by_shape.gpt,
    ignored=(r'h\.\d+\.attn\.(masked_)?bias',),
    model_types=('gpt2',),
    assumed={'activation': Usual('gelu_tanh', "'gelu' in nanoGPT")},
  ),
  Layout(
    'BERT',
    (
      'bert.encoder.layer.0.attention.self.query.weight',
      'encoder.layer.0.attention.self.query.weight',
    ),
    _bert,
    by_shape.bert,
    model_types=('bert',),
    by_config=True,
  ),
  Layout(
    'DistilBERT',
    (
      'distilbert.transformer.layer.0.attention.q_lin.weight',
      'transformer.layer.0.attention.q_lin.weight',
    ),
    _distilbert,
    by_shape.bert,
    model_types=('distilbert',),
    by_config=True,
  ),
)

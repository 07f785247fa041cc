"""Language models of transformers, saved by themselves, and ours.

Random weights at small sizes, float32; each directory is what
`save_pretrained` writes, and the config in it is all that is said. A second
batch has padding under an attention mask. Prints each difference (`-s`).
"""

import pytest

torch = pytest.importorskip('torch')

import originals  # noqa: E402 (torchvision is imported as it can be)

transformers = pytest.importorskip('transformers')

import jax  # noqa: E402
import numpy as np  # noqa: E402

from utilized_rank.models.importing import load_checkpoint  # noqa: E402

pytestmark = pytest.mark.filterwarnings('ignore')

# Issue 22's bar, of the largest output.
BAR = 1e-4
SMALL = {**originals.GROUPED, 'num_hidden_layers': 4}
GPT2 = originals.GPT2
BERT = {
  'vocab_size': 50,
  'hidden_size': 32,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'intermediate_size': 48,
  'max_position_embeddings': 64,
  'pad_token_id': None,
}
DISTIL = {
  'vocab_size': 50,
  'dim': 32,
  'n_layers': 2,
  'n_heads': 4,
  'hidden_dim': 48,
  'max_position_embeddings': 64,
  'pad_token_id': None,
}


def rope(kind, theta=1e4, **more):
  return {'rope_parameters': {'rope_type': kind, 'rope_theta': theta, **more}}


LLAMA_3 = rope(
  'llama3',
  5e5,
  factor=8.0,
  low_freq_factor=1.0,
  high_freq_factor=4.0,
  original_max_position_embeddings=16,
)
YARN = rope('yarn', factor=4.0, original_max_position_embeddings=16)
SLIDING = {'use_sliding_window': True, 'sliding_window': 5}
GEMMA = {'head_dim': 16, 'query_pre_attn_scalar': 20, 'sliding_window': 5}
GRANITE = {
  'embedding_multiplier': 12.0,
  'logits_scaling': 8.0,
  'residual_multiplier': 0.22,
  'attention_multiplier': 0.1,
}
DECODERS = [
  ('Llama', {}),
  ('Llama', rope('default', 5e5)),
  ('Llama', {**LLAMA_3, 'head_dim': 16, 'attention_bias': True}),
  ('Llama', {**YARN, 'mlp_bias': True}),
  ('Llama', rope('linear', factor=4.0)),
  ('Mistral', {'sliding_window': 5}),
  ('Qwen2', {}),
  ('Qwen2', {**SLIDING, 'max_window_layers': 2}),
  ('Qwen3', {'head_dim': 16}),
  ('Gemma', {'head_dim': 16}),
  ('Gemma2', GEMMA),
  ('Gemma3Text', {**GEMMA, 'num_hidden_layers': 7}),
  ('Phi3', {}),
  ('Phi3', {'partial_rotary_factor': 0.5}),
  ('Olmo', {}),
  ('Olmo2', {}),
  ('Granite', GRANITE),
  ('Helium', {'head_dim': 8}),
  ('SmolLM3', {}),
  ('Ernie4_5', {'head_dim': 8, 'use_bias': True}),
]
CASES = [
  *((name, 'ForCausalLM', {**SMALL, **more}) for name, more in DECODERS),
  ('Llama', 'Model', SMALL),
  ('Qwen2', 'Model', SMALL),
  ('GPT2', 'LMHeadModel', GPT2),
  ('GPT2', 'Model', GPT2),
  (
    'GPT2',
    'LMHeadModel',
    {**GPT2, 'n_inner': 40, 'activation_function': 'gelu'},
  ),
  ('Bert', 'Model', BERT),
  ('Bert', 'ForMaskedLM', BERT),
  ('Bert', 'ForSequenceClassification', BERT),
  ('Bert', 'ForPreTraining', BERT),
  ('DistilBert', 'Model', DISTIL),
  ('DistilBert', 'ForMaskedLM', DISTIL),
  ('DistilBert', 'ForSequenceClassification', DISTIL),
]


def output(found):
  for name in ('logits', 'prediction_logits', 'last_hidden_state'):
    if hasattr(found, name):
      return getattr(found, name).numpy()
  raise AssertionError(f'no output among {list(found)}')


@pytest.mark.parametrize(('name', 'kind', 'sizes'), CASES, ids=str)
def test_the_saved_directory_gives_the_same(name, kind, sizes, tmp_path):
  config = getattr(transformers, f'{name}Config')(**sizes)
  module = (
    name if hasattr(transformers, name + kind) else name.removesuffix('Text')
  )
  model = originals.randomise(getattr(transformers, module + kind)(config))
  model.save_pretrained(tmp_path)
  ours, variables, imported = load_checkpoint(tmp_path)
  assert imported.assumed == {}
  tokens = np.random.default_rng(0).integers(0, 50, (2, 12))
  mask = np.ones((2, 12), int)
  mask[1, 9:] = 0
  run = jax.jit(ours.apply)
  for given, more in (
    ((tokens,), {}),
    ((tokens, mask), {'attention_mask': mask}),
  ):
    with torch.no_grad():
      more = {k: torch.from_numpy(x) for k, x in more.items()}
      expected = output(model(torch.from_numpy(tokens), **more))
    actual = np.asarray(run(variables, *given))
    assert actual.shape == expected.shape
    assert np.std(expected) > 1e-2
    difference = abs(actual - expected)
    if more and actual.ndim == 3:  # what padding itself becomes is no output
      difference = difference[mask.astype(bool)]
    found = difference.max() / abs(expected).max()
    print(f'transformers {name}{kind} {sizes}: {found:.1e}')
    assert found < BAR


@pytest.mark.parametrize('name', ['Cohere', 'StableLm', 'Starcoder2', 'Gemma3'])
def test_other_models_are_refused(name, tmp_path):
  """Also those whose tensors have the names and shapes of a Llama."""
  config = getattr(transformers, f'{name}Config')()
  config.save_pretrained(tmp_path)
  torch.save(
    {'model.layers.0.self_attn.q_proj.weight': torch.ones(2, 2)},
    tmp_path / 'pytorch_model.bin',
  )
  with pytest.raises(ValueError, match='which is not known here'):
    load_checkpoint(tmp_path)

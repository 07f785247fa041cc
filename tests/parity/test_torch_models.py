"""Models of transformers through `utilized_rank.torch`, and back.

Needs the extras `parity` and `torch`. Random weights, float32; prints each
difference (`-s`).
"""

import jax
import numpy as np
import pytest

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

import utilized_rank as ur  # noqa: E402
from utilized_rank.torch.module import from_module  # noqa: E402
from utilized_rank.torch.module import to_module  # noqa: E402

pytestmark = pytest.mark.filterwarnings('ignore')

# Of the largest output: what float32 sums in another order make of two layers.
BAR = 5e-6

T = transformers
VIT = {
  'hidden_size': 24,
  'intermediate_size': 48,
  'num_hidden_layers': 2,
  'num_attention_heads': 2,
  'image_size': 32,
  'patch_size': 8,
}
MODELS = {
  'Swin': {
    'image_size': 32,
    'patch_size': 4,
    'embed_dim': 16,
    'depths': [1, 1],
    'num_heads': [2, 2],
    'window_size': 4,
  },
  'ConvNext': {'hidden_sizes': [16, 24], 'depths': [1, 1], 'num_stages': 2},
  'ResNet': {'embedding_size': 8, 'hidden_sizes': [8, 16], 'depths': [1, 1]},
  'SiglipVision': VIT,
  'DINOv3ViT': VIT,
  'LlamaFor': {
    'hidden_size': 24,
    'intermediate_size': 48,
    'num_hidden_layers': 2,
    'num_attention_heads': 4,
    'num_key_value_heads': 2,
    'vocab_size': 100,
  },
  'GPT2LMHead': {'n_embd': 24, 'n_layer': 2, 'n_head': 2, 'vocab_size': 100},
  'Mamba': {
    'hidden_size': 24,
    'num_hidden_layers': 2,
    'vocab_size': 100,
    'state_size': 4,
  },
  'Bert': {
    'hidden_size': 24,
    'intermediate_size': 48,
    'num_hidden_layers': 2,
    'num_attention_heads': 2,
    'vocab_size': 100,
  },
}
KINDS = {
  'LlamaFor': ('LlamaForCausalLM', 'LlamaConfig'),
  'GPT2LMHead': ('GPT2LMHeadModel', 'GPT2Config'),
}
IMAGES = {'Swin', 'ConvNext', 'ResNet', 'SiglipVision', 'DINOv3ViT'}


def first(outputs):
  return outputs.get('logits', outputs.get('last_hidden_state'))


def batch_of(name):
  rng = np.random.default_rng(0)
  if name in IMAGES:
    return {'pixel_values': rng.normal(size=(4, 3, 32, 32)).astype(np.float32)}
  return {
    'input_ids': rng.integers(0, 90, (4, 9)),
    'attention_mask': np.ones((4, 9), int),
  }


def output(module, batch):
  with torch.no_grad():
    return first(module(**{k: torch.from_numpy(v) for k, v in batch.items()}))


def difference(got, want):
  got, want = np.asarray(got), np.asarray(want)
  return np.abs(got - want).max() / np.abs(want).max()


@pytest.mark.parametrize('name', MODELS)
def test_there_and_back(name):
  torch.manual_seed(0)
  model, config = KINDS.get(name, (f'{name}Model', f'{name}Config'))
  module = getattr(T, model)(getattr(T, config)(**MODELS[name])).eval()
  batch = batch_of(name)
  fn, params = from_module(module, output=first)
  there = difference(jax.jit(fn)(params, batch), output(module, batch))
  moments = ur.collect(fn, params, [batch], progress=False)
  ranks = ur.uniform_ranks(params, moments, params_fraction=0.5)
  small = ur.factorize(params, moments, ranks, progress=False)
  new = to_module(module, small)
  back = difference(output(new, batch), ur.low_rank(fn)(small, batch))
  print(f'{name}: there {there:.1e}, back {back:.1e}, {len(ranks)} pairs')
  assert max(there, back) < BAR

"""Tiny checkpoints of Hugging Face's Llama, written by hand."""

import json

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

BFLOAT16 = ml_dtypes.bfloat16
CONFIG = {
  'architectures': ['LlamaForCausalLM'],
  'model_type': 'llama',
  'hidden_act': 'silu',
  'rms_norm_eps': 1e-5,
  'rope_theta': 1e4,
}


def state(
  depth=3, width=16, heads=4, kv_heads=2, mlp_dim=24, vocabulary=19, seed=0
):
  """(config, tensors) of random weights, float32."""
  rng = np.random.default_rng(seed)
  draw = lambda *shape: rng.normal(scale=shape[-1] ** -0.5, size=shape).astype(
    np.float32
  )
  keys = width // heads * kv_heads
  ones = lambda: 1 + 0.1 * draw(width)
  tensors = {
    'model.embed_tokens.weight': draw(vocabulary, width) * width**0.5,
    'model.norm.weight': ones(),
    'lm_head.weight': draw(vocabulary, width),
  }
  for i in range(depth):
    block = f'model.layers.{i}.'
    tensors |= {
      f'{block}input_layernorm.weight': ones(),
      f'{block}post_attention_layernorm.weight': ones(),
      f'{block}self_attn.q_proj.weight': draw(width, width),
      f'{block}self_attn.k_proj.weight': draw(keys, width),
      f'{block}self_attn.v_proj.weight': draw(keys, width),
      f'{block}self_attn.o_proj.weight': draw(width, width),
      f'{block}mlp.gate_proj.weight': draw(mlp_dim, width),
      f'{block}mlp.up_proj.weight': draw(mlp_dim, width),
      f'{block}mlp.down_proj.weight': draw(width, mlp_dim),
    }
  config = {
    **CONFIG,
    'vocab_size': vocabulary,
    'hidden_size': width,
    'intermediate_size': mlp_dim,
    'num_hidden_layers': depth,
    'num_attention_heads': heads,
    'num_key_value_heads': kv_heads,
  }
  return config, tensors


def write(folder, shards=1, dtype=np.float32, **sizes):
  """Writes a directory as Hugging Face has it; `shards` files and an index."""
  config, tensors = state(**sizes)
  write_state(folder, config, tensors, shards, dtype)


def write_state(folder, config, tensors, shards=1, dtype=np.float32):
  folder.mkdir()
  (folder / 'config.json').write_text(json.dumps(config))
  (folder / 'tokenizer.json').write_text('{}')
  tensors = {k: v.astype(dtype) for k, v in tensors.items()}
  names = sorted(tensors)
  if shards == 1:
    save_file(tensors, folder / 'model.safetensors', {'format': 'pt'})
    return
  where = {}
  for i in range(shards):
    file = f'model-{i + 1:05d}-of-{shards:05d}.safetensors'
    some = {name: tensors[name] for name in names[i::shards]}
    save_file(some, folder / file, {'format': 'pt'})
    where |= dict.fromkeys(some, file)
  index = {'metadata': {}, 'weight_map': where}
  (folder / 'model.safetensors.index.json').write_text(json.dumps(index))

"""What the configs of Hugging Face's vision models say as our options."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from utilized_rank.models.importing.config import Config

Facts = dict[str, Any]


def _common(c: Config, epsilon: float, activation: str = 'gelu') -> Facts:
  """What all have; biases are told by the shapes."""
  c.skip('num_hidden_layers', 'qkv_bias', 'mlp_ratio', 'use_swiglu_ffn')
  c.skip('tie_word_embeddings')
  return {
    'heads': c('num_attention_heads'),
    'activation': c.activation(default=activation),
    'epsilon': c('layer_norm_eps', epsilon),
  }


def _vit(c: Config) -> Facts:
  c.skip('pooler_output_size', 'pooler_act', 'use_mask_token')
  return _common(c, 1e-12)


def _dinov2(c: Config) -> Facts:
  c.skip('layerscale_value', 'use_mask_token', 'apply_layernorm')
  c.skip('reshape_hidden_states', '_out_features', '_out_indices')
  c.skip('out_features', 'out_indices', 'stage_names', 'num_register_tokens')
  return _common(c, 1e-6)


def _clip(c: Config) -> Facts:
  if c.values['model_type'] == 'clip':
    c.skip('text_config', 'tie_word_embeddings', 'text_config_dict')
    c.skip('vision_config_dict')
    inner = c.inside('vision_config')
    found = _clip_vision(inner)
    inner.finish()
    return found
  return _clip_vision(c)


def _clip_vision(c: Config) -> Facts:
  c.default('num_attention_heads', 12)
  return {**_common(c, 1e-5, 'quick_gelu'), 'pool': 'token'}


FACTS: dict[str, Callable[[Config], Facts]] = {
  'clip': _clip,
  'clip_vision_model': _clip,
  'dinov2': _dinov2,
  'dinov2_with_registers': _dinov2,
  'vit': _vit,
}

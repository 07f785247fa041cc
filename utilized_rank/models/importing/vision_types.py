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


def _vit(c: Config, pool: str = 'token', epsilon: float = 1e-12) -> Facts:
  c.skip('pooler_output_size', 'pooler_act', 'use_mask_token')
  return {**_common(c, epsilon), 'pool': pool}


def _vit_mae(c: Config) -> Facts:
  c.skip('norm_pix_loss', 'mask_ratio')  # of the decoder and of training
  c.skip(*(key for key in c.values if key.startswith('decoder_')))
  return _vit(c)


def _deit(c: Config) -> Facts:
  teacher = 'WithTeacher' in ''.join(c('architectures', None) or ())
  return {**_vit(c), 'distilled': 'average' if teacher else 'token'}


def _beit(c: Config) -> Facts:
  c.only('use_shared_relative_position_bias', False)
  c.skip('use_absolute_position_embeddings', 'use_relative_position_bias')
  c.skip('layer_scale_init_value', 'pool_scales', 'add_fpn', 'out_indices')
  c.skip(*(key for key in c.values if key.startswith('auxiliary_')))
  c.skip('semantic_loss_ignore_index', 'use_auxiliary_head')
  c.skip(*_BACKBONE)
  mean = c('use_mean_pooling', True)
  return _vit(c, 'gap' if mean else 'token')


_BACKBONE = (
  'apply_layernorm',
  'reshape_hidden_states',
  '_out_features',
  '_out_indices',
  'out_features',
  'out_indices',
  'stage_names',
)


def _dinov2(c: Config) -> Facts:
  c.skip('layerscale_value', 'use_mask_token', 'num_register_tokens')
  c.skip(*_BACKBONE)
  return {**_common(c, 1e-6), 'pool': None}  # the head says which


def _dinov3(c: Config) -> Facts:
  c.skip('layerscale_value', 'num_register_tokens', 'use_gated_mlp')
  # Biases are told by the shapes; positions move in training alone.
  c.skip('query_bias', 'key_bias', 'value_bias', 'proj_bias', 'mlp_bias')
  c.skip('pos_embed_shift', 'pos_embed_jitter', 'pos_embed_rescale')
  c.skip(*_BACKBONE)
  found = _common(c, 1e-5)
  return {
    **found,
    'gate_activation': found['activation'],
    'pool': 'token',
    'rope': {'theta': float(c('rope_theta', 100.0)), 'centered': True},
    'input_size': _side(c),
  }


def _side(c: Config, key: str = 'image_size', default: int = 224) -> int:
  size = c(key, default)
  if not isinstance(size, int):
    if len(set(size)) > 1:
      raise ValueError(f'{c.source} has {key} {size}, which is no square.')
    size = size[0]
  return size


def _aimv2(c: Config) -> Facts:
  c.only('is_native', False)
  c.skip('use_head', 'mlp_bias', 'num_hidden_layers', 'qkv_bias')
  return {
    'heads': c('num_attention_heads', 8),
    'gate_activation': c.activation(default='silu'),
    'epsilon': c('rms_norm_eps', 1e-5),
    'pool': 'none',
  }


def _tower(read: Callable[[Config], Facts]) -> Callable[[Config], Facts]:
  """Of a model of images and text that of the images."""

  def facts(c: Config) -> Facts:
    if c.values['model_type'] not in ('clip', 'siglip', 'siglip2'):
      return read(c)
    c.skip('text_config', 'text_config_dict', 'vision_config_dict')
    c.skip('tie_word_embeddings')
    inner = c.inside('vision_config')
    found = read(inner)
    inner.finish()
    return found

  return facts


def _clip(c: Config) -> Facts:
  c.default('num_attention_heads', 12)
  return {**_common(c, 1e-5, 'quick_gelu'), 'pool': 'token'}


def _siglip(c: Config) -> Facts:
  c.default('num_attention_heads', 12)
  c.skip('num_patches')
  head = c('vision_use_head', True)
  return {
    **_common(c, 1e-6, 'gelu_pytorch_tanh'),
    'pool': 'map' if head else 'none',
  }


def _convnext(c: Config) -> Facts:
  c.skip('num_stages', 'hidden_sizes', 'depths', 'layer_scale_init_value')
  c.skip('tie_word_embeddings', *_BACKBONE)
  return {
    'activation': c.activation(),
    'last_epsilon': c('layer_norm_eps', 1e-12),
  }


def _swin(c: Config) -> Facts:
  # The norms of the patches and of the mergings have it whatever is said.
  c.only('layer_norm_eps', 1e-5)
  c.only('use_absolute_embeddings', False)
  # Told by the shapes, windows by their tables of positions.
  c.skip('embed_dim', 'depths', 'num_heads', 'window_size', 'mlp_ratio')
  c.skip('num_layers', 'qkv_bias', 'tie_word_embeddings', 'path_norm')
  c.skip(*_BACKBONE)
  return {
    'activation': c.activation(),
    'epsilon': 1e-5,
    'input_size': _side(c),
  }


def _swinv2(c: Config) -> Facts:
  # No shape says windows; the image's side at a resolution is the most.
  depths = c('depths', (2, 2, 6, 2))
  grid = _side(c) // _side(c, 'patch_size', 4)
  rows = [grid // 2**i for i in range(len(depths))]
  window = c('window_size', 7)
  # As the default is of four, only the first of more are read.
  trained = c('pretrained_window_sizes', (0, 0, 0, 0))
  return {
    **_swin(c),
    'windows': tuple(min(n, window) for n in rows),
    # The config says so, and not the image that is given.
    'shifted': tuple(n > window for n in rows),
    'trained_windows': tuple(trained)[: len(depths)],
  }


FACTS: dict[str, Callable[[Config], Facts]] = {
  'aimv2_vision_model': _aimv2,
  'beit': _beit,
  'clip': _tower(_clip),
  'clip_vision_model': _clip,
  'convnext': _convnext,
  'convnextv2': _convnext,
  'deit': _deit,
  'dinov2': _dinov2,
  'dinov2_with_registers': _dinov2,
  'dinov3_vit': _dinov3,
  'ijepa': lambda c: _vit(c, 'gap'),
  'siglip': _tower(_siglip),
  'siglip2': _tower(_siglip),
  'siglip2_vision_model': _siglip,
  'siglip_vision_model': _siglip,
  'swin': _swin,
  'swinv2': _swinv2,
  'vit': _vit,
  'vit_mae': _vit_mae,
  'vit_msn': lambda c: _vit(c, epsilon=1e-6),
}

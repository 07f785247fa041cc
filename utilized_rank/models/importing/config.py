"""Hugging Face's `config.json`, of which nothing may be overlooked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_REQUIRED = object()

# What changes no output of a trained model, or is told by the shapes.
_HARMLESS = """
  _attn_implementation _name_or_path _num_labels add_cross_attention
  architectures attention_dropout attention_probs_dropout_prob attn_pdrop
  auto_map begin_suppress_tokens bos_token_id cache_implementation
  chunk_size_feed_forward classifier_dropout decoder_start_token_id
  directionality drop_path_rate dropout dtype embd_pdrop encoder_stride
  eos_token_id finetuning_task gradient_checkpointing hidden_dropout
  hidden_dropout_prob hidden_size id2label image_size initializer_factor
  initializer_range intermediate_size is_composition is_encoder_decoder
  keys_to_ignore_at_inference label2id layer_norm_elementwise_affine
  logit_scale_init_value mask_token_id max_position_embeddings
  max_window_layers model_type n_ctx n_embd n_inner n_positions name_or_path
  num_channels num_key_value_heads num_labels output_attentions
  output_hidden_states pad_token_id patch_size pooler_fc_size
  pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head
  pooler_type pretraining_tp problem_type projection_dim qa_dropout
  resid_pdrop return_dict sep_token_id seq_classif_dropout summary_activation
  summary_first_dropout summary_proj_to_labels summary_type summary_use_proj
  task_specific_params tokenizer_class torch_dtype torchscript
  transformers_version type_vocab_size unk_token_id unsloth_fixed
  unsloth_version use_cache vocab_size
"""
_KNOWN = frozenset(_HARMLESS.split())

ACTIVATIONS = {
  'gelu': 'gelu',
  'gelu_python': 'gelu',
  'gelu_new': 'gelu_tanh',
  'gelu_fast': 'gelu_tanh',
  'gelu_pytorch_tanh': 'gelu_tanh',
  'quick_gelu': 'quick_gelu',
  'relu': 'relu',
  'silu': 'silu',
  'swish': 'silu',
}


class Config:
  """The keys of a config, each read or known to change nothing.

  Args:
    values: the config.
    source: where it is, for errors.
  """

  def __init__(self, values: Mapping[str, Any], source: str):
    self.values, self.source = dict(values), source
    self._read = {'model_type'}

  def __call__(self, key: str, default: Any = _REQUIRED) -> Any:
    """The value, or what the model's own config class takes where it is absent.

    Raises:
      ValueError: it is absent and there is no default.
    """
    self._read.add(key)
    if key in self.values:
      return self.values[key]
    if default is _REQUIRED:
      raise ValueError(
        f'{self.source} has no {key}; it has {sorted(self.values)}.'
      )
    return default

  def default(self, key: str, value: Any) -> None:
    """What an absent key means."""
    self.values.setdefault(key, value)

  def activation(self, key: str = 'hidden_act', default: Any = 'gelu') -> str:
    """Our name of an activation."""
    name = self(key, default)
    if name not in ACTIVATIONS:
      raise ValueError(
        f'{self.source} has {key} {name!r}; known are {sorted(ACTIVATIONS)}.'
      )
    return ACTIVATIONS[name]

  def only(self, key: str, *allowed: Any) -> None:
    """Refuses other values than those that the model can have.

    The first is what an absent key means.
    """
    value = self(key, allowed[0])
    if value not in allowed:
      raise ValueError(
        f'{self.source} has {key} {value!r}; the model here has '
        f'{" or ".join(map(repr, allowed))}.'
      )

  def skip(self, *keys: str) -> None:
    """Keys that change nothing in this model."""
    self._read.update(keys)

  def inside(self, key: str) -> Config:
    """A config within the config."""
    return Config(self(key), f'{self.source}, {key}')

  def finish(self, but: Sequence[str] = ()) -> None:
    """Refuses keys that nobody read: they may change the output."""
    left = {
      key: value
      for key, value in self.values.items()
      if key not in self._read | _KNOWN | set(but)
      and value not in (None, False)
    }
    if left:
      raise ValueError(
        f'{self.source} says {left}, of which nothing is known here for '
        f'model_type {self.values.get("model_type")!r}. Where that changes no '
        'output, give the config without it as config=.'
      )

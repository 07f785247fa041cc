"""What the configs of Hugging Face's language models say as our options.

A key that is absent means what the model's own config class in transformers 5
takes for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from utilized_rank.models.importing import vision_types
from utilized_rank.models.importing.config import Config
from utilized_rank.models.importing.rope_config import rotation

Facts = dict[str, Any]


def facts(
  values: Mapping[str, Any], source: str
) -> tuple[Facts, tuple[str, ...]]:
  """Options that a config says, and names that its model does not use.

  Args:
    values: the config; its `model_type` is known.
    source: where it is, for errors.

  Raises:
    ValueError: it has a value that our model cannot have, or a key that is not
      known.
  """
  kind = values['model_type']
  read = _FACTS.get(kind) or vision_types.FACTS.get(kind)
  if read is None:
    known = sorted({*_FACTS, *vision_types.FACTS})
    raise ValueError(
      f'{source} has model_type {kind!r}, which is not known here; known are '
      f'{", ".join(known)}.'
    )
  c = Config(values, source)
  found = read(c)
  c.finish()
  # A tied head that is in the file all the same is not what runs.
  return found, (r'(.*\.)?lm_head\.weight',) * bool(found.get('tied'))


def _decoder(
  c: Config,
  *,
  theta: float = 1e4,
  epsilon: float = 1e-6,
  tied: bool = False,
  windows: Callable[[Config, int], Sequence[int | None]] | None = None,
  activation: str = 'hidden_act',
  act: str = 'silu',
  rope: bool = True,
  **more: Any,
) -> Facts:
  """What all decoders have; the arguments are defaults of their configs."""
  heads, depth = c('num_attention_heads'), c('num_hidden_layers')
  head_dim = c('head_dim', None) or c('hidden_size') // heads
  c.skip('attention_bias', 'mlp_bias', 'use_bias')  # told by the shapes
  found = {
    'heads': heads,
    'epsilon': c('rms_norm_eps', epsilon),
    'activation': c.activation(activation, act),
    'tied': bool(c('tie_word_embeddings', tied)),
    'interleaved': False,
    'embedding_scale': 1.0,
    'residual_scale': 1.0,
    'attention_scale': None,
    'logits_scale': 1.0,
    'theta': theta,
    **more,
  }
  if rope:
    found['rotations'] = (rotation(c, head_dim, theta),) * depth
  if windows is not None:
    found['windows'] = _some(windows(c, depth))
  return found


def _some(windows: Sequence[int | None]) -> tuple[int | None, ...] | None:
  return tuple(windows) if any(windows) else None


def _everywhere(default: int | None) -> Callable[[Config, int], list[Any]]:
  return lambda c, depth: [c('sliding_window', default)] * depth


def _by_layer(
  default: Callable[[Config, int, int], bool],
) -> Callable[[Config, int], list[Any]]:
  """Windows where `layer_types` or the model's own rule says so."""

  def windows(c: Config, depth: int) -> list[int | None]:
    kinds = layer_kinds(c, depth, default)
    window = c('sliding_window', 4096)
    slides = ['sliding_attention', 'full_attention']
    if unknown := set(kinds) - set(slides):
      raise ValueError(f'{c.source} has layer_types {sorted(unknown)}.')
    return [window if kind == slides[0] else None for kind in kinds]

  return windows


def layer_kinds(
  c: Config, depth: int, default: Callable[[Config, int, int], bool]
) -> list[str]:
  given = c('layer_types', None)
  if given is not None:
    return given
  return [
    'sliding_attention' if default(c, i, depth) else 'full_attention'
    for i in range(depth)
  ]


def _qwen(c: Config, **more: Any) -> Facts:
  def late(c: Config, i: int, depth: int) -> bool:
    return i >= c('max_window_layers', 28)

  slides = c('use_sliding_window', False)
  c.skip('sliding_window', 'layer_types', 'max_window_layers')
  return _decoder(c, windows=_by_layer(late) if slides else None, **more)


def _qwen3(c: Config) -> Facts:
  c.default('head_dim', 128)
  return _qwen(c)


def _gemma(c: Config, **more: Any) -> Facts:
  c.only('use_bidirectional_attention', None, False)
  options = {
    'tied': True,
    'act': 'gelu_pytorch_tanh',
    'embedding_scale': c('hidden_size') ** 0.5,
  }
  return _decoder(c, **{**options, **more})


def _gemma1(c: Config) -> Facts:
  found = _gemma(c)
  newer = c('hidden_activation', None)
  if (
    newer is not None
    and c.activation('hidden_activation') != (found['activation'])
  ):
    raise ValueError(
      f'{c.source} has hidden_act {c("hidden_act", None)!r} and '
      f'hidden_activation {newer!r}; give activation= and a config with one.'
    )
  return found


def _gemma2(c: Config) -> Facts:
  return _gemma(
    c,
    activation='hidden_activation',
    norm_order='both',
    attention_scale=c('query_pre_attn_scalar', 256) ** -0.5,
    attention_cap=c('attn_logit_softcapping', 50.0),
    logits_cap=c('final_logit_softcapping', 30.0),
    windows=_by_layer(lambda c, i, depth: (i + 1) % 2 == 1),
  )


def _gemma3(c: Config) -> Facts:
  # transformers keeps it and does not use it: another code may.
  c.only('attn_logit_softcapping', None)
  pattern = c('sliding_window_pattern', 6)
  c.skip('_sliding_window_pattern')
  slides = lambda c, i, depth: (i + 1) % pattern != 0
  depth = c('num_hidden_layers')
  head_dim = c('head_dim', 256)
  local = c('rope_local_base_freq', 1e4)
  new = c('rope_parameters', None)
  if new and not {'full_attention', 'sliding_attention'} <= set(new):
    raise ValueError(f'{c.source} has rope_parameters for no kind of layer.')
  turns = {'full_attention': rotation(c, head_dim, 1e6, 'full_attention')}
  if new:
    kind = 'sliding_attention'
    turns[kind] = rotation(c, head_dim, 1e4, kind)
  else:
    bare = Config({'rope_theta': local}, c.source)
    turns['sliding_attention'] = rotation(bare, head_dim, local)
  return _gemma(
    c,
    activation='hidden_activation',
    norm_order='both',
    attention_scale=c('query_pre_attn_scalar', 256) ** -0.5,
    logits_cap=c('final_logit_softcapping', None),
    windows=_by_layer(slides),
    rope=False,
    rotations=tuple(turns[kind] for kind in layer_kinds(c, depth, slides)),
  )


def _smollm3(c: Config) -> Facts:
  c.skip('sliding_window', 'layer_types')
  c.only('use_sliding_window', False)
  found = _decoder(c, theta=2e6, tied=True)
  interval = c('no_rope_layer_interval', 4)
  given = c('no_rope_layers', None)
  depth = len(found['rotations'])
  # Despite its name it is 1 where positions are turned.
  turned = given or [int((i + 1) % interval != 0) for i in range(depth)]
  found['rotations'] = tuple(
    turn if used else None
    for turn, used in zip(found['rotations'], turned, strict=True)
  )
  return found


def _granite(c: Config) -> Facts:
  return _decoder(
    c,
    embedding_scale=float(c('embedding_multiplier', 1.0)),
    residual_scale=float(c('residual_multiplier', 1.0)),
    attention_scale=float(c('attention_multiplier', 1.0)),
    logits_scale=1 / c('logits_scaling', 1.0),
  )


def _olmo(c: Config) -> Facts:
  c.only('clip_qkv', None)
  return {**_decoder(c), 'norm': 'fixed', 'epsilon': 1e-5}


def _phi3(c: Config) -> Facts:
  # Of longrope alone, which is refused.
  c.skip('original_max_position_embeddings')
  return _decoder(c, epsilon=1e-5, windows=_everywhere(None))


def _ernie(c: Config) -> Facts:
  c.default('head_dim', 128)
  return _decoder(c, theta=5e5, epsilon=1e-5, tied=True, interleaved=True)


def _gpt2(c: Config) -> Facts:
  for key, value in (
    ('scale_attn_weights', True),
    ('scale_attn_by_inverse_layer_idx', False),
    ('add_cross_attention', False),
  ):
    c.only(key, value)
  c.skip('n_layer', 'reorder_and_upcast_attn')
  return {
    'heads': c('n_head'),
    'activation': c.activation('activation_function', 'gelu_new'),
    'epsilon': c('layer_norm_epsilon', 1e-5),
    'tied': bool(c('tie_word_embeddings', True)),
  }


def _bert(c: Config) -> Facts:
  c.only('position_embedding_type', 'absolute')
  c.only('is_decoder', False)
  c.only('tie_word_embeddings', True)
  c.skip('num_hidden_layers')
  return {
    'heads': c('num_attention_heads'),
    'activation': c.activation(),
    'epsilon': c('layer_norm_eps', 1e-12),
  }


def _distilbert(c: Config) -> Facts:
  c.only('tie_word_embeddings', True)
  # Sinusoidal positions are a table in the file, too.
  c.skip(
    'n_layers', 'dim', 'hidden_dim', 'sinusoidal_pos_embds', 'tie_weights_'
  )
  return {
    'heads': c('n_heads'),
    'activation': c.activation('activation'),
    'pooler_activation': 'relu',
    'epsilon': 1e-12,
  }


_FACTS: dict[str, Callable[[Config], Facts]] = {
  'bert': _bert,
  'distilbert': _distilbert,
  'ernie4_5': _ernie,
  'gemma': _gemma1,
  'gemma2': _gemma2,
  'gemma3_text': _gemma3,
  'gpt2': _gpt2,
  'granite': _granite,
  'helium': lambda c: _decoder(c, theta=1e5, epsilon=1e-8, interleaved=True),
  'llama': _decoder,
  'mistral': lambda c: _decoder(c, windows=_everywhere(4096)),
  'olmo': _olmo,
  'olmo2': lambda c: _decoder(c, epsilon=1e-5, norm_order='branch'),
  'phi3': _phi3,
  'qwen2': _qwen,
  'qwen3': _qwen3,
  'smollm3': _smollm3,
}

"""Rotary positions as Hugging Face's configs say them."""

from __future__ import annotations

from collections.abc import Mapping
import math
from typing import Any

import numpy as np

from utilized_rank.models.importing.config import Config
from utilized_rank.models.rotary import Rotation

_KEYS = {
  'default': (),
  'linear': ('factor',),
  'llama3': (
    'factor',
    'low_freq_factor',
    'high_freq_factor',
    'original_max_position_embeddings',
  ),
  'yarn': ('factor', 'original_max_position_embeddings'),
}
_OPTIONAL = {
  'yarn': (
    'attention_factor',
    'beta_fast',
    'beta_slow',
    'mscale',
    'mscale_all_dim',
    'truncate',
    'finetuned',
  )
}


def rotation(
  c: Config, head_dim: int, theta: float, kind: str | None = None
) -> Rotation:
  """The rotation of all layers, or of those of one kind.

  Args:
    c: the config, with `rope_parameters` (transformers 5) or `rope_theta` and
      `rope_scaling`.
    head_dim: width of a head.
    theta: of the model's config class.
    kind: of layers, where there are several.

  Raises:
    ValueError: a way to scale that is not known, or without its numbers.
  """
  given = c('rope_parameters', None) or c('rope_scaling', None) or {}
  c.skip('rope_scaling')
  if kind is not None and kind in given:
    given = given[kind]
  given = {k: v for k, v in given.items() if v is not None}
  theta = given.pop('rope_theta', None) or c('rope_theta', None) or theta
  share = given.pop('partial_rotary_factor', None)
  if share is None:
    share = c('partial_rotary_factor', None) or 1.0
  c.skip('partial_rotary_factor')
  name = given.pop('rope_type', None) or given.get('type', 'default')
  given.pop('type', None)
  needed, optional = _KEYS.get(name), _OPTIONAL.get(name, ())
  if needed is None:
    raise ValueError(
      f'{c.source} has rotary positions of type {name!r}; known are '
      f'{sorted(_KEYS)}.'
    )
  missing = [k for k in needed if k not in given]
  unknown = set(given) - {*needed, *optional}
  if missing or (unknown and name != 'default'):
    raise ValueError(
      f'{c.source} has rotary positions of type {name!r} with {given}; they '
      f'have {", ".join((*needed, *optional)) or "no numbers"}.'
    )
  width = int(head_dim * share)
  rates = np.asarray(Rotation.plain(theta, width).rates)
  scale = 1.0
  if name == 'linear':
    rates = rates / given['factor']
  elif name == 'llama3':
    rates = _llama3(rates, given)
  elif name == 'yarn':
    rates, scale = _yarn(rates, theta, width, given)
  return Rotation(tuple(map(float, rates)), scale)


def _llama3(rates: np.ndarray, given: Mapping[str, Any]) -> np.ndarray:
  """Slow pairs by the factor, fast ones not, a ramp between."""
  low, high = given['low_freq_factor'], given['high_freq_factor']
  turns = given['original_max_position_embeddings'] * rates / (2 * math.pi)
  ramp = np.clip((turns - low) / (high - low), 0, 1)
  return (1 - ramp) * rates / given['factor'] + ramp * rates


def _yarn(
  rates: np.ndarray, theta: float, width: int, given: Mapping[str, Any]
) -> tuple[np.ndarray, float]:
  """Peng et al., https://arxiv.org/abs/2309.00071."""
  factor = given['factor']

  def log_scale(weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

  scale = given.get('attention_factor')
  if scale is None:
    mscale, all_dim = given.get('mscale'), given.get('mscale_all_dim')
    scale = log_scale(1.0)
    if mscale and all_dim:
      scale = log_scale(mscale) / log_scale(all_dim)

  def pair(turns: float) -> float:
    length = given['original_max_position_embeddings']
    waves = math.log(length / (turns * 2 * math.pi))
    return width * waves / (2 * math.log(theta))

  first = pair(given.get('beta_fast') or 32)
  last = pair(given.get('beta_slow') or 1)
  if given.get('truncate', True):
    first, last = math.floor(first), math.ceil(last)
  first, last = max(first, 0), min(last, width - 1)
  last += 0.001 * (first == last)
  ramp = np.clip((np.arange(width // 2) - first) / (last - first), 0, 1)
  return rates / factor * ramp + rates * (1 - ramp), float(scale)

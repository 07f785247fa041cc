"""What is written beside a checkpoint's tensors: whose model it is, and how."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import json
import os
from typing import Any

from utilized_rank.models.importing import timm_names


@dataclasses.dataclass(frozen=True)
class Metadata:
  """Facts that no shape tells.

  Attributes:
    source: where they were found; '' if there are none.
    config: of Hugging Face's `config.json`; it has a `model_type`.
    architecture: a name of timm or torchvision.
    facts: options of the model that the architecture's name says.
  """

  source: str = ''
  config: Mapping[str, Any] | None = None
  architecture: str | None = None
  facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def find(
  path: str,
  others: Mapping[str, Any],
  config: str | Mapping[str, Any] | None,
  architecture: str | None,
) -> Metadata:
  """What the caller says, else what lies beside the file, else what is in it.

  Args:
    path: of the checkpoint, or the directory that it is.
    others: what is in it beside tensors, by name.
    config: of Hugging Face or timm, or its path.
    architecture: a name of timm or torchvision.

  Returns:
    The metadata, empty where there is nothing.

  Raises:
    ValueError: a config that says no model, or an architecture that has no
      layout here.
  """
  if architecture is not None:
    return _named(architecture, 'architecture=')
  if isinstance(config, Mapping):
    return _of(config, 'config=')
  if config is not None:
    return _of(_json(config), config)
  folder = path if os.path.isdir(path) else os.path.dirname(path)
  beside = os.path.join(folder, 'config.json')
  if os.path.exists(beside):
    found = _json(beside)
    if isinstance(found, Mapping) and {'model_type', 'architecture'} & {*found}:
      return _of(found, beside)
  # timm's training script writes the first; so do others, with their own names.
  for name in ('arch', '__metadata__.architecture'):
    if timm_names.known(others.get(name)):
      return _named(others[name], f'{path}, {name}')
  return Metadata()


def _of(config: Mapping[str, Any], source: str) -> Metadata:
  if 'model_type' in config:
    return Metadata(source, config=config)
  if 'architecture' not in config:
    raise ValueError(
      f'{source} has neither a model_type (Hugging Face) nor an architecture '
      f'(timm); it has {sorted(config)}.'
    )
  found = _named(config['architecture'], source)
  changed = set(config.get('model_args') or {}) - {'num_classes', 'img_size'}
  if changed:
    raise ValueError(
      f'{source} has model_args {sorted(changed)}, which change '
      f'{config["architecture"]}; give what they say as options, and '
      'architecture= in place of the config.'
    )
  named = str(config.get('global_pool'))
  pool = {'avg': 'gap', 'None': None}.get(named, named)
  if 'pool' in found.facts and pool not in (None, found.facts['pool']):
    raise ValueError(
      f'{source} has global_pool={pool!r} where {config["architecture"]} has '
      f'{found.facts["pool"]!r}; give pool= and architecture= in its place.'
    )
  return found


def _named(architecture: str, source: str) -> Metadata:
  return Metadata(
    source,
    architecture=architecture,
    facts=timm_names.facts(architecture, source),
  )


def _json(path: str) -> Any:
  with open(path) as file:
    return json.load(file)

"""Typed options out of a config section, with errors that name the field."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import difflib
from typing import Any, TypeVar, cast

T = TypeVar('T')


def from_config(cls: type[T], config: Any, section: str) -> T:
  """Builds the dataclass `cls` from a mapping such as a `ConfigDict`.

  Args:
    cls: a dataclass type.
    config: an instance of it, which is returned as it is, or a mapping from
      field names to values.
    section: what to call the mapping in an error, such as `config.train`.

  Raises:
    ValueError: a key that `cls` does not have, or a field without a default
      that the mapping does not have.
  """
  if isinstance(config, cls):
    return config
  if not hasattr(config, 'keys'):
    raise TypeError(
      f'{section} is a {type(config).__name__}; it must be a {cls.__name__} '
      'or a mapping of its fields.'
    )
  fields = dataclasses.fields(cast(Any, cls))
  names = [field.name for field in fields]
  for key in config:
    if key not in names:
      close = difflib.get_close_matches(key, names, 1)
      hint = f'; did you mean {close[0]!r}?' if close else '.'
      raise ValueError(
        f'{section} has the unknown key {key!r}{hint} '
        f'It takes {", ".join(names)}.'
      )
  for field in fields:
    required = (
      field.default is dataclasses.MISSING
      and field.default_factory is dataclasses.MISSING
    )
    if required and field.name not in config:
      raise ValueError(f'{section} lacks the key {field.name!r}.')
  values: Mapping[str, Any] = {key: config[key] for key in config}
  return cls(**values)

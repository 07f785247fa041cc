"""Dictionaries of other classes than `dict`, written down and made again."""

from __future__ import annotations

import collections
import sys
from typing import Any

# What makes the missing entries of a `defaultdict`, by name.
_FACTORIES = {f.__name__: f for f in (dict, list, set, int, float, str, bool)}


def record(made: dict[Any, Any], where: str) -> dict[str, Any]:
  """A dictionary's class as JSON.

  Raises:
    TypeError: it could not be made again.

  >>> record(collections.OrderedDict(), '')
  {'name': 'OrderedDict', 'module': 'collections'}
  """
  kind = type(made)
  found: dict[str, Any] = {
    'name': kind.__qualname__,
    'module': kind.__module__,
  }
  if type(made) is collections.defaultdict:
    factory = made.default_factory
    name = None if factory is None else getattr(factory, '__name__', '')
    found['factory'] = name
    if factory is not (None if name is None else _FACTORIES.get(name, made)):
      raise TypeError(
        f'the defaultdict at {where!r} makes entries by {factory!r}, which '
        'cannot be saved: pass dict(...) of it'
      )
  try:
    again = of_record(found, dict(made))
  except Exception as error:
    raise TypeError(
      f'the {kind.__name__} at {where!r} cannot be made again from its '
      f'entries ({error}): pass dict(...) of it'
    ) from error
  if type(again) is not kind or list(again) != list(made):
    raise TypeError(
      f'the {kind.__name__} at {where!r} is another one when it is made again '
      'from its entries: pass dict(...) of it'
    )
  return found


def of_record(found: dict[str, Any] | None, plain: dict[Any, Any]) -> Any:
  """Entries in a dictionary of the class that `record` wrote down.

  Raises:
    ValueError: no module that was imported has such a class of dictionaries.
  """
  if found is None:
    return plain
  if 'factory' in found:
    name = found['factory']
    return collections.defaultdict(
      None if name is None else _FACTORIES[name], plain
    )
  # Never imported here: a file says which.
  kind: Any = sys.modules.get(found['module'])
  for part in found['name'].split('.'):
    kind = getattr(kind, part, None)
  if not (isinstance(kind, type) and issubclass(kind, dict)):
    raise ValueError(
      f'the tree holds a {found["name"]} of {found["module"]}: import that '
      'first'
    )
  return kind(plain)

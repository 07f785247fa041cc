"""Dictionaries of other classes than `dict`, and named tuples.

Their class is written down by name, and they are made again where it is known.
"""

from __future__ import annotations

import collections
import sys
from typing import Any

# What makes the missing entries of a `defaultdict`, by name.
_FACTORIES = {f.__name__: f for f in (dict, list, set, int, float, str, bool)}


def record(made: Any, where: str) -> dict[str, Any]:
  """The class of a dictionary or named tuple as JSON.

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
  plain = dict if isinstance(made, dict) else tuple
  try:
    again = of_record(found, plain(made))
  except Exception as error:
    raise TypeError(
      f'the {kind.__name__} at {where!r} cannot be made again from its '
      f'entries ({error}): pass {plain.__name__}(...) of it'
    ) from error
  # Keys, or entries, which may be arrays.
  held = list if plain is dict else lambda entries: [*map(id, entries)]
  if type(again) is not kind or held(again) != held(made):
    raise TypeError(
      f'the {kind.__name__} at {where!r} is another one when it is made again '
      f'from its entries: pass {plain.__name__}(...) of it'
    )
  return found


def of_record(found: dict[str, Any] | None, plain: Any) -> Any:
  """A dictionary or tuple, in the class that `record` wrote down.

  Raises:
    ValueError: no module that was imported has such a class.
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
  if not (isinstance(kind, type) and issubclass(kind, type(plain))):
    raise ValueError(
      f'the tree holds a {found["name"]} of {found["module"]}: import that '
      'first'
    )
  return kind(*plain) if isinstance(plain, tuple) else kind(plain)

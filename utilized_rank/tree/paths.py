"""Names of the leaves of a parameter tree, and rules over them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
import difflib
import re
from typing import Any, TypeVar

from utilized_rank.tree import structure
from utilized_rank.tree.structure import Structure

Rules = Sequence[tuple[str, bool]]
T = TypeVar('T')


def flatten(
  tree: Any, is_leaf: Callable[[Any], bool] | None = None
) -> tuple[dict[str, Any], Structure]:
  """Flattens a tree to a dict from path to leaf, in the tree's own order.

  One object at two places is there once, see `structure`.

  >>> flatten({'a': [1, {'b': 2}]})[0]
  {'a/0': 1, 'a/1/b': 2}

  Raises:
    ValueError: two leaves have the same path.
  """
  leaves, treedef = structure.flatten(tree, is_leaf)
  named = {}
  for path, leaf in leaves:
    if path in named:
      raise ValueError(f'two leaves of the tree have the path {path!r}')
    named[path] = leaf
  return named, treedef


def unflatten(treedef: Structure, named: dict[str, Any]) -> Any:
  """Undoes `flatten`."""
  return treedef.filled(named)


def select(paths: Iterable[str], rules: Rules) -> dict[str, bool]:
  """Applies ordered `(regex, bool)` rules: full match, the first one wins.

  A path that no rule matches is not selected.

  >>> select(['a/kernel', 'head/kernel'],
  ...        [('head/.*', False), ('.*kernel', True)])
  {'a/kernel': True, 'head/kernel': False}

  Raises:
    ValueError: a rule is no valid regular expression, or matched no path.
  """
  return choose(paths, rules, 'select', bool, False)


def choose(
  paths: Iterable[str],
  rules: Sequence[tuple[str, Any]],
  what: str,
  read: Callable[[Any], T],
  default: T,
) -> dict[str, T]:
  """Applies ordered `(regex, value)` rules: full match, the first one wins.

  Args:
    paths: what the rules are over.
    rules: the rules.
    what: the argument that they are, for errors.
    read: of a rule's value; a TypeError or ValueError of it is the rule's.
    default: the value of a path that no rule matches.

  Raises:
    ValueError: a rule is no such pair, or matched no path.
  """
  compiled = []
  for rule in [rules] if isinstance(rules, str) else rules:
    if isinstance(rule, str):
      example = True if isinstance(default, bool) else 64
      raise ValueError(
        f'{what} rule {rule!r} is a string: rules are a list of (regex, '
        f'{type(default).__name__}) pairs, as in [({rule!r}, {example})]'
      )
    try:
      regex, value = rule
      compiled.append((re.compile(regex), read(value)))
    except (TypeError, ValueError, re.error) as error:
      raise ValueError(
        f'{what} rule {rule!r} is not a (regex, {type(default).__name__}) '
        f'pair: {error}'
      ) from error
  used = set()
  chosen = {}
  paths = list(paths)
  for path in paths:
    chosen[path] = default
    for i, (pattern, value) in enumerate(compiled):
      if pattern.fullmatch(path):
        used.add(i)
        chosen[path] = value
        break
  for i, (pattern, _) in enumerate(compiled):
    if i not in used:
      raise ValueError(
        f'{what} rule {pattern.pattern!r} matched no leaf (rules are full '
        'matches, the first one wins; what stands at two places has the path '
        f'of the first); paths look like {paths[:4]}'
      )
  return chosen


def only(names: Iterable[str]) -> Rules:
  """Selection rules for these paths and no others."""
  return [(re.escape(name), True) for name in names]


def unknown(path: str, known: Iterable[str]) -> str:
  """The part of an error message that helps with a mistyped path."""
  known = list(known)
  close = difflib.get_close_matches(path, known, n=3, cutoff=0.5)
  hint = f'did you mean {close}?' if close else f'known: {known[:6]}'
  return f'{path!r}; {hint}'

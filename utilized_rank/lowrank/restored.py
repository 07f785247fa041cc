"""Pairs of factors that were restored as plain dictionaries."""

from __future__ import annotations

from collections.abc import Mapping
import contextlib
from typing import Any

from utilized_rank.lowrank.leaf import is_low_rank
from utilized_rank.tree import paths
from utilized_rank.walk import tracing

_MOST_NAMES = 3


@contextlib.contextmanager
def explained(params: Any):
  """Says of a function's failure that its kernels are dictionaries.

  Args:
    params: what the function is run on.

  Raises:
    ValueError: it failed, and the parameters have dictionaries of factors.

  >>> factors = {'a': jnp.ones((4, 1)), 'b': jnp.ones((1, 3))}
  >>> with explained({'w': factors}):
  ...   jnp.ones((2, 4)) @ factors
  Traceback (most recent call last):
  ...
  ValueError: the kernels ['w'] are dictionaries of their factors, as orbax ...
  """
  try:
    yield
  except (ValueError, TypeError, AttributeError) as error:
    found = _dictionaries(params)
    if not found:
      raise
    more = ', …' if len(found) > _MOST_NAMES else ''
    raise ValueError(
      f'the kernels {found[:_MOST_NAMES]}{more} are dictionaries of their '
      'factors, as orbax restores LowRank leaves without a target: restore '
      'into a tree of LowRank leaves (the one that was saved, or what its '
      'recipe builds), or write with ur.save and read with ur.load'
    ) from error


def _dictionaries(params: Any) -> list[str]:
  """Paths of dictionaries that have the entries of a `LowRank`."""
  ends = lambda node: is_low_rank(node) or _is_pair(node)
  named, _ = paths.flatten(params, ends)
  return [path for path, leaf in named.items() if _is_pair(leaf)]


def _is_pair(node: Any) -> bool:
  if not isinstance(node, Mapping):
    return False
  # The place of B says in which order an identity block's outputs are.
  kinds = {str(key).partition('_')[0]: key for key in node}
  if len(kinds) < len(node) or not {'a', 'b'} <= set(kinds) <= {'a', 'b', 'c'}:
    return False
  a, b = node[kinds['a']], node[kinds['b']]
  if not tracing.is_array(b) or b.ndim < 2:
    return False
  # Of kernels that share a left factor, one alone has it.
  is_whole = tracing.is_array(a) and a.ndim > 1 and a.shape[-1] in b.shape
  return a is None or is_whole

"""Whether the processes of a job call a function with the same arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from utilized_rank.host.processes import exchange
from utilized_rank.host.processes import together

# An argument's parts by name, or an argument that has none.
Argument = Mapping[Any, Any] | str | int | float | None
# Names that an error lists.
_MOST = 4


def check(caller: str, arguments: Callable[[], Mapping[str, Argument]]) -> None:
  """Raises unless every process gives the same arguments.

  Checksums of them travel (crc32, of every byte of every array), so that
  processes that would wait for each other, or make different trees, say so at
  once. All processes must call it.

  Args:
    caller: the function's name, for the error.
    arguments: returns each argument's parts, pytrees, by name; a function, so
      that what it raises in one process is raised in all.

  Raises:
    ValueError: on every process; names what differs and where.
  """
  if jax.process_count() == 1:
    return
  given, digests = together(lambda: _digests(arguments()))
  told = exchange(
    [n for parts in digests.values() for n in (len(parts), _joint(parts))]
  ).reshape(jax.process_count(), -1, 2)
  different: list[str] = []
  others: set[int] = set()
  for (name, parts), mark in zip(
    digests.items(), np.moveaxis(told, 1, 0), strict=True
  ):
    unequal = (mark != mark[0]).any(1)
    if not unequal.any():
      continue
    others |= set(np.flatnonzero(unequal).tolist())
    if not isinstance(given[name], Mapping):
      different.append(f'{name} (here {given[name]!r})')
    elif (mark[:, 0] != mark[0, 0]).any():
      different.append(f'{name} ({len(parts)} here)')
    else:
      each = exchange(list(parts.values()))
      columns = (each != each[0]).any(0)
      different += [
        f'{name}[{part!r}]'
        for part, differs in zip(parts, columns.tolist(), strict=True)
        if differs
      ]
  if different:
    more = f' and {len(different) - _MOST} more' * (len(different) > _MOST)
    raise ValueError(
      f'processes {sorted(others)} call {caller} with other arguments than '
      f'process 0: {", ".join(different[:_MOST])}{more}; with processes=True '
      'all processes must give it the same'
    )


Digests = dict[str, dict[str, int]]


def _digests(
  given: Mapping[str, Argument],
) -> tuple[Mapping[str, Argument], Digests]:
  found = {}
  for name, argument in given.items():
    parts = argument if isinstance(argument, Mapping) else {'': argument}
    by_name = {str(part): value for part, value in parts.items()}
    found[name] = {p: digest(by_name[p], p) for p in sorted(by_name)}
  return given, found


def _joint(parts: Mapping[str, int]) -> int:
  return zlib.crc32(repr(list(parts.values())).encode())


def digest(value: Any, name: str = '') -> int:
  """A crc32 of a name and of the arrays and numbers in a pytree.

  >>> digest([np.ones(3), 'a']) == digest([jnp.ones(3), 'a'])
  False
  >>> digest([np.ones(3), 'a']) == digest([np.ones(3), 'a'])
  True
  """
  crc = zlib.crc32(name.encode())
  for leaf in jax.tree.leaves(value):
    for piece in _pieces(leaf):
      crc = zlib.crc32(piece, crc)
  return crc


def _pieces(leaf: Any) -> list[Any]:
  if isinstance(leaf, np.generic):  # a number is one, whoever made it
    leaf = leaf.item()
  if isinstance(leaf, str | int | float):
    return [repr(leaf).encode()]
  if not hasattr(leaf, 'dtype'):  # a function's text may hold its address
    return [type(leaf).__name__.encode()]
  kind = f'{leaf.dtype} {leaf.shape}'.encode()
  # Of random keys, and of one array that the processes hold parts of, the shape
  # will do.
  if jnp.issubdtype(leaf.dtype, jax.dtypes.extended) or (
    isinstance(leaf, jax.Array)
    and not (leaf.is_fully_addressable or leaf.is_fully_replicated)
  ):
    return [kind]
  flat = np.ascontiguousarray(leaf).reshape(-1)
  return [kind, flat.view(np.uint8)]

"""Kernels that read one input, with one left factor for all of them.

[W_1 W_2 ...] ~ A [B_1 B_2 ...]: r (d + m_1 + m_2 + ...) numbers, where pairs
of their own have r_i (d + m_i) each, and x A is computed once. Worth it where
the kernels use the same directions of their input, as q, k and v, or gate and
up, often do. (Basis Sharing shares over layers; this is over one input.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
import dataclasses
import itertools
from typing import Any

import numpy as np

from utilized_rank.factorization import methods
from utilized_rank.factorization.kernels import Kernel
from utilized_rank.factorization.kernels import kernels
from utilized_rank.factorization.methods import Family
from utilized_rank.linalg.best_pairs import Pair
from utilized_rank.moments.moments import Moments
from utilized_rank.tree import paths
from utilized_rank.tree.layout import Layout

# A kernel's path, or those of kernels that share a left factor.
Key = str | tuple[str, ...]
# From `Key`s (a mapping's key type is invariant). A stack of kernels has one
# rank, or one for each of its members.
Ranks = Mapping[Any, int | tuple[int, ...]]


def names_of(key: Key) -> tuple[str, ...]:
  return (key,) if isinstance(key, str) else tuple(key)


def sets(moments: Mapping[str, Any]) -> list[tuple[str, ...]]:
  """The kernels that could share a left factor: they read the same value."""
  found: dict[Any, list[str]] = {}
  for path in moments:
    entry = moments[path].entry
    found.setdefault((entry.index, entry.layout.group_shape), []).append(path)
  return [tuple(names) for names in found.values() if len(names) > 1]


def count_units(keys: Iterable[Key], moments: Mapping[str, Any]) -> int:
  """How many groups of kernels `units` yields under some keys, together."""
  return sum(moments[names_of(key)[0]].layout.num_groups for key in keys)


def matrix_shape(key: Key, moments: Mapping[str, Any]) -> tuple[int, int]:
  """(d, m_1 + m_2 + ...) of the kernels side by side."""
  shapes = [moments[name].layout.matrix_shape for name in names_of(key)]
  return shapes[0][0], sum(m for _, m in shapes)


def check_ranks(ranks: Ranks, moments: Mapping[str, Any]) -> None:
  """Raises ValueError for a rank that its kernel cannot have."""
  seen: set[str] = set()
  for key, given in ranks.items():
    names = names_of(key)
    for name in names:
      if name not in moments:
        raise ValueError('a rank is given for ' + paths.unknown(name, moments))
      if name in seen:
        raise ValueError(f'{name!r} is given a rank twice')
      seen.add(name)
    if not isinstance(key, str) and not any(
      set(names) <= set(found) for found in sets(moments) if len(names) > 1
    ):
      raise ValueError(
        f'{key} cannot share a left factor: only two or more kernels that '
        f'read the same value can, such as {sets(moments)[:2]}'
      )
    shape = matrix_shape(key, moments)
    for rank in per_member(key, given, moments[names[0]].layout):
      if not 1 <= rank <= min(shape) or rank != int(rank):
        raise ValueError(
          f'rank {rank!r} for {key!r}: a {shape} kernel has '
          f'ranks from 1 to {min(shape)}'
        )


def per_member(
  key: Key, given: int | tuple[int, ...], layout: Layout
) -> tuple[int, ...]:
  """The rank of every matrix of a leaf, in the order of its groups."""
  if not isinstance(given, tuple):
    return (given,) * layout.num_groups
  if len(given) != layout.num_groups:
    raise ValueError(
      f'{len(given)} ranks for {key!r}, which holds {layout.num_groups} '
      'kernels: give one, or one for each'
    )
  return given


def units(
  params: Any, moments: Moments, keys: Iterable[Key], *, centered: bool
) -> Iterator[tuple[Key, Iterator[tuple[Kernel, ...]]]]:
  """Yields each key with its kernels: for each group, the one of each path.

  Those of a key that stands alone are made as they are taken.
  """
  keys_of: dict[str, list[Key]] = {}
  for key in keys:
    for name in names_of(key):
      keys_of.setdefault(name, []).append(key)
  waiting: dict[Key, dict[str, Iterator[Kernel]]] = {}
  for path, members in kernels(
    params, moments, centered=centered, only=keys_of
  ):
    users = keys_of[path]
    for key, own in zip(users, itertools.tee(members, len(users)), strict=True):
      found = waiting.setdefault(key, {})
      found[path] = own
      if len(found) == len(names_of(key)):
        del waiting[key]
        columns = [found[name] for name in names_of(key)]
        yield key, zip(*columns, strict=True)


def family(group: Sequence[Kernel], method: str, damping: float) -> Family:
  """The family of one kernel, or of several that have one A.

  B holds theirs side by side; see `split`. For 'loss', G is block-diagonal:
  kernels do not interact in it, and each block is damped by its own scale.

  Raises:
    ValueError: the method is 'utilized', whose pairs are no truncations of
      one another, or 'coupled', for which each kernel weighs their input by
      its own gradients: neither has a joint form.
  """
  if len(group) == 1:
    return methods.family(group[0], method, damping)
  if method in methods.ALONE:
    raise ValueError(
      f'{[k.path for k in group]} cannot share a left factor by the method '
      f"{method!r}: its subspaces are each kernel's own"
    )
  together = joint(group, damping if method == 'loss' else 0.0)
  (a, b), cross = methods.solve(together, method, 0.0)
  each = [
    methods.costs(kernel, cross, part)
    for kernel, part in zip(group, split(b, group), strict=True)
  ]
  damages = {m: np.sum([d[m] for d in each], axis=0) for m in each[0]}
  return Family(Pair(a, b), damages)


def joint(group: Sequence[Kernel], damping: float = 0.0) -> Kernel:
  """[W_1 W_2 ...] as one kernel of their input, G being block-diagonal."""
  if len(group) == 1:
    return group[0]
  fishers = [k.row_fisher for k in group if k.row_fisher is not None]
  gradients = [k.gradient for k in group if k.gradient is not None]
  everywhere = len(gradients) == len(group)
  blocks = _blocks(gradients, damping) if everywhere else None
  return dataclasses.replace(
    group[0],
    w=np.concatenate([k.w for k in group], axis=1),
    row_fisher=np.sum(fishers, axis=0) if len(fishers) == len(group) else None,
    _gradient=None if blocks is None else lambda: blocks,
  )


def _blocks(gradients: Sequence[np.ndarray], damping: float) -> np.ndarray:
  scales = [float(np.trace(g)) / len(g) for g in gradients]
  # One without any gradient must not outweigh those that have one.
  usual = sum(scales) / len(scales)
  whole = np.zeros((sum(map(len, gradients)),) * 2)
  at = 0
  for g, scale in zip(gradients, scales, strict=True):
    here = slice(at, at + len(g))
    whole[here, here] = g + damping * (scale or usual) * np.eye(len(g))
    at += len(g)
  return whole


def split(b: np.ndarray, group: Sequence[Kernel]) -> list[np.ndarray]:
  """B of each kernel, from the one that holds them side by side."""
  return np.split(b, np.cumsum([k.w.shape[1] for k in group])[:-1], axis=1)

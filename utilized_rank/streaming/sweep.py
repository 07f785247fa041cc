"""A model cut into blocks, whose weights are read when their turn is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
import dataclasses
import math
import os
from typing import Any
import zlib

import jax
import numpy as np

from utilized_rank.factorization.kernels import warn_if_few
from utilized_rank.models.importing.open_checkpoint import Opened
from utilized_rank.models.importing.open_checkpoint import open_checkpoint
from utilized_rank.moments.capture import find_sites
from utilized_rank.moments.coverage import Coverage
from utilized_rank.moments.moments import Moments
from utilized_rank.moments.sites import Site
from utilized_rank.moments.sites import Sites
from utilized_rank.refit.anchor import checked
from utilized_rank.refit.blocks import Block
from utilized_rank.refit.streams import Streams
from utilized_rank.streaming.damages import without_sums
from utilized_rank.tree import paths

# Leaves by path, on the device.
Leaves = dict[str, Any]


def block_of(path: str) -> str | None:
  """The repeated part of a model that a leaf is in: up to a key with a number.

  >>> block_of('params/block_3/mlp/up/kernel')
  'params/block_3'
  >>> block_of('params/head/kernel') is None
  True
  """
  keys = path.split('/')
  for i, key in enumerate(keys[:-1]):
    if key[-1:].isdigit():
      return '/'.join(keys[: i + 1])
  return None


class Sweep:
  """The blocks of a model and the batches that run through them.

  The model's function is cut where the least lies between two blocks. What is
  before the first one (an embedding) is a block without kernels, and so is what
  is behind the last (a norm, a head), which nothing runs.

  Attributes:
    opened: the checkpoint.
    sites: the chosen kernels by path.
    every: all kernels, and why other leaves are none.
    streams: the runs.
    starts: of each batch the values before the first block.
    digest: of all batches.
  """

  def __init__(
    self, opened: Opened, batches: Iterable[Any], select: paths.Rules | None
  ):
    """Cuts the model; reads the batches once, and no weights.

    Raises:
      ValueError: there is no batch or no kernel, or a selected kernel cannot
        be a pair of layers.
    """
    self.opened = opened
    first, stream = checked(batches)
    apply = opened.model.apply
    self.every = find_sites(apply, opened.abstract, first, select=select)
    self.sites = _chosen(self.every, opened, select is None)
    self._crc = 0
    self.streams = Streams(
      apply,
      opened.abstract,
      self._noted(stream),
      {path: site.layout for path, site in self.sites.items()},
      lambda path: block_of(path) or path,
      lean=True,
    )
    self.starts = [
      self.streams.dense[i] for i in range(len(self.streams.dense))
    ]
    self.digest = f'{self._crc:08x}, {len(self.streams.programs)} batches'
    for block in self.blocks:
      for path in block.paths:
        if self.sites[path].bias not in block.params:
          new = dataclasses.replace(self.sites[path], bias=None)
          self.sites[path] = new

  @classmethod
  def of(
    cls,
    path: str | os.PathLike[str],
    batches: Iterable[Any],
    select: paths.Rules | None,
    options: Mapping[str, Any],
  ) -> Sweep:
    """Of a checkpoint that is not compressed; the options are its model's.

    Raises:
      ValueError: it is, or as `__init__` and `open_checkpoint`.
    """
    opened = open_checkpoint(os.fspath(path), **options)
    if opened.factored is not None:
      raise ValueError(f'{opened.path} is compressed already')
    return cls(opened, batches, select)

  def _noted(self, stream: Iterator[Any]) -> Iterator[Any]:
    for batch in stream:
      for leaf in jax.tree.leaves(batch):
        array = np.ascontiguousarray(leaf)
        about = f'{array.dtype.name}{array.shape}'.encode()
        self._crc = zlib.crc32(array.tobytes(), zlib.crc32(about, self._crc))
      yield batch

  @property
  def blocks(self) -> list[Block]:
    return list(self.streams.blocks)

  def is_followed(self, number: int) -> bool:
    """Whether a block with kernels comes behind a block."""
    return number < len(self.blocks) - 2

  def is_needed(self, number: int) -> bool:
    """Whether kernels of a block are read, or a later block needs it."""
    return self.is_followed(number) or bool(self.blocks[number].reads)

  @property
  def coverage(self) -> Coverage:
    """Which share of the parameters the chosen kernels hold."""
    others = {p: s for p, s in self.every.items() if p not in self.sites}
    sizes = {path: math.prod(s.layout.shape) for path, s in others.items()}
    return self.every.coverage.without(sizes)

  def warn_if_scarce(self) -> None:
    """Says now what measuring would say of few rows."""
    batches = len(self.streams.programs)
    rows = {
      path: np.asarray(site.rows * batches) for path, site in self.sites.items()
    }
    counted = without_sums(self.sites, rows)
    warn_if_few(counted, list(counted))

  def leaves(self, number: int) -> Leaves:
    """The dense leaves that a block uses, read now."""
    read = self.opened.leaves(self.blocks[number].params)
    # The host's copies go one by one.
    return {path: jax.device_put(read.pop(path)) for path in list(read)}

  def moments(self, number: int, leaves: Leaves) -> Moments:
    """What a block's kernels read in the dense run, as `collect` sums it."""
    found = self.streams.moments(number, leaves)
    table = []
    for entry in found.table:
      site = self.sites[entry.path]
      table.append(
        dataclasses.replace(entry, bias=site.bias, bias_scale=site.bias_scale)
      )
    return Moments(tuple(table), found.sums)

  def inputs_of(self, moments: Mapping[str, Any]) -> list[list[str]]:
    """Kernels that read one value, together: their eigenbasis is made once."""
    groups: dict[int, list[str]] = {}
    for path in moments:
      groups.setdefault(moments[path].entry.index, []).append(path)
    return list(groups.values())


def _chosen(every: Sites, opened: Opened, by_default: bool) -> dict[str, Site]:
  """The kernels that two layers can stand for."""
  found, refused = {}, {}
  for path, site in every.items():
    target = opened.match.targets[path]
    why = None
    if site.also:
      why = f'it is also used by {", ".join(site.also)}'
    elif site.kind != 'dot' or site.layout.num_groups != 1:
      why = 'it is no single matrix'
    elif target.layer is not None or not target.name.endswith('.weight'):
      why = f'the tensor {target.name} is no weight of one layer'
    elif by_default and block_of(path) is None:
      why = 'it is in no block'
    if why is None:
      found[path] = site
    else:
      refused[path] = why
  if refused and not by_default:
    path, why = next(iter(refused.items()))
    raise ValueError(f'{path} cannot be a pair of layers: {why}')
  if not found:
    raise ValueError(
      f'{opened.path} has no kernel to make a pair of: '
      f'{dict(list((refused or every.unseen).items())[:4])}'
    )
  return found

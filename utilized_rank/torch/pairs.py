"""Two layers in place of one: what a `LowRank` leaf is in PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from utilized_rank.host.extras import extra
from utilized_rank.lowrank.leaf import LowRank

with extra('torch'):
  import torch
  from torch import nn

_CONVOLUTIONS = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}


class Pair(nn.Sequential):
  """Two stock layers, with the attributes of the one that they stand for.

  Code around a layer may ask for its weight's dtype, its stride or its number
  of outputs. `weight` is the product, made anew at each call.
  """

  @property
  def weight(self) -> torch.Tensor:
    first, second = (layer.weight for layer in self)
    if isinstance(self[0], nn.Linear):
      return second @ first
    groups = self[0].groups
    a = first.reshape(groups, -1, first[0].numel())
    b = second.reshape(groups, -1, a.shape[1])
    return (b @ a).reshape(-1, *first.shape[1:])

  def __getattr__(self, name: str) -> Any:
    try:
      return super().__getattr__(name)
    except AttributeError:
      if '1' not in self.__dict__.get('_modules', {}):  # not made yet
        raise
      layer = self[name.startswith('out_') or name == 'bias']
      return getattr(layer, name)


class SideBySide(nn.Module):
  """Layers that read the same, in place of one that makes all their outputs.

  `weight` is that of the one layer of which it stands in place, made anew at
  each call.
  """

  def __init__(self, layers: Mapping[str, nn.Module]):
    super().__init__()
    for name, layer in layers.items():
      self.add_module(name, layer)

  @property
  def weight(self) -> torch.Tensor:
    return torch.cat([layer.weight for layer in self.children()])

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    return torch.cat([layer(x) for layer in self.children()], dim=-1)


def empty(inputs: int, outputs: int, rank: int | None, bias: bool) -> nn.Module:
  """Layers to fill: a pair, or one linear layer where the rank is None."""
  if rank is None:
    return nn.Linear(inputs, outputs, bias)
  return Pair(nn.Linear(inputs, rank, False), nn.Linear(rank, outputs, bias))


def sizes_of(layer: nn.Module) -> tuple[int, int] | None:
  """(inputs, outputs) of a linear layer; None of another."""
  if type(layer) is nn.Linear:
    return layer.in_features, layer.out_features
  if _is_conv1d_of_transformers(layer):
    d, m = layer.weight.shape  # it holds (inputs, outputs)
    return d, m
  return None


def pair_of(layer: nn.Module, leaf: LowRank, bias: Any) -> Pair | None:
  """The layer as two; None for one that is not known to be a product alone.

  Args:
    layer: the dense layer.
    leaf: what is in place of its weight; written out, with its left factor.
    bias: in place of its bias, or None.
  """
  groups = int(np.prod(leaf.layout.group_shape))
  c = leaf.c
  if c is not None:
    c = np.asarray(c, np.float32).reshape(-1)
    bias = c if bias is None else np.asarray(bias, np.float32) + c
  made: tuple[nn.Module, nn.Module] | None = None
  sizes = sizes_of(layer)
  if sizes is not None and groups == 1:
    made = _linears(*sizes, leaf, bias)
  elif type(layer) in _CONVOLUTIONS and groups == layer.groups:
    made = _convolutions(layer, leaf, bias)
  if made is None:
    return None
  pair = Pair(*made)
  weight = layer.weight
  pair.to(device=weight.device, dtype=weight.dtype)
  pair.train(layer.training)
  return pair


def _linears(
  d: int, m: int, leaf: LowRank, bias: Any
) -> tuple[nn.Module, nn.Module]:
  first = nn.Linear(d, leaf.rank, bias=False)
  second = nn.Linear(leaf.rank, m, bias=bias is not None)
  fill(first.weight, np.asarray(leaf.a, np.float32).reshape(d, -1).T)
  fill(second.weight, np.asarray(leaf.b, np.float32).reshape(-1, m).T)
  if bias is not None:
    fill(second.bias, bias)
  return first, second


def _convolutions(
  layer: Any, leaf: LowRank, bias: Any
) -> tuple[nn.Module, nn.Module]:
  """A convolution into each group's r channels, and one of 1 x 1 behind it."""
  groups, rank, kind = layer.groups, leaf.rank, type(layer)
  first = kind(
    layer.in_channels,
    groups * rank,
    layer.kernel_size,
    layer.stride,
    layer.padding,
    layer.dilation,
    groups,
    bias=False,
    padding_mode=layer.padding_mode,
  )
  second = kind(
    groups * rank, layer.out_channels, 1, groups=groups, bias=bias is not None
  )
  a = np.asarray(leaf.a, np.float32).reshape(groups, -1, rank)
  b = np.asarray(leaf.b, np.float32).reshape(groups, rank, -1)
  fill(first.weight, np.swapaxes(a, 1, 2).reshape(first.weight.shape))
  fill(second.weight, np.swapaxes(b, 1, 2).reshape(second.weight.shape))
  if bias is not None:
    fill(second.bias, bias)
  return first, second


def _is_conv1d_of_transformers(layer: nn.Module) -> bool:
  """GPT-2's layer, a product whose weight is (inputs, outputs)."""
  kind = type(layer)
  name = f'{kind.__module__}.{kind.__name__}'
  return name == 'transformers.pytorch_utils.Conv1D'


@torch.no_grad()
def fill(parameter: torch.Tensor, array: Any) -> None:
  """Writes an array into a parameter of its size, cast to its dtype."""
  own = np.array(array, np.float32, order='C')  # which torch may write to
  parameter.copy_(torch.from_numpy(own).reshape(parameter.shape))

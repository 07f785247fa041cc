"""A convolution with its batch norm, and the one folded into the other."""

from __future__ import annotations

from collections.abc import Mapping
import re
from typing import Any

import jax
import numpy as np

from utilized_rank.host.extras import extra

with extra('models'):
  import flax.linen as nn

Array = jax.Array

EPSILON = 1e-5


def conv_norm(
  x: Array,
  features: int,
  size: int,
  suffix: str,
  *,
  batch_norm: bool,
  train: bool,
  dtype: Any,
  stride: int = 1,
  padding: str = 'symmetric',
  use_bias: bool = False,
  groups: int = 1,
  epsilon: float = EPSILON,
) -> Array:
  """`conv{suffix}` of a square kernel, and `bn{suffix}` if `batch_norm`.

  Called inside a compact module. Without the norm the convolution has a bias,
  so that `fold_batch_norm` gives the tree for it. `padding` is `'symmetric'`,
  as in PyTorch, or `'SAME'`, which differ where the stride is 2.
  """
  sides = (size // 2, size // 2)
  x = nn.Conv(
    features,
    (size, size),
    strides=(stride, stride),
    padding=(sides, sides) if padding == 'symmetric' else padding,
    use_bias=use_bias or not batch_norm,
    feature_group_count=groups,
    kernel_init=nn.initializers.he_normal(),
    dtype=dtype,
    name=f'conv{suffix}',
  )(x)
  if not batch_norm:
    return x
  return nn.BatchNorm(
    use_running_average=not train,
    momentum=0.9,
    epsilon=epsilon,
    dtype=dtype,
    name=f'bn{suffix}',
  )(x)


def fold_batch_norm(
  variables: Mapping[str, Any], epsilon: float = EPSILON
) -> dict[str, Any]:
  """The variables of the same network with `batch_norm=False`.

  At inference a norm is an affine map of every channel, so the convolution
  before it can do its work: the same function, up to rounding. Computed in
  float64, returned in each kernel's own dtype.

  Args:
    variables: `{'params': ..., 'batch_stats': ...}` of a model whose norms
      `bn*` follow the convolutions `conv*` beside them: `ResNet`, `VGG` and
      `EfficientNet`.
    epsilon: of the norms.

  Returns:
    `{'params': ...}` of numpy arrays, for `model.clone(batch_norm=False)`.

  Raises:
    ValueError: there are no statistics, or a norm has no convolution.
  """
  if not variables.get('batch_stats'):
    raise ValueError(
      f'the variables have {sorted(variables)}; folding needs batch_stats.'
    )
  folded = _fold(variables['params'], variables['batch_stats'], epsilon, '')
  return {'params': folded}


def _fold(params: Any, stats: Any, epsilon: float, path: str) -> dict[str, Any]:
  out = dict(params)
  for name, below in stats.items():
    if 'var' not in below:
      out[name] = _fold(params[name], below, epsilon, f'{path}{name}/')
      continue
    conv = re.sub('^bn', 'conv', name)
    if conv == name or conv not in params:
      raise ValueError(
        f'the norm {path}{name} has no convolution {path}{conv} beside it; '
        f'there are {sorted(params)}.'
      )
    norm = {
      k: np.asarray(v, np.float64) for k, v in (out.pop(name) | below).items()
    }
    kernel = np.asarray(params[conv]['kernel'])
    scale = norm['scale'] / np.sqrt(norm['var'] + epsilon)
    before = np.asarray(params[conv].get('bias', 0.0), np.float64)
    bias = (before - norm['mean']) * scale + norm['bias']
    out[conv] = {
      'kernel': (kernel * scale).astype(kernel.dtype),
      'bias': bias.astype(kernel.dtype),
    }
  return out
